"""What an HDF5 file of a stranger can make a reader do, and does not make ours do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from vla_trqam.data.sources.robomimic import safety as hdf5_safety
from vla_trqam.data.sources.robomimic.hdf5 import RobomimicFile, read_robomimic
from vla_trqam.data.sources.robomimic.safety import Allowance, attribute, child
from vla_trqam.errors import UserError

from .robomimic_files import write_ph

Edit = Callable[[h5py.File], Any]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_ph(tmp_path / "demos.hdf5")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """Another file on the machine, with arrays that would fit."""
    return write_ph(tmp_path / "secret.hdf5")


def edited(path: Path, edit: Edit) -> Path:
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        read_robomimic(path, **settings)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def instead(name: str, value: Any) -> Edit:
    def edit(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return edit


# Other files.

PLACES = [
    "data",
    "data/demo_0",
    "data/demo_0/actions",
    "data/demo_0/obs",
    "data/demo_0/obs/object",
    "data/demo_0/next_obs",
    "mask",
    "mask/train",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_link_to_another_file_is_not_followed(place: str, file: Path, secret: Path) -> None:
    edited(file, instead(place, h5py.ExternalLink(str(secret), place)))
    with h5py.File(file) as opened:
        assert opened[place].file.filename == str(secret), "the input does not bite"
    name = place.rpartition("/")[2]
    assert f"'{name}' is a link to another file" in refusal(file)


def test_a_link_to_a_file_that_does_not_exist_is_none_of_ours_either(file: Path) -> None:
    edited(file, instead("data/demo_0/obs/object", h5py.ExternalLink("gone.hdf5", "x")))
    assert "'object' is a link to another file" in refusal(file)


def test_a_link_over_a_link_to_another_file_is_not_followed(file: Path, secret: Path) -> None:
    def edit(opened: h5py.File) -> None:
        obs = opened["data/demo_0/obs"]
        del obs["object"]
        obs["x"] = h5py.ExternalLink(str(secret), "data/demo_0/obs")
        obs["object"] = h5py.SoftLink("x/object")

    edited(file, edit)
    assert "'object' is a link to 'x/object', which is not within its group" in refusal(file)


def test_an_array_stored_in_another_file_is_not_read(file: Path, tmp_path: Path) -> None:
    (tmp_path / "passwords").write_bytes(bytes(8 * 70))

    def edit(opened: h5py.File) -> None:
        demo = opened["data/demo_0"]
        del demo["actions"]
        external = [(str(tmp_path / "passwords"), 0, 8 * 70)]
        demo.create_dataset("actions", (10, 7), "f8", external=external)

    edited(file, edit)
    assert "demo_0: 'actions' lies in another file" in refusal(file)


def test_a_virtual_array_is_not_read(file: Path, secret: Path) -> None:
    def edit(opened: h5py.File) -> None:
        demo = opened["data/demo_0"]
        del demo["actions"]
        layout = h5py.VirtualLayout((10, 7), "f8")
        layout[:] = h5py.VirtualSource(str(secret), "data/demo_0/actions", (10, 7))
        demo.create_virtual_dataset("actions", layout)

    edited(file, edit)
    with h5py.File(file) as opened:
        assert opened["data/demo_0/actions"][:].any(), "the input does not bite"
    assert "demo_0: 'actions' lies in another file" in refusal(file)


# Elsewhere in the same file.


@pytest.mark.parametrize(
    "target", ["/data/demo_1/obs/object", "../obs", "gone", "loop", "", "/", "robot0_eef_pos/x"]
)
def test_a_link_out_of_its_group_is_not_followed(target: str, file: Path) -> None:
    place = "data/demo_0/obs/object"
    edited(file, instead(place, h5py.SoftLink(target or ".")))
    edited(file, lambda opened: opened["data/demo_0/obs"].update(loop=h5py.SoftLink("loop")))
    assert "'object' is a link to" in refusal(file)


def test_a_link_within_its_group_is_followed(file: Path) -> None:
    expected = values(read_robomimic(file))

    def edit(opened: h5py.File) -> None:
        obs = opened["data/demo_0/obs"]
        obs.move("object", "poses/of_objects")
        obs["object"] = h5py.SoftLink("poses/of_objects")

    edited(file, edit)
    assert np.array_equal(values(read_robomimic(file)), expected)


def values(file: RobomimicFile) -> np.ndarray:
    return np.concatenate([demo.observations for demo in file.demos])


# Sizes.


def declared(name: str, shape: tuple[int, ...], **settings: Any) -> Edit:
    """An array of that shape of which nothing is stored."""

    def edit(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, shape, "f8", **settings)

    return edit


@pytest.mark.parametrize(
    "settings", [{"chunks": (1000, 7)}, {"chunks": (1000, 7), "shuffle": True}]
)
def test_a_terabyte_that_a_small_file_declares_is_not_allocated(
    settings: dict[str, Any], file: Path
) -> None:
    edited(file, declared("data/demo_0/actions", (2 * 10**12, 7), **settings))
    assert file.stat().st_size < 1_000_000
    assert "'actions' is declared as 1.12e+08 MB, and 0 MB of it are stored" in refusal(file)


def test_what_is_compressed_beyond_reason_is_not_read(file: Path) -> None:
    def edit(opened: h5py.File) -> None:
        demo = opened["data/demo_0"]
        del demo["actions"]
        zeros = np.zeros((40_000, 7))
        demo.create_dataset("actions", data=zeros, compression=9, chunks=zeros.shape)

    edited(file, edit)
    assert "'actions' is declared as 2.24 MB" in refusal(file)


def test_a_chunk_larger_than_its_array_counts(file: Path) -> None:
    name = "data/demo_0/actions"
    edited(file, declared(name, (10, 7), chunks=(10**7, 7), maxshape=(None, 7)))
    assert "'actions' is declared as 560 MB" in refusal(file)


def test_many_demos_cannot_share_one_array(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_safety, "HARMLESS_IN_ALL", 0)

    def edit(opened: h5py.File) -> None:
        demo = opened["data/demo_0"]
        for key in ("obs", "next_obs"):
            del demo[key]["object"]
            demo[key].create_dataset("object", (10, 2000), "f8", chunks=(10, 100), fillvalue=1.0)
        for number in range(1, 400):
            opened[f"data/copy_{number}"] = demo

    edited(file, edit)
    shared = ["demo_0", *(f"copy_{number}" for number in range(1, 400))]
    assert "would be read from a file of" in refusal(file, demos=shared)


def test_more_than_the_file_has_is_not_stored(file: Path) -> None:
    with h5py.File(file) as opened:
        allowance = Allowance(file)
        allowance.file_size = 10
        with pytest.raises(UserError, match="says that 560 bytes of it are stored"):
            allowance.take(opened["data/demo_0/actions"], "actions")


@pytest.mark.parametrize(
    "settings",
    [{}, {"compression": "gzip"}, {"compression": "lzf", "shuffle": True}, {"fletcher32": True}],
)
def test_ordinary_storage_is_read(settings: dict[str, Any], file: Path) -> None:
    expected = read_robomimic(file).demos[0].actions

    def edit(opened: h5py.File) -> None:
        demo = opened["data/demo_0"]
        stored = demo["actions"][:]
        del demo["actions"]
        demo.create_dataset("actions", data=stored, **settings)

    edited(file, edit)
    assert np.array_equal(read_robomimic(file).demos[0].actions, expected)


# Plugins and types.

BLOSC = 32001


def test_no_plugin_is_loaded_for_a_filter(file: Path) -> None:
    def edit(opened: h5py.File) -> None:
        demo = opened["data/demo_0"]
        del demo["actions"]
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((10, 7))
        settings.set_filter(BLOSC, h5py.h5z.FLAG_OPTIONAL, (5,))
        space = h5py.h5s.create_simple((10, 7))
        h5py.h5d.create(demo.id, b"actions", h5py.h5t.IEEE_F64LE, space, settings)

    edited(file, edit)
    assert "'actions' needs filter 32001 of HDF5, and no plugin is loaded" in refusal(file)


@pytest.mark.parametrize(
    "dtype", [h5py.vlen_dtype("f8"), h5py.ref_dtype, h5py.string_dtype(), np.dtype("V8")]
)
def test_an_array_holds_numbers(dtype: Any, file: Path) -> None:
    def edit(opened: h5py.File) -> None:
        demo = opened["data/demo_0"]
        del demo["actions"]
        demo.create_dataset("actions", (10, 7), dtype)

    edited(file, edit)
    assert "it must hold numbers on 2 axes" in refusal(file)


# Attributes and lists of names.


def test_a_text_of_megabytes_is_no_attribute(file: Path) -> None:
    text = json.dumps({"x": "y" * 10_000_001})
    edited(file, lambda opened: opened["data"].attrs.update(env_args=text))
    assert "the attribute 'env_args' is longer than 10 MB" in refusal(file)


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("data", "env_args", np.zeros((3, 3))),
        ("data", "env_args", ["a", "b"]),
        ("data/demo_0", "num_samples", np.zeros(10)),
    ],
)
def test_an_attribute_is_one_number_or_text(place: str, name: str, value: Any, file: Path) -> None:
    edited(file, lambda opened: opened[place].attrs.update({name: value}))
    assert f"the attribute '{name}' is" in refusal(file)
    assert "it must be one number or text" in refusal(file)


def test_a_missing_attribute_is_none(file: Path) -> None:
    with h5py.File(file) as opened:
        assert attribute(opened["data"], "gone", "here") is None
        assert child(opened["data"], "gone", "here") is None


def test_env_args_nested_without_end_are_refused(file: Path) -> None:
    text = "[" * 100_000 + "]" * 100_000
    edited(file, lambda opened: opened["data"].attrs.update(env_args=text))
    assert "'env_args' is not JSON" in refusal(file)


def test_names_of_demos_are_as_short_as_names(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_safety, "LARGEST_TEXT", 3000)
    names = np.array(["d" * 2000] * 2, dtype="S")
    edited(file, instead("mask/train", names))
    assert "mask/train has more than 0.003 MB of demo names" in refusal(file)


def test_a_mask_that_is_an_array_is_refused(file: Path) -> None:
    edited(file, instead("mask", np.zeros(3)))
    assert "'mask' is not a group of filter keys" in refusal(file)
