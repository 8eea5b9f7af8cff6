import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.data.sources.base import fill
from vla_trqam.data.sources.robomimic import hdf5 as robomimic_hdf5
from vla_trqam.data.sources.robomimic.hdf5 import (
    DEFAULT_OBS_KEYS,
    read_robomimic,
    require_env_version,
)
from vla_trqam.errors import UserError

from .robomimic_files import add_demo, env_args, stored_observations, write_file, write_mg, write_ph


@pytest.fixture
def ph(tmp_path: Path) -> Path:
    return write_ph(tmp_path / "ph.hdf5")


@pytest.fixture
def mg(tmp_path: Path) -> Path:
    return write_mg(tmp_path / "mg.hdf5")


def one_demo(
    path: Path, *, num_steps: int, first_success: int | None, next_obs: bool
) -> robomimic_hdf5.RobomimicDemo:
    def add(data: h5py.Group) -> None:
        add_demo(data, 0, num_steps=num_steps, first_success=first_success, next_obs=next_obs)

    return read_robomimic(write_file(path, add), require_success=False).demos[0]


@pytest.mark.parametrize("version", ["1.4.1", "1.5.1"])
def test_demo_holds_what_h5py_reads_up_to_the_first_success(tmp_path: Path, version: str) -> None:
    path = write_ph(tmp_path / "demos.hdf5", version=version)
    read = read_robomimic(path)
    assert (len(read.demos), read.observation_dim, read.action_dim) == (12, 19, 7)
    with h5py.File(path) as file:
        for number, demo in enumerate(read.demos):
            stored = file[f"data/demo_{number}"]
            end = number + 6  # 10 + number steps, success five before the end, that one included
            obs = stored_observations(stored, "obs", DEFAULT_OBS_KEYS)
            final = stored_observations(stored, "next_obs", DEFAULT_OBS_KEYS)[end - 1]
            assert demo.name == f"demo_{number}"
            assert np.array_equal(demo.observations, np.vstack([obs[:end], final]))
            assert np.array_equal(demo.actions, stored["actions"][:end].astype(np.float32))
            assert demo.rewards.tolist() == [0.0] * (end - 1) + [1.0]
            assert demo.success
            assert demo.num_cut == 4


def test_columns_stand_in_the_order_of_the_keys(ph: Path) -> None:
    keys = ("object", "robot0_eef_pos")
    demo = read_robomimic(ph, obs_keys=keys).demos[0]
    with h5py.File(ph) as file:
        expected = stored_observations(file["data/demo_0"], "obs", keys)
    assert np.array_equal(demo.observations, expected[: len(demo.observations)])


@pytest.mark.parametrize(
    ("num_steps", "first_success", "length", "final_row", "num_cut"),
    [
        pytest.param(9, 5, 6, 6, 3, id="cut: the next row is the next state"),
        pytest.param(9, 8, 9, 8, 0, id="success on the last row: it is repeated"),
        pytest.param(9, None, 8, 8, 1, id="failure: the last step has no next state"),
    ],
)
def test_last_state_without_next_obs(
    tmp_path: Path,
    num_steps: int,
    first_success: int | None,
    length: int,
    final_row: int,
    num_cut: int,
) -> None:
    path = tmp_path / "demo.hdf5"
    demo = one_demo(path, num_steps=num_steps, first_success=first_success, next_obs=False)
    with h5py.File(path) as file:
        obs = stored_observations(file["data/demo_0"], "obs", DEFAULT_OBS_KEYS)
    assert (demo.num_steps, demo.num_cut) == (length, num_cut)
    assert np.array_equal(demo.observations[-1], obs[final_row])
    assert np.array_equal(demo.observations[:-1], obs[:length])


def test_machine_generated_failures_are_kept_whole_and_truncated(mg: Path, tmp_path: Path) -> None:
    read = read_robomimic(mg)
    assert [demo.success for demo in read.demos] == [False, True, False, True]
    assert [demo.num_steps for demo in read.demos] == [15, 5, 15, 15]
    assert all(demo.filter_keys == () for demo in read.demos)
    replay = Replay.create(tmp_path / "replay", observation_dim=19, action_dim=7, capacity=100)
    said: list[str] = []
    fill(replay, read, "mg", said.append)
    (line,) = said
    assert "mg: 4 episodes, 2 successful, 50 steps, total reward 2; 10 steps cut" in line
    assert replay.episodes().terminated.tolist() == [False, True, False, True]
    assert replay.episodes().truncated.tolist() == [True, False, True, False]
    assert replay.stats.by_source["mg"].successes == 2
    returns = replay.returns_to_go(0.5, RewardSpec("sparse"))
    assert returns[15:20].tolist() == [0.0625, 0.125, 0.25, 0.5, 1.0]
    assert np.isnan(returns[:15]).all()


