"""Rows of the table of malformed input: robomimic's HDF5 files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from bad_inputs.place import Command, Place, Row, cut, robomimic

Change = Callable[[h5py.File], object]
DEMO = "data/demo_1"
HUGE = 2**40  # rows: 102 TiB of 28 bytes
ARRAYS = ("actions", "rewards", "obs/object", "next_obs/object")


def _delete(*names: str) -> Change:
    def change(file: h5py.File) -> None:
        for name in names:
            del file[name]

    return change


def _put(name: str, value: Any) -> Change:
    """Another array in the place of one."""

    def change(file: h5py.File) -> None:
        if name in file:
            del file[name]
        file[name] = value

    return change


def _group(name: str) -> Change:
    """A group in the place of an array."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_group(name)

    return change


def _set(name: str, where: Any, value: float) -> Change:
    def change(file: h5py.File) -> None:
        file[name][where] = value

    return change


def _attribute(name: str, attribute: str, value: Any) -> Change:
    def change(file: h5py.File) -> None:
        if value is None:
            del file[name].attrs[attribute]
        else:
            file[name].attrs[attribute] = value

    return change


def _meta(change: Callable[[dict[str, Any]], object]) -> Change:
    def edit(file: h5py.File) -> None:
        meta = json.loads(file["data"].attrs["env_args"])
        change(meta)
        file["data"].attrs["env_args"] = json.dumps(meta)

    return edit


def _kwargs(**values: Any) -> Change:
    return _meta(lambda meta: meta["env_kwargs"].update(values))


def _arm(**values: Any) -> Change:
    def change(meta: dict[str, Any]) -> None:
        body = meta["env_kwargs"]["controller_configs"]["body_parts"]
        body["right"].update(values)

    return _meta(change)


def _old_controller(meta: dict[str, Any]) -> None:
    configs = meta["env_kwargs"]["controller_configs"]
    meta["env_kwargs"]["controller_configs"] = configs["body_parts"]["right"]


def _no_rows(file: h5py.File) -> None:
    for name in ARRAYS:
        _put(f"{DEMO}/{name}", file[f"{DEMO}/{name}"][:0])(file)
    file[DEMO].attrs["num_samples"] = 0


def _no_success(file: h5py.File) -> None:
    for demo in file["data"].values():
        demo["rewards"][:] = 0


