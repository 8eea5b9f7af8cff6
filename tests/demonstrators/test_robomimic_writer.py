"""Files in robomimic's layout, read back by robomimic's own readers."""

import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from vla_trqam.data.sources.robomimic.writer import Demonstration, RobomimicWriter
from vla_trqam.envs.robomimic.env import LOW_DIM_KEYS, env_meta_for
from vla_trqam.errors import UserError

WIDTHS = (3, 4, 2, 10)
ENV_ARGS = env_meta_for("Lift")


def demonstration(steps: int, seed: int = 0, **more: object) -> Demonstration:
    rng = np.random.default_rng(seed)
    rewards = np.zeros(steps, dtype=np.float32)
    rewards[-1] = 1.0
    return Demonstration(
        observations={
            key: rng.normal(size=(steps + 1, width)).astype(np.float32)
            for key, width in zip(LOW_DIM_KEYS, WIDTHS, strict=True)
        },
        actions=rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
        rewards=rewards,
        states=rng.normal(size=(steps, 32)),
        attributes={"operator": "better_operator_1", "success": True, "seed": 5},
        **more,  # type: ignore[arg-type]
    )


@pytest.fixture
def demos() -> list[Demonstration]:
    return [demonstration(n, seed=n, filter_keys=("train",)) for n in (5, 40, 12)]


@pytest.fixture
def written(tmp_path: Path, demos: list[Demonstration]) -> Path:
    path = tmp_path / "demos.hdf5"
    with RobomimicWriter(path, ENV_ARGS, next_obs=True) as writer:
        for demo in demos:
            writer.append(demo)
        writer.add_to_mask("valid", ["demo_1"])
    return path


def test_robomimic_reads_the_environment_from_the_file(written: Path) -> None:
    from robomimic.utils.file_utils import get_env_metadata_from_dataset

    assert get_env_metadata_from_dataset(str(written)) == ENV_ARGS


def test_robomimic_sequences_are_what_was_written(
    written: Path, demos: list[Demonstration]
) -> None:
    import robomimic.utils.obs_utils as obs_utils
    from robomimic.utils.dataset import SequenceDataset

    obs_utils.initialize_obs_utils_with_obs_specs(
        {"obs": {"low_dim": list(LOW_DIM_KEYS), "rgb": []}}
    )
    dataset = SequenceDataset(
        str(written), LOW_DIM_KEYS, ("actions", "rewards", "dones"), load_next_obs=True
    )
    assert len(dataset) == sum(len(demo.actions) for demo in demos)
    item = dataset[5 + 20]  # step 20 of the second demonstration
    np.testing.assert_array_equal(item["actions"][0], demos[1].actions[20])
    for key in LOW_DIM_KEYS:
        np.testing.assert_array_equal(item["obs"][key][0], demos[1].observations[key][20])
        np.testing.assert_array_equal(item["next_obs"][key][0], demos[1].observations[key][21])
    last = dataset[len(dataset) - 1]
    assert last["rewards"][0] == 1.0
    assert last["dones"][0] == 1


def test_robomimic_filter_keys_select_demonstrations(written: Path) -> None:
    from robomimic.utils.dataset import SequenceDataset

    valid = SequenceDataset(
        str(written), LOW_DIM_KEYS, ("actions",), filter_by_attribute="valid", load_next_obs=False
    )
    assert len(valid) == 40


def test_robomimics_own_dataset_report_accepts_the_file(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["get_dataset_info", "--dataset", str(written)])
    runpy.run_module("robomimic.scripts.get_dataset_info", run_name="__main__")
    report = capsys.readouterr().out
    assert "total transitions: 57" in report
    assert "filter key train with 3 demos" in report


def test_arrays_and_attributes_come_back_as_written(
    written: Path, demos: list[Demonstration]
) -> None:
    with h5py.File(written) as file:
        assert file["data"].attrs["total"] == 57
        for i, demo in enumerate(demos):
            group = file[f"data/demo_{i}"]
            assert group.attrs["num_samples"] == len(demo.actions)
            assert dict(group.attrs).items() >= demo.attributes.items()
            np.testing.assert_array_equal(group["states"], demo.states)
            assert group["obs/object"].dtype == np.float32


def test_a_model_larger_than_an_old_attribute_is_kept(tmp_path: Path) -> None:
    xml = "<mujoco>" + "x" * 200_000 + "</mujoco>"
    path = tmp_path / "demos.hdf5"
    with RobomimicWriter(path, ENV_ARGS) as writer:
        writer.append(demonstration(3, model_file=xml))
    with h5py.File(path) as file:
        assert file["data/demo_0"].attrs["model_file"] == xml


def write_until_ctrl_c(path: Path) -> None:
    with RobomimicWriter(path, ENV_ARGS) as writer:
        writer.append(demonstration(3))
        raise KeyboardInterrupt


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_until_ctrl_c(tmp_path / "demos.hdf5")
    assert list(tmp_path.iterdir()) == []


_WRITE_FOREVER = """
import sys
from pathlib import Path
import numpy as np
from vla_trqam.data.sources.robomimic.writer import Demonstration, RobomimicWriter
demo = Demonstration({"object": np.zeros((101, 10))}, np.zeros((100, 7)), np.zeros(100))
with RobomimicWriter(Path(sys.argv[1]), {}) as writer:
    while True:
        writer.append(demo)
        print("written", flush=True)
"""


def test_a_killed_writer_leaves_no_file_under_the_name_and_can_be_run_again(tmp_path: Path) -> None:
    path = tmp_path / "demos.hdf5"
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITE_FOREVER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(20):
        assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not path.exists()
    with RobomimicWriter(path, ENV_ARGS) as writer:
        writer.append(demonstration(3))
    assert [p.name for p in tmp_path.iterdir()] == ["demos.hdf5"]


def test_the_name_appears_only_when_the_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "demos.hdf5"
    with RobomimicWriter(path, ENV_ARGS) as writer:
        writer.append(demonstration(3))
        assert not path.exists()
    with h5py.File(path) as file:
        assert json.loads(file["data"].attrs["env_args"]) == ENV_ARGS


def test_an_existing_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "demos.hdf5"
    path.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists already"):
        RobomimicWriter(path, ENV_ARGS)
    assert path.read_bytes() == b"precious"


def test_two_writers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "demos.hdf5"
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITE_FOREVER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    try:
        with pytest.raises(UserError, match="another process is writing"):
            RobomimicWriter(path, ENV_ARGS)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": np.full((3, 7), 1.5)}, r"\[-1, 1\]"),
        ({"actions": np.zeros((0, 7))}, "at least one action"),
        ({"rewards": np.zeros(4)}, "rewards"),
        ({"observations": {"object": np.zeros((3, 10))}}, "obs/object"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    demo = demonstration(3)
    parts = {key: getattr(demo, key) for key in ("observations", "actions", "rewards")} | change
    with (
        pytest.raises(ValueError, match=message),
        RobomimicWriter(tmp_path / "d.hdf5", ENV_ARGS) as writer,
    ):
        writer.append(Demonstration(**parts))
