"""The packed tiny π0: made by a script that runs, and fitting its own dataset."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from vla_trqam.adapters.loading import load_policy
from vla_trqam.adapters.tiny.lessons import action_chunks
from vla_trqam.recipes import make_tiny_vla

import vla_trqam.data
from vla_trqam.data.sources.base import create_replay, fill
from vla_trqam.data.sources.lerobot.source import LeRobotConfig, LeRobotReader

DATA = Path(vla_trqam.data.__file__).parent
PACKED = DATA / "lift_pi0"


def two_demos(path: Path) -> Path:
    """A success and a failure of the packed demonstrations."""
    with h5py.File(DATA / "lift_mixed.hdf5") as whole, h5py.File(path, "w") as file:
        masks = whole["mask"]
        names = [min(n.decode() for n in masks[key][()]) for key in ("successful", "failed")]
        data = file.create_group("data")
        data.attrs.update(whole["data"].attrs)
        for name in names:
            whole.copy(f"data/{name}", data)
    return path


@pytest.mark.long
@pytest.mark.parametrize("family", ["pi0", "smolvla"])
def test_the_script_makes_a_policy_and_a_dataset_that_go_together(tmp_path: Path, family: str):
    output = tmp_path / "made"
    few = ["--scenes=2", "--pose_steps=2", "--clone_steps=2", "--num_workers=1", "--num_threads=1"]
    demos = f"--demos={two_demos(tmp_path / 'two.hdf5')}"
    assert make_tiny_vla.main([f"--policy={family}", f"--output={output}", demos, *few]) == 0
    with h5py.File(tmp_path / "two.hdf5") as file:
        lengths = sorted(len(demo["actions"]) for demo in file["data"].values())
    reader = LeRobotReader(LeRobotConfig(repo_id="local/made", root=output / "dataset"))
    replay = create_replay(tmp_path / "replay", [reader])
    fill(replay, reader, "dataset")
    assert replay.num_episodes == 2
    # Every fourth step, and the state at which the failure was cut.
    assert replay.num_frames == sum(-(-length // make_tiny_vla.STRIDE) for length in lengths) + 1
    policy = load_policy(output / "policy", lora=None)
    assert policy.chunk_shape[0] == make_tiny_vla.CHUNK
    assert policy.num_flow_steps == make_tiny_vla.FLOW_STEPS
    replay.close()


def test_an_output_that_exists_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert make_tiny_vla.main([f"--output={tmp_path}"]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset=x", "--scenes=3"], "--scenes says nothing with --dataset"),
        (["--cloned_episodes=3"], "--cloned_episodes says nothing without --dataset"),
    ],
)
def test_a_flag_of_the_other_demonstrations_is_refused(tmp_path: Path, capsys, flags, said):
    assert make_tiny_vla.main([f"--output={tmp_path / 'made'}", *flags]) == 2
    assert said in capsys.readouterr().err


def test_action_chunks_repeat_the_last_action():
    actions = np.arange(6, dtype=np.float32).reshape(3, 2)
    chunks = action_chunks(actions, 8)
    assert chunks.shape == (3, 8, 2)
    assert chunks[1].tolist() == [[2, 3]] + [[4, 5]] * 7


def test_the_packed_policy_was_normalised_as_the_packed_dataset_is():
    policy = load_policy(PACKED / "policy", lora=None)
    theirs = json.loads((PACKED / "dataset" / "meta" / "stats.json").read_text())
    assert policy.processors is not None
    statistics = policy.processors.statistics
    for feature in ("observation.state", "action"):
        ours = statistics[feature]
        off = (ours["mean"] - torch.tensor(theirs[feature]["mean"])).abs() / ours["std"]
        assert off.max() < 0.2, feature
