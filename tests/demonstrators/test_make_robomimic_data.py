"""The recipe, and the file that it packed with the project."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from vla_trqam.recipes import make_robomimic_data as recipe

import vla_trqam.data

PACKED = Path(vla_trqam.data.__file__).parent / "lift_mixed.hdf5"


def run(output: Path, *more: str) -> int:
    flags = ("--task=lift", "--episodes=2", "--operators=better", "--workers=0")
    return recipe.main([*flags, f"--output={output}", *more])


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--colour=red", "unrecognized arguments: --colour=red"),
        ("--task=stack", "task: 'stack' has no demonstrator; choose one of lift, can, square"),
        ("--operators=expert", "operators: 'expert' is not known"),
        ("--episodes=0", "episodes is 0; it must be at least 1"),
        ("--episodes=many", "invalid int value: 'many'"),
        ("--workers=-1", "workers is -1; it must be at least 0"),
        ("--seed=-1", "seed is -1; it must be at least 0"),
        ("--next_obs=maybe", "'maybe' is neither true nor false"),
        ("--states=some", "invalid choice: 'some'"),
    ],
)
def test_a_bad_flag_is_one_sentence_and_a_non_zero_exit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, sentence: str
) -> None:
    assert run(tmp_path / "d.hdf5", flag) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "d.hdf5"
    output.write_bytes(b"precious")
    assert run(output) == 2
    assert "exists already" in capsys.readouterr().err
    assert output.read_bytes() == b"precious"


def test_ctrl_c_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(recipe, "collect", interrupted)
    assert run(tmp_path / "d.hdf5") == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def contents(path: Path) -> dict[str, object]:
    found: dict[str, object] = {}

    def visit(name: str, node: h5py.Group | h5py.Dataset) -> None:
        found[name] = sorted((k, str(v)) for k, v in node.attrs.items() if k != "command")
        if isinstance(node, h5py.Dataset):
            found[name] = node[()].tolist()

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


@pytest.mark.long
def test_the_file_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    here, workers = tmp_path / "here.hdf5", tmp_path / "workers.hdf5"
    assert run(here) == 0
    assert run(workers, "--workers=2") == 0
    assert contents(here) == contents(workers)
    assert len(contents(here)["mask/train"]) == 2  # type: ignore[arg-type]


# The packed file, as the documentation describes it.


@pytest.fixture(scope="module")
def packed() -> Iterator[h5py.File]:
    with h5py.File(PACKED) as file:
        yield file


def test_the_packed_file_is_small() -> None:
    assert PACKED.stat().st_size < 3_000_000


def test_the_packed_file_says_which_command_makes_it(packed: h5py.File) -> None:
    assert packed["data"].attrs["command"] == (
        "python recipes/make_robomimic_data.py --task=lift --episodes=200 --seed=0 "
        "--output=lift_mixed.hdf5 --operators=mixed --states=initial --next_obs=false "
        "--model_file=false"
    )


def test_the_packed_file_has_six_operators_and_four_successes_in_five(packed: h5py.File) -> None:
    demos = list(packed["data"].values())
    operators = Counter(demo.attrs["operator"] for demo in demos)
    assert sorted(operators.values()) == [33, 33, 33, 33, 34, 34]
    assert len(demos) == 200
    assert sum(demo.attrs["success"] for demo in demos) == 158
    assert len(packed["mask/successful"]) == 158
    assert len(packed["mask/failed"]) == 42


def test_packed_episodes_end_at_success_or_at_the_cap(packed: h5py.File) -> None:
    for demo in packed["data"].values():
        rewards = demo["rewards"][()]
        assert rewards[:-1].sum() == 0.0
        assert rewards[-1] == float(demo.attrs["success"])
        assert demo.attrs["success"] or len(rewards) == 150
    lengths = [demo.attrs["num_samples"] for demo in packed["data"].values()]
    assert (min(lengths), max(lengths), sum(lengths)) == (29, 150, 15175)


def test_packed_actions_and_observations_are_sound(packed: h5py.File) -> None:
    widths = {"object": 10, "robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}
    for demo in packed["data"].values():
        assert np.abs(demo["actions"][()]).max() <= 1.0
        assert {key: values.shape[1] for key, values in demo["obs"].items()} == widths
        assert all(np.isfinite(values[()]).all() for values in demo["obs"].values())
        assert demo["states"].shape == (1, 32)


def test_packed_masks_split_the_file_and_parameters_are_json(packed: h5py.File) -> None:
    names = {
        key: {n.decode() for n in packed[f"mask/{key}"][()]}
        for key in ("train", "valid", "better", "okay", "worse")
    }
    everything = set(packed["data"])
    assert names["train"] | names["valid"] == everything
    assert not names["train"] & names["valid"]
    assert names["better"] | names["okay"] | names["worse"] == everything
    parameters = json.loads(packed["data/demo_0"].attrs["operator_parameters"])
    assert parameters["name"] == "better_operator_1"
