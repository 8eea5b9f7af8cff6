"""HDF5 files of strangers: what is read lies in the file itself, and is no more than it can hold.

HDF5 follows links and maps of arrays into other files, loads plugins for filters that it does not
know, and fills what was never written with as many zeros as the file declares.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py

from vla_trqam.errors import UserError

FILTERS = {
    h5py.h5z.FILTER_DEFLATE: "gzip",
    h5py.h5z.FILTER_SHUFFLE: "shuffle",
    h5py.h5z.FILTER_FLETCHER32: "fletcher32",
    h5py.h5z.FILTER_LZF: "lzf",
}
"""Those that come with h5py; any other would be looked for among plugins."""
LARGEST_RATIO = 1000
"""Of an array to what is stored of it; gzip makes zeros 1000 times smaller."""
LARGEST_TOTAL_RATIO = 100
"""Of all that is read to the file: arrays may share what is stored."""
HARMLESS, HARMLESS_IN_ALL = 1_000_000, 100_000_000
"""Bytes that may be declared whatever is stored."""
LARGEST_TEXT = 10_000_000
"""Bytes of an attribute, or of all the names in a list."""


class Allowance:
    """How much may be read from a file, given its size."""

    def __init__(self, path: Path) -> None:
        self.file_size = path.stat().st_size
        self.taken = 0

    def take(self, dataset: h5py.Dataset, where: str) -> None:
        """Whether an array may be read; called before it is.

        Raises:
            UserError: it lies in another file, needs a plugin, or declares more than is stored.
        """
        _check_storage(dataset, where)
        stored, declared = dataset.id.get_storage_size(), _declared_bytes(dataset)
        if stored > self.file_size:
            raise UserError(
                f"{where} says that {stored} bytes of it are stored, and the file has "
                f"{self.file_size}"
            )
        if declared > max(HARMLESS, LARGEST_RATIO * stored):
            raise UserError(
                f"{where} is declared as {_size(declared)}, and {_size(stored)} of it are stored; "
                f"at most {LARGEST_RATIO} times as much is read"
            )
        self.taken += declared
        if self.taken > max(HARMLESS_IN_ALL, LARGEST_TOTAL_RATIO * self.file_size):
            raise UserError(
                f"{where}: with it {_size(self.taken)} would be read from a file of "
                f"{_size(self.file_size)}; at most {LARGEST_TOTAL_RATIO} times as much is read"
            )


def child(group: h5py.Group, name: str, where: str) -> Any:
    """What a group holds under a name, or None.

    Raises:
        UserError: it is a link to another file, or to elsewhere in this one.
    """
    link = _link(group, name)
    if isinstance(link, h5py.HardLink):
        return group[name]
    if isinstance(link, h5py.SoftLink):
        return _within(group, link.path, f"{where}: '{name}'")
    if link is not None:
        raise UserError(f"{where}: '{name}' is a link to another file, and only this one is read")
    return None


def _link(group: h5py.Group, name: str) -> Any:
    """The link of a name, itself; h5py's own way to it looks whether its target exists."""
    links, key = group.id.links, name.encode("utf-8", "surrogateescape")
    if "/" in name or name in ("", ".", "..") or not links.exists(key):
        return None
    kind = links.get_info(key).type
    if kind == h5py.h5l.TYPE_HARD:
        return h5py.HardLink()
    if kind == h5py.h5l.TYPE_SOFT:
        return h5py.SoftLink(links.get_val(key).decode("utf-8", "surrogateescape"))
    return kind


def _within(group: h5py.Group, path: str, where: str) -> Any:
    """The end of a soft link, one step at a time: HDF5 would follow other links on the way."""
    found: Any = group
    for part in path.split("/"):
        link = _link(found, part) if isinstance(found, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            raise UserError(f"{where} is a link to {path!r}, which is not within its group")
        found = found[part]
    return found


def attribute(owner: h5py.Group, name: str, where: str) -> Any:
    """A number or text that a group carries, or None.

    Raises:
        UserError: it is something else, or too long.
    """
    if name not in owner.attrs:
        return None
    stored = owner.attrs.get_id(name)
    is_text = h5py.check_string_dtype(stored.dtype) is not None
    if stored.shape != () or not (is_text or stored.dtype.kind in "fiub"):
        raise UserError(
            f"{where}: the attribute '{name}' is {stored.dtype} of shape {stored.shape}; it must "
            "be one number or text"
        )
    value = owner.attrs[name] if stored.get_storage_size() <= LARGEST_TEXT else None
    if value is None or (is_text and len(value) > LARGEST_TEXT):
        raise UserError(f"{where}: the attribute '{name}' is longer than {_size(LARGEST_TEXT)}")
    return value


def texts(dataset: h5py.Dataset, where: str, allowance: Allowance) -> list[str]:
    """A list of names.

    Raises:
        UserError: it is no such list, or too long.
    """
    if h5py.check_string_dtype(dataset.dtype) is None or dataset.ndim != 1:
        raise UserError(f"{where} is not a list of demo names.")
    allowance.take(dataset, where)
    names, length = [], 0
    try:
        for name in dataset.asstr():  # one by one: many may share one long text
            names.append(name)
            length += len(name)
            if length > LARGEST_TEXT:
                raise UserError(f"{where} has more than {_size(LARGEST_TEXT)} of demo names")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is damaged: it is not text ({error}).") from error
    return names


def _check_storage(dataset: h5py.Dataset, where: str) -> None:
    if dataset.external or dataset.is_virtual:
        raise UserError(f"{where} lies in another file, and only this one is read")
    settings = dataset.id.get_create_plist()
    for number in range(settings.get_nfilters()):
        code = settings.get_filter(number)[0]
        if code not in FILTERS:
            raise UserError(
                f"{where} needs filter {code} of HDF5, and no plugin is loaded; known are "
                f"{', '.join(FILTERS.values())}"
            )


def _declared_bytes(dataset: h5py.Dataset) -> int:
    """What reading allocates: the array, and at least one chunk of it."""
    # Python's numbers: numpy's would wrap around.
    elements = max(math.prod(map(int, shape)) for shape in (dataset.shape, dataset.chunks or ()))
    return elements * dataset.dtype.itemsize


def _size(count: int) -> str:
    return f"{count / 1e6:.3g} MB"
