"""evaluate.py on runs of a tiny π0: adapters, whole experts, methods that act beside the policy."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from toy_images import CHUNK, ImageToyPool, image_family
from vla_runs import TINY, files, forgetful_pool, main, without_simulator
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy
from vla_trqam.recipes import evaluate

from vla_trqam.data.sources.lerobot.source import LeRobotConfig, LeRobotReader
from vla_trqam.engine import conclude as showcase
from vla_trqam.jobs import evaluation, kinds

__all__ = ["files", "forgetful_pool", "without_simulator"]  # fixtures

pytestmark = pytest.mark.slow

METHODS = {
    "lora": [],
    "full": ["--peft.method=full"],
    "merged": ["--policy.merged=true"],
    "fewer_steps": ["--policy.tuned_flow_steps=2"],
    "first_actions": ["--policy.path={long}", f"--policy.n_action_steps={CHUNK}"],
    "fql": ["--method.type=fql", "--method.hidden_dims=[16]"],
    "bfloat16": [],
    "dsrl": ["--method.type=dsrl", "--method.hidden_dims=[16]", "--peft.method=full"],
}
STATES = 8


@dataclass
class Finished:
    """A run that is over.

    Attributes:
        folder: the run's.
        base: the actions of the base's episodes in the final evaluation.
        tuned: of the tuned policy's.
    """

    folder: Path
    base: list[np.ndarray]
    tuned: list[np.ndarray]


def launched_in(precision, patch):
    """As ``accelerate launch --mixed_precision`` tells its processes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    patch.setenv("ACCELERATE_MIXED_PRECISION", precision)


def last_actions():
    return [[e.actions for e in episodes] for episodes in ImageToyPool.rounds[-2:]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, files, without_simulator):
    """Finished runs, by name."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    # Chunks of twice as many actions, all of which it would execute.
    long = shutil.copytree(files.policy, root / "long_chunks")
    config = json.loads((long / "config.json").read_text())
    config |= {"chunk_size": 2 * CHUNK, "n_action_steps": 2 * CHUNK}
    (long / "config.json").write_text(json.dumps(config))
    short = ["--steps=2", "--online.steps=0", "--evaluate_every=0", "--critic.warmup_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(showcase, "write_plots", lambda *_, **__: [])
        for name, flags in METHODS.items():
            own = [flag.format(long=long) for flag in flags]
            given = [*files.flags(), *short, *own, f"--eval.episodes={STATES}"]
            launched_in("bf16" if name == "bfloat16" else "no", patch)
            assert main(*given, f"--output_dir={root / name}") == 0
            found[name] = Finished(root / name, *last_actions())
    return found


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(evaluation, "RolloutPool", ImageToyPool)
    for place in (evaluation, kinds):
        monkeypatch.setattr(place, "make_family", image_family)


def compared(folder, *flags):
    assert evaluate.main([*flags, f"--output_dir={folder}", "--videos=0"]) == 0
    return json.loads((folder / "evaluation.json").read_text())


@pytest.mark.parametrize("name", METHODS)
def test_a_runs_last_checkpoint_against_its_base_gives_the_runs_own_evaluation(
    name, runs, tmp_path
):
    run = runs[name]
    expected = json.loads((run.folder / "evaluation.json").read_text())
    found = compared(tmp_path / "out", f"--a={run.folder}")
    assert {key: found.get(key) for key in expected} == expected
    base, tuned = last_actions()
    # Merged weights are the sum of what acted in the run, rounded.
    error = 1e-5 if name == "merged" else 0.0
    for ours, theirs in ((base, run.base), (tuned, run.tuned)):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=error)
    assert any((b[0] != t[0]).any() for b, t in zip(base, tuned, strict=True))


def test_two_methods_play_the_same_states(runs, tmp_path):
    compared(tmp_path / "out", f"--a={runs['fql'].folder}", f"--b={runs['lora'].folder}")
    base, tuned = last_actions()
    np.testing.assert_array_equal(np.concatenate(tuned), np.concatenate(runs["fql"].tuned))
    np.testing.assert_array_equal(np.concatenate(base), np.concatenate(runs["lora"].tuned))


def test_a_policy_of_states_is_refused_where_there_are_pictures(runs, tmp_path, capsys):
    MLPFlowPolicy(MLPFlowConfig(3, 2, 2, hidden_dims=(8,))).save_pretrained(tmp_path / "mlp")
    flags = [
        f"--a={runs['lora'].folder}",
        f"--b={tmp_path / 'mlp'}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    assert evaluate.main(flags) == 2
    assert "error: b acts on states alone, and the simulator shows" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_policies_of_no_run_play_in_a_simulator_of_the_flags(files, tmp_path):
    env = [flag for flag in TINY if flag.startswith("--env.")]
    flags = [f"--a={files.policy}", f"--b={files.policy}", "--episodes=2", "--max_episode_steps=4"]
    found = compared(tmp_path / "out", *flags, *env, "--num_threads=1")
    assert found["base_steps"] == found["tuned_steps"]
    assert found["simulator"]["max_episode_steps"] == 4


def test_a_base_that_is_another_since_is_refused(runs, files, tmp_path, capsys):
    config = files.policy / "config.json"
    text = config.read_text()
    config.write_text(text + "\n")
    try:
        assert (
            evaluate.main([f"--a={runs['full'].folder}", f"--output_dir={tmp_path / 'out'}"]) == 2
        )
    finally:
        config.write_text(text)
    assert f"{config} is not the one that the run in" in capsys.readouterr().err


def test_what_a_plays_becomes_a_dataset_that_a_next_round_reads(runs, tmp_path, capsys):
    flags = [f"--a={runs['lora'].folder}", f"--record={tmp_path / 'round'}"]
    assert evaluate.main([*flags, f"--output_dir={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert f"of which the run's evaluation has 10000 to {10000 + STATES - 1}: what learns" in said
    assert f"give --first_seed={10000 + STATES} or a later one" in said
    flags += ["--first_seed=20000"]
    found = compared(tmp_path / "out", *flags)
    assert (
        f"{STATES} episodes of tuned: the dataset {tmp_path / 'round'}" in capsys.readouterr().out
    )
    _, tuned = last_actions()
    reader = LeRobotReader(LeRobotConfig("local/round", tmp_path / "round"))
    episodes = list(reader.episodes())
    assert [episode.success for episode in episodes] == found["tuned_success"]
    assert [episode.terminated for episode in episodes] == found["tuned_success"]
    played = np.concatenate(tuned).reshape(-1, episodes[0].actions.shape[1])
    np.testing.assert_allclose(
        np.concatenate([episode.actions for episode in episodes]), played, atol=1e-6
    )
    assert all(len(e.images["agentview"]) == e.observed.sum() for e in episodes)
    assert evaluate.main([*flags, f"--output_dir={tmp_path / 'again'}"]) == 2
    assert f"--record={tmp_path / 'round'} exists already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