def test_filter_key_names_and_select_choose_demos_in_numeric_order(ph: Path) -> None:
    def names(**arguments: Any) -> list[str]:
        return [demo.name for demo in read_robomimic(ph, **arguments).demos]

    assert names() == [f"demo_{i}" for i in range(12)]
    assert names(filter_key="valid") == ["demo_10", "demo_11"]
    assert names(demos=["demo_11", "demo_2"]) == ["demo_2", "demo_11"]
    read = read_robomimic(ph)
    assert [demo.name for demo in read.select(["demo_5", "demo_1"]).demos] == ["demo_5", "demo_1"]
    assert set(read.demos[3].filter_keys) == {"train", "20_percent"}
    with pytest.raises(UserError, match="'demo_99' is not there"):
        read.select(["demo_99"])


def test_versions_are_told_apart_by_the_controller(ph: Path, tmp_path: Path) -> None:
    old = write_ph(tmp_path / "old.hdf5", version="1.4.1")
    assert read_robomimic(ph).version == "v1.5"
    assert read_robomimic(old).version == "v1.4.1"


def test_environment_is_refused_for_the_other_robosuite(
    ph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = read_robomimic(ph)
    old = read_robomimic(write_ph(tmp_path / "old.hdf5", version="1.4.1"))
    require_env_version(new)
    with pytest.raises(UserError, match=r"made for robosuite 1\.4\.1, but robosuite 1\.5"):
        require_env_version(old)
    monkeypatch.setattr(robomimic_hdf5, "installed_version", lambda package: "1.4.1")
    require_env_version(old)
    with pytest.raises(UserError, match=r"made for robosuite 1\.5, but robosuite 1\.4\.1"):
        require_env_version(new)


def test_environment_is_refused_when_the_file_contradicts_itself(ph: Path) -> None:
    with h5py.File(ph, "a") as file:
        mixed = {**env_args("1.4.1"), "env_version": "1.5.1"}
        file["data"].attrs["env_args"] = json.dumps(mixed)
    with pytest.raises(UserError, match=r"says robosuite 1\.5\.1, but its controller.*v1\.4\.1"):
        require_env_version(read_robomimic(ph))


def put(name: str, values: Any) -> Callable[[h5py.File], None]:
    """A change of the file: the array `name` is replaced."""

    def change(file: h5py.File) -> None:
        if name in file:
            del file[name]
        file[name] = values

    return change


def remove(name: str) -> Callable[[h5py.File], None]:
    return lambda file: file.__delitem__(name)


def put_attribute(owner: str, name: str, value: Any) -> Callable[[h5py.File], None]:
    return lambda file: file[owner].attrs.__setitem__(name, value)


def with_value(name: str, row: int, value: float) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        values = file[name][:]
        values[row] = value
        file[name][...] = values

    return change


def without_rewards(file: h5py.File) -> None:
    for demo in file["data"].values():
        demo["rewards"][...] = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("data"), "has no group 'data'"),
        (remove("data/demo_2/obs"), "demo_2 has no group 'obs'.*dataset_states_to_obs"),
        (remove("data/demo_2/actions"), "demo_2 has no array 'actions'"),
        (remove("data/demo_2/rewards"), "demo_2 has no array 'rewards'"),
        (remove("data/demo_2/obs/object"), "demo_2: the key obs/ 'object' is not there.*eef_pos"),
        (remove("data/demo_2/next_obs/object"), "demo_2: the key next_obs/ 'object'"),
        (put("data/demo_2", np.zeros(3)), "no group 'demo_2'"),
        (put("data/demo_2/obs/object", np.zeros((11, 10))), "'object' has 11 rows.*12 actions"),
        (put("data/demo_2/next_obs/object", np.zeros((13, 10))), "next_obs: 'object' has 13 rows"),
        (
            put("data/demo_2/next_obs/object", np.zeros((12, 9))),
            "next_obs has 18 columns.*obs has 19",
        ),
        (put("data/demo_2/rewards", np.zeros(13)), "'rewards' has 13 rows.*12 actions"),
        (put_attribute("data/demo_2", "num_samples", 11), "num_samples is 11.*12 actions"),
        (
            put("data/demo_2/actions", np.zeros((12, 6))),
            "'actions' has 6 columns, but.*demo_0 has 7",
        ),
        (put("data/demo_2/actions", np.zeros(12)), "'actions' is float64 of shape"),
        (put("data/demo_2/actions", np.array([b"up"] * 12)), r"'actions' is \|S2 of shape"),
        (put("data/demo_2/actions", np.zeros((0, 7))), "demo_2 has no steps"),
        (with_value("data/demo_2/actions", 5, 1.5), r"'actions' lies in \[-.*, 1\.5\].*\[-1, 1\]"),
        (with_value("data/demo_2/actions", 5, np.nan), "'actions' is nan at step 5"),
        (with_value("data/demo_2/obs/object", 3, np.inf), "demo_2/obs: 'object' is inf at step 3"),
        (with_value("data/demo_2/rewards", 1, np.nan), "demo_2: 'rewards' is nan at step 1"),
        (
            with_value("data/demo_2/obs/object", 3, 1e8),
            r"demo_2: column \d+ of its observations is 1e\+08 at step 3, where .* median",
        ),
        (without_rewards, "none of the 12 demos succeeds: the largest of the 'rewards' is 0"),
        (lambda file: file["data"].attrs.__delitem__("env_args"), "no attribute 'env_args'"),
        (put_attribute("data", "env_args", "{not json"), "'env_args' is not JSON"),
        (put_attribute("data", "env_args", "[1]"), "'env_args' is not robomimic's dictionary"),
        (put("mask/train", np.zeros(3)), "mask/train is not a list of demo names"),
    ],
)
def test_bad_file_is_refused_naming_file_demo_and_key(
    ph: Path, change: Callable[[h5py.File], None], message: str
) -> None:
    with h5py.File(ph, "a") as file:
        change(file)
    with pytest.raises(UserError, match=message) as caught:
        read_robomimic(ph)
    assert str(ph) in str(caught.value)


