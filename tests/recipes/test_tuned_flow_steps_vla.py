"""The recipes for LeRobot's policies with another number of flow steps than the policy's own."""

import json
import shutil
from pathlib import Path

import pytest
from toy_deaths import dies_at_update
from toy_files import differences
from toy_images import images_state, toy_pool
from vla_runs import (
    Whole,
    files,
    forgetful_pool,
    killed,
    no_conclusion,
    resume,
    tiny,
    whole,
    whole_run,
    without_conclusion,
    without_simulator,
)
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
from vla_trqam.adapters.loading import load_policy

from vla_trqam.engine import conclude as showcase
from vla_trqam.engine.acting import chunk_policy
from vla_trqam.engine.cached import Cached
from vla_trqam.engine.playing import EVALUATION_NOISE
from vla_trqam.jobs import vla_inputs
from vla_trqam.methods.base import FlowActor

__all__ = [  # fixtures
    "files",
    "forgetful_pool",
    "no_conclusion",
    "tiny",
    "whole",
    "without_simulator",
]
pytestmark = pytest.mark.slow

OWN, TUNED = 3, 2
FEWER = f"--policy.tuned_flow_steps={TUNED}"
LAST = "checkpoints/last/pretrained_model"


@pytest.fixture(scope="module")
def fewer(files, tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("fewer") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(showcase, "write_plots", lambda *_, **__: [])
        return whole_run(folder, [*files.flags(), FEWER])


def steps_in(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["num_inference_steps"])


def successes(
    policy: LeRobotFlowPolicy, seeds: list[int], num_flow_steps: int | None
) -> list[bool]:
    pool = toy_pool()
    actor = chunk_policy(policy, FlowActor(policy, num_flow_steps=num_flow_steps), EVALUATION_NOISE)
    return [episode.success for episode in pool.run(actor, seeds)]


def test_the_saved_policy_acts_with_the_tuned_steps_and_the_given_one_stays(fewer, files):
    assert steps_in(fewer.folder / LAST) == TUNED
    assert steps_in(files.policy) == OWN
    assert fewer.policy.num_flow_steps == TUNED


def test_the_evaluation_is_what_policies_loaded_from_disk_achieve(fewer, files):
    evaluation = fewer.state["evaluation"]
    came, seeds = evaluation["base_as_it_came"], evaluation["seeds"]
    given = load_policy(files.policy, lora=None, limits=(-1.0, 1.0))
    assert came["success"] == successes(given, seeds, None)
    assert evaluation["base_success"] == successes(given, seeds, TUNED)
    tuned = load_policy(fewer.folder / LAST, lora=None, adapter="continue", limits=(-1.0, 1.0))
    assert evaluation["tuned_success"] == successes(tuned, seeds, None)
    assert (came["num_flow_steps"], came["num_flow_steps_of_base_and_tuned"]) == (OWN, TUNED)


def test_a_killed_run_goes_on_to_the_same_bits(tiny, no_conclusion, fewer, tmp_path):
    with killed(lambda patch: dies_at_update(patch, Cached, 5)):
        tiny(tmp_path / "run", FEWER)
    assert resume(tmp_path / "run") == 0
    found = differences(images_state(tmp_path / "run"), without_conclusion(fewer.state))
    assert found == []


def test_a_base_made_of_adapters_keeps_its_own_steps_in_the_runs_folder(
    tiny, no_conclusion, whole, tmp_path
):
    given = f"--policy.path={whole.folder / LAST}"
    flags = (FEWER, given, "--critic.warmup_steps=0", "--online.steps=0")
    assert tiny(tmp_path / "whole", *flags) == 0
    with killed(lambda patch: dies_at_update(patch, Cached, 3)):
        tiny(tmp_path / "run", *flags)
    for resumed in (False, True):
        assert not resumed or resume(tmp_path / "run") == 0
        assert steps_in(tmp_path / "run/base_policy") == OWN
    assert steps_in(tmp_path / "run" / LAST) == TUNED
    states = [images_state(tmp_path / name) for name in ("run", "whole")]
    # These name the folder of the adapters' base.
    naming = {f"pretrained_model/{f}" for f in ("README.md", "adapter_config.json", "config.json")}
    assert set(differences(*states)) == naming


# The trust region of a former run.


@pytest.fixture
def former(whole, tmp_path) -> Path:
    """A checkpoint, to be changed."""
    return Path(shutil.copytree(whole.folder / "checkpoints/last", tmp_path / "former"))


def flags_of(former: Path) -> tuple[str, ...]:
    policy = former / "pretrained_model"
    offline = ("--env.type=null", "--online.steps=0", "--base_episodes=0", "--steps=1")
    more = (f"--critic.path={former}", "--critic.warmup_steps=0", *offline)
    return (f"--policy.path={policy}", "--policy.adapter=continue", *more)


def test_the_trust_region_of_another_scheme_is_not_gone_on_with(
    tiny, no_conclusion, former, tmp_path, capsys
):
    theirs = "lambda and its KL are of the {} scheme and this run is of {}, which has other units"
    authors, ours = (f"--method.scheme={name}" for name in ("shifted_euler", "posterior"))
    scalars = former / "algorithm/scalars.json"
    scalars.write_text(json.dumps(json.loads(scalars.read_text()) | {"scheme": "posterior"}))
    assert tiny(tmp_path / "run", *flags_of(former), authors) == 2
    said = capsys.readouterr().err
    assert theirs.format("posterior", "shifted_euler") in said
    assert "--method.scheme=posterior goes on with them" in said
    assert str(former / "algorithm/scalars.json") in said
    assert not (tmp_path / "run").exists()
    old = json.loads(scalars.read_text())
    del old["scheme"]  # as checkpoints were before there was more than one
    scalars.write_text(json.dumps(old))
    assert tiny(tmp_path / "run", *flags_of(former), ours) == 2
    assert theirs.format("shifted_euler", "posterior") in capsys.readouterr().err
    assert tiny(tmp_path / "run", *flags_of(former), authors) == 0


def test_a_policy_of_one_step_is_refused_by_its_config_alone(
    tiny, no_conclusion, files, tmp_path, capsys, monkeypatch
):
    for name in ("LeRobotReader", "load_policy"):
        monkeypatch.setattr(vla_inputs, name, None)
    one = Path(shutil.copytree(files.policy, tmp_path / "one"))
    config = json.loads((one / "config.json").read_text()) | {"num_inference_steps": 1}
    (one / "config.json").write_text(json.dumps(config))
    flags = f"--policy.path={one}", "--method.scheme=posterior"
    assert tiny(tmp_path / "run", *flags) == 2
    said = capsys.readouterr()
    assert "the policy's own number of flow steps, 1, is too few" in said.err
    assert "episodes" not in said.out
    assert not (tmp_path / "run").exists()
