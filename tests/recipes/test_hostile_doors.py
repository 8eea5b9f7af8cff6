"""Every door of the recipe for a stranger's files: nothing runs, one sentence, no folder left."""

import json
import pickle
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from vla_runs import files, forgetful_pool, no_conclusion, resume, tiny, without_simulator

__all__ = ["files", "forgetful_pool", "no_conclusion", "tiny", "without_simulator"]

pytestmark = pytest.mark.slow

OFFLINE = ("--env.type=null", "--base_episodes=0", "--online.steps=0", "--evaluate_every=0")
SHORT = ("--steps=1", "--critic.warmup_steps=1", "--critic.updates_per_step=1")


class Marks:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.call, (["touch", str(self.marker)],)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def policy(files, tmp_path):
    return Path(shutil.copytree(files.policy, tmp_path / "policy"))


def name_a_class(policy, marker):
    path = policy / "policy_postprocessor.json"
    fields = json.loads(path.read_text())
    config = {"args": f"touch {marker}", "shell": True}
    fields["steps"].append({"class": "subprocess.Popen", "config": config})
    path.write_text(json.dumps(fields))


def sentence(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def nothing_ran(marker):
    time.sleep(0.3)
    return not marker.exists()


def test_a_policy_that_names_a_class_starts_no_run(policy, tiny, marker, tmp_path, capsys):
    name_a_class(policy, marker)
    assert tiny(tmp_path / "run", *OFFLINE, f"--policy.path={policy}") == 2
    assert "policy_postprocessor.json: step 3 names the class 'subprocess.Popen'" in sentence(
        capsys
    )
    assert nothing_ran(marker)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_gone_on_with_if_its_policy_has_become_hostile(
    policy, tiny, marker, tmp_path, capsys, no_conclusion
):
    run = tmp_path / "run"
    assert tiny(run, *OFFLINE, *SHORT, f"--policy.path={policy}") == 0
    name_a_class(policy, marker)
    capsys.readouterr()
    assert resume(run) == 2
    assert "is not the one that the run in" in sentence(capsys)
    (run / "inputs.json").unlink()  # as older versions left a run: the gate is there as well
    assert resume(run) == 2
    assert "names the class 'subprocess.Popen'" in sentence(capsys)
    assert nothing_ran(marker)
    assert (run / "checkpoints/last").exists()


@pytest.mark.parametrize("name", ["networks.safetensors", "scalars.json"])
def test_a_critic_that_is_pickled_is_not_unpickled(name, tiny, marker, tmp_path, capsys):
    algorithm = tmp_path / "stranger/algorithm"
    algorithm.mkdir(parents=True)
    (algorithm / "scalars.json").write_text("{}")
    (algorithm / name).write_bytes(pickle.dumps(Marks(marker)))
    flags = (*OFFLINE, *SHORT, f"--critic.path={algorithm.parent}")
    assert tiny(tmp_path / "run", *flags) == 2
    assert str(algorithm) in sentence(capsys)
    assert not marker.exists()
    assert not (tmp_path / "run").exists()