def _declared(name: str, row: tuple[int, ...]) -> Change:
    """An array that says it has 2^40 rows, of which none is stored."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, (HUGE, *row), np.float32, chunks=(1024, *row))

    return change


def _declared_demo(file: h5py.File) -> None:
    for name in ARRAYS:
        row = file[f"{DEMO}/{name}"].shape[1:]
        _declared(f"{DEMO}/{name}", row)(file)
    file[DEMO].attrs["num_samples"] = HUGE


def _external_link(file: h5py.File) -> None:
    del file[DEMO]
    file[DEMO] = h5py.ExternalLink("other.hdf5", DEMO)


def _link_to_nothing(file: h5py.File) -> None:
    del file[f"{DEMO}/actions"]
    file[f"{DEMO}/actions"] = h5py.SoftLink("/data/nowhere")


def _external_storage(file: h5py.File) -> None:
    del file[f"{DEMO}/rewards"]
    file[DEMO].create_dataset("rewards", (6,), np.float32, external=[("secret.bin", 0, 24)])


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((6,), np.float32)
    layout[:] = h5py.VirtualSource("other.hdf5", f"{DEMO}/rewards", (6,))
    del file[f"{DEMO}/rewards"]
    file[DEMO].create_virtual_dataset("rewards", layout)


def _mask(value: Any) -> Change:
    return _put("mask/worse", value)


def _widths(file: h5py.File) -> None:
    for group in ("obs", "next_obs"):
        _put(f"{DEMO}/{group}/object", np.zeros((6, 5), np.float32))(file)


SPOILED: tuple[tuple[str, Change, tuple[str, ...]], ...] = (
    ("no group of data", _delete("data"), ("data",)),
    ("no demo", _delete(*(f"data/demo_{i}" for i in range(4))), ("no demo",)),
    ("an array for a demo", _put(DEMO, np.zeros(3)), ("demo_1",)),
    ("an array for the group of data", _put("data", np.zeros(3)), ("'data'",)),
    ("no description of the environment", _attribute("data", "env_args", None), ("env_args",)),
    (
        "a description that is not JSON",
        _attribute("data", "env_args", "{"),
        ("env_args", "not JSON"),
    ),
    ("a number for a description", _attribute("data", "env_args", 5), ("env_args",)),
    ("a list for a description", _attribute("data", "env_args", "[1]"), ("env_args",)),
    ("no name of the task", _meta(lambda meta: meta.pop("env_name")), ("env_name",)),
    ("a task that is a list", _meta(lambda meta: meta.update(env_name=["Lift"])), ("env_name",)),
    ("another simulator", _meta(lambda meta: meta.update(type=2)), ("type 2", "robosuite")),
    ("another robosuite", _meta(lambda meta: meta.update(env_version="1.4.1")), ("1.4.1",)),
    ("a controller of robosuite 1.4", _meta(_old_controller), ("v1.4.1",)),
    ("a controller that is a number", _kwargs(controller_configs=5), ("controller_configs",)),
    ("an unknown setting of the simulator", _kwargs(launch="rm"), ("launch",)),
    ("a control rate of 0", _kwargs(control_freq=0), ("control_freq", "0")),
    ("a control rate of a million", _kwargs(control_freq=10**6), ("control_freq", "1000000")),
    ("an unknown robot", _kwargs(robots=["R2D2"]), ("robots", "R2D2")),
    ("a thousand robots", _kwargs(robots=["Panda"] * 1000), ("robots",)),
    ("pictures of a million pixels a side", _kwargs(camera_heights=10**6), ("camera_heights",)),
    ("a file in the controller", _arm(interpolation="/etc/passwd"), ("interpolation",)),
    ("a stiffness of 1e300", _arm(kp=1e300), ("kp",)),
    ("no actions", _delete(f"{DEMO}/actions"), ("demo_1", "'actions'")),
    ("no rewards", _delete(f"{DEMO}/rewards"), ("demo_1", "'rewards'")),
    ("no observations", _delete(f"{DEMO}/obs"), ("demo_1", "'obs'")),
    ("an observation is missing", _delete(f"{DEMO}/obs/object"), ("demo_1", "'object'")),
    ("the next observation is missing", _delete(f"{DEMO}/next_obs/object"), ("demo_1", "next_obs")),
    ("a group for actions", _group(f"{DEMO}/actions"), ("demo_1", "'actions'")),
    ("no number of steps", _attribute(DEMO, "num_samples", None), ("demo_1", "num_samples")),
    ("another number of steps", _attribute(DEMO, "num_samples", 7), ("num_samples", "7", "6")),
    ("a list for a number of steps", _attribute(DEMO, "num_samples", [6, 6]), ("num_samples",)),
    ("no step", _no_rows, ("demo_1", "no steps")),
    ("a reward too few", _put(f"{DEMO}/rewards", np.zeros(5)), ("demo_1", "'rewards'", "5", "6")),
    (
        "an observation too few",
        _put(f"{DEMO}/obs/object", np.zeros((5, 3))),
        ("demo_1", "'object'", "5"),
    ),
    (
        "a next observation too many",
        _put(f"{DEMO}/next_obs/object", np.zeros((7, 3))),
        ("demo_1", "next_obs", "'object'", "7"),
    ),
    (
        "next observations of another width",
        _put(f"{DEMO}/next_obs/object", np.zeros((6, 4))),
        ("demo_1", "next_obs", "4"),
    ),
    ("actions of another width", _put(f"{DEMO}/actions", np.zeros((6, 3))), ("demo_1", "3", "2")),
    ("observations of another width", _widths, ("demo_1", "object", "5", "3")),
    ("one number for all actions", _put(f"{DEMO}/actions", 0.5), ("demo_1", "'actions'", "()")),
    ("actions on one axis", _put(f"{DEMO}/actions", np.zeros(6)), ("demo_1", "'actions'", "(6,)")),
    ("words for rewards", _put(f"{DEMO}/rewards", np.array([b"a"] * 6)), ("demo_1", "'rewards'")),
    (
        "complex numbers for actions",
        _put(f"{DEMO}/actions", np.zeros((6, 2), complex)),
        ("demo_1", "'actions'", "complex"),
    ),
    (
        "records for actions",
        _put(f"{DEMO}/actions", np.zeros((6, 2), [("a", "f4"), ("b", "f4")])),
        ("demo_1", "'actions'"),
    ),
    ("actions of no width", _put(f"{DEMO}/actions", np.zeros((6, 0))), ("demo_1", "'actions'")),
    ("one action is NaN", _set(f"{DEMO}/actions", (2, 1), np.nan), ("demo_1", "actions", "step 2")),
    ("one reward is infinite", _set(f"{DEMO}/rewards", 3, np.inf), ("demo_1", "rewards", "step 3")),
    (
        "one observation is NaN",
        _set(f"{DEMO}/obs/object", (4, 0), np.nan),
        ("demo_1", "object", "step 4"),
    ),
    (
        "a number beyond float32",
        _put(f"{DEMO}/obs/object", np.full((6, 3), 1e300)),
        ("demo_1", "object", "step 0"),
    ),
    ("an action beyond 1", _set(f"{DEMO}/actions", (0, 0), 1.5), ("demo_1", "actions", "1.5")),
    ("an action in other units", _set(f"{DEMO}/actions", (0, 0), 1e6), ("demo_1", "actions")),
    ("no demo succeeds", _no_success, ("none of the 4 demos succeeds",)),
    ("a dense reward", _set(f"{DEMO}/rewards", 0, 0.5), ("0.5", "'column'")),
    ("a mask of numbers", _mask(np.arange(3)), ("mask/worse",)),
    ("a mask that is a group", _group("mask/worse"), ("mask/worse",)),
    ("a mask of no text", _mask(np.array([b"\xff\xfe"], dtype="S")), ("mask/worse",)),
    ("a mask on no axis", _mask(np.bytes_(b"demo_0")), ("mask/worse",)),
    ("an array for all masks", _put("mask", np.zeros(2)), ("mask",)),
    ("a demo from another file", _external_link, ("demo_1", "link")),
    ("a link to nothing", _link_to_nothing, ("demo_1", "'actions'")),
    ("rewards stored in another file", _external_storage, ("demo_1", "rewards")),
    ("rewards that are a view of another file", _virtual, ("demo_1", "rewards")),
    ("102 TiB of actions, declared", _declared(f"{DEMO}/actions", (28,)), ("demo_1", "actions")),
    ("a demo of 2^40 steps, declared", _declared_demo, ("demo_1",)),
)
MASKS: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("a filter key without demos", np.array([], dtype="S6"), ("worse", "empty")),
    ("a filter key of a demo that is not there", np.array([b"demo_9"]), ("demo_9",)),
    ("a filter key with a path", np.array([b"../mask"]), ("../mask",)),
)


def _spoiled(change: Change, place: Place) -> Command:
    path = place.hdf5(change)
    (place / "secret.bin").write_bytes(bytes(24))
    with h5py.File(place / "other.hdf5", "w") as other:
        other[f"{DEMO}/rewards"] = np.zeros(6, np.float32)
    return robomimic(place, f"--dataset.path={path}")


def _masked(value: Any, place: Place) -> Command:
    path = place.hdf5(_mask(value))
    return robomimic(place, f"--dataset.path={path}", "--dataset.filter_key=worse")


def _content(change: Callable[[Path], object], place: Place) -> Command:
    path = place.hdf5()
    change(path)
    return robomimic(place, f"--dataset.path={path}")


def _to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILES: Mapping[str, Callable[[Path], object]] = {
    "no such file": Path.unlink,
    "a folder for a file": _to_folder,
    "an empty file": lambda path: cut(path, 0.0),
    "half a file": cut,
    "all but the end of a file": lambda path: cut(path, 0.99),
    "a text file": lambda path: path.write_text("these are no demonstrations\n"),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(1000)),
}


ROWS = (
    *(
        Row("hdf5", wrong, partial(_content, change), ("file.hdf5",))
        for wrong, change in FILES.items()
    ),
    *(
        Row("hdf5", wrong, partial(_spoiled, change), ("<file.hdf5>", *words))
        for wrong, change, words in SPOILED
    ),
    *(
        Row("hdf5", wrong, partial(_masked, value), ("<file.hdf5>", *words))
        for wrong, value, words in MASKS
    ),
)