def test_differing_observation_widths_are_refused(ph: Path) -> None:
    with h5py.File(ph, "a") as file:
        for group in ("obs", "next_obs"):
            put(f"data/demo_2/{group}/object", np.zeros((12, 14)))(file)
    with pytest.raises(UserError, match="demo_2: 'obs/object' has 14 columns"):
        read_robomimic(ph)


def test_action_within_rounding_of_one_is_accepted(ph: Path) -> None:
    with h5py.File(ph, "a") as file:
        with_value("data/demo_2/actions", 5, 1 + 5e-7)(file)
    assert len(read_robomimic(ph).demos) == 12


def test_failures_alone_are_read_when_success_is_not_required(ph: Path) -> None:
    with h5py.File(ph, "a") as file:
        without_rewards(file)
    assert not any(demo.success for demo in read_robomimic(ph, require_success=False).demos)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filter_key": "best"}, "filter key 'best' is not there; there are: .*train, valid"),
        ({"demos": ["demo_99"]}, "demo 'demo_99' is not there; there are: demo_0, demo_1"),
        ({"demos": []}, "list of demos is empty"),
        ({"demos": ["demo_0"], "filter_key": "train"}, "not both"),
        ({"obs_keys": ()}, "at least one observation key"),
    ],
)
def test_bad_choice_is_refused(ph: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_robomimic(ph, **arguments)


def test_empty_filter_key_is_refused(ph: Path) -> None:
    with h5py.File(ph, "a") as file:
        put("mask/train", np.array([], dtype="S8"))(file)
    with pytest.raises(UserError, match="filter key 'train' is empty"):
        read_robomimic(ph, filter_key="train")


def test_filter_key_of_a_file_without_masks_is_refused(mg: Path) -> None:
    with pytest.raises(UserError, match="filter key 'train' is not there; there are: none"):
        read_robomimic(mg, filter_key="train")


def test_file_without_demos_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "none.hdf5", lambda data: None)
    with pytest.raises(UserError, match="'data' holds no demo"):
        read_robomimic(path)


def test_single_failed_step_without_next_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one failed step without next_obs"):
        one_demo(tmp_path / "one.hdf5", num_steps=1, first_success=None, next_obs=False)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.hdf5 does not exist"):
        read_robomimic(tmp_path / "absent.hdf5")
    with pytest.raises(UserError, match="does not exist or is not a file"):
        read_robomimic(tmp_path)


def test_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.hdf5"
    path.write_text("<html>404</html>")
    with pytest.raises(UserError, match="is not an HDF5 file or is cut short"):
        read_robomimic(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_file_cut_short_is_refused(ph: Path, share: float) -> None:
    os.truncate(ph, int(ph.stat().st_size * share))
    with pytest.raises(UserError, match="is not an HDF5 file or is cut short"):
        read_robomimic(ph)


def test_file_with_a_hole_is_refused(ph: Path) -> None:
    """Overwritten in the middle, as an interrupted download that was resumed wrongly leaves it."""
    size = ph.stat().st_size
    with open(ph, "r+b") as file:
        file.seek(size // 10)
        file.write(b"\xff" * (size // 2))
    with pytest.raises(UserError):
        read_robomimic(ph)


def test_replay_of_other_sizes_or_without_room_is_refused_and_left_empty(
    ph: Path, tmp_path: Path
) -> None:
    read = read_robomimic(ph)  # 138 steps
    other = Replay.create(tmp_path / "other", observation_dim=23, action_dim=7, capacity=500)
    with pytest.raises(UserError, match=r"of \(19, 7\), but the replay .* is for \(23, 7\)"):
        fill(other, read, "ph")
    small = Replay.create(tmp_path / "small", observation_dim=19, action_dim=7, capacity=100)
    with pytest.raises(UserError, match=r"has 138 steps, but the replay .* has room for 100"):
        fill(small, read, "ph")
    assert (other.num_episodes, small.num_episodes) == (0, 0)
