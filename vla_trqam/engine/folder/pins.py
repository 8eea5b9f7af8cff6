"""What a run is trained on, kept with it: going on with other files would be another run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vla_trqam.engine.folder.manifest import FileFacts
from vla_trqam.engine.folder.run_folder import BASE_NAME
from vla_trqam.errors import UserError, one_line
from vla_trqam.files import written_durably

INPUTS_NAME = "inputs.json"


@dataclass(frozen=True)
class Input:
    """Files that a run learns from.

    Attributes:
        name: "policy", "base", "dataset" and the like.
        asked: what the settings name: a folder, a file or a Hub repository.
        folder: where the files lie; None for a repository that is known by its commit alone.
        files: those that matter, relative to the folder.
        commit: of the repository on the Hub; None for what did not come from there.
    """

    name: str
    asked: str
    folder: Path | None
    files: tuple[str, ...] = ()
    commit: str | None = None


@dataclass(frozen=True)
class PinnedFile:
    """A file as it was when the run began.

    Attributes:
        size: in bytes.
        mtime_ns: when it was written; a file with the same size and time is not read again.
        digest: see :class:`FileFacts`.
    """

    size: int
    mtime_ns: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> PinnedFile:
        """As it is now."""
        facts, status = FileFacts.of(path), path.stat()
        return cls(facts.size, status.st_mtime_ns, facts.digest)

    def is_still(self, path: Path) -> bool:
        """Whether the path holds the same bytes."""
        if not path.is_file():
            return False
        status = path.stat()
        if status.st_size != self.size:
            return False
        return status.st_mtime_ns == self.mtime_ns or FileFacts.of(path).digest == self.digest


@dataclass(frozen=True)
class Pin:
    """A source as it was when the run began; attributes as :class:`Input`'s."""

    asked: str
    folder: str | None
    commit: str | None
    files: dict[str, PinnedFile] = field(default_factory=dict)


def write_pins(output_dir: Path, sources: Iterable[Input]) -> None:
    """Keeps the sources of a new run, with the digest of every file, in its ``inputs.json``."""
    pins = {source.name: asdict(_pin(source)) for source in sources}
    with written_durably(output_dir / INPUTS_NAME) as part:
        part.write_text(json.dumps(pins, indent=2) + "\n")


def _pin(source: Input) -> Pin:
    folder = None if source.folder is None else source.folder.resolve()
    files = {} if folder is None else {n: PinnedFile.of(folder / n) for n in source.files}
    return Pin(source.asked, None if folder is None else str(folder), source.commit, files)


def read_pins(output_dir: Path) -> dict[str, Pin]:
    """The run's, by name; none where an older version kept none.

    Raises:
        UserError: the file is damaged.
    """
    path = output_dir / INPUTS_NAME
    if not path.is_file():
        return {}
    try:
        return {name: _read(values) for name, values in json.loads(path.read_text()).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not say what the run is trained on: {one_line(error)}"
        ) from None


def began_at(pin: Pin, asked: Path, file: str = "") -> Path:
    """Where the files of a run's beginning lie; a link, or what a path is relative to, may move.

    Args:
        pin: of the source.
        asked: what the settings say.
        file: of the source's folder; the folder itself unless given.
    """
    if pin.folder is None or pin.commit is not None:
        return asked
    began = Path(pin.folder) / file
    return asked if asked.expanduser().resolve() == began else began


def _read(values: dict[str, Any]) -> Pin:
    files = {name: PinnedFile(**facts) for name, facts in values.pop("files").items()}
    return Pin(**values, files=files)


def check_pins(output_dir: Path) -> None:
    """Refuses to go on with a run whose files are not those that it was begun with.

    Raises:
        UserError: with the first such file, and what to do.
    """
    if not (output_dir / INPUTS_NAME).is_file():
        print(f"{output_dir} has no {INPUTS_NAME}: what it was begun with cannot be compared")
        return
    has_copy = (output_dir / BASE_NAME).is_dir()
    for name, pin in read_pins(output_dir).items():
        if has_copy and name in ("policy", "base"):
            continue  # it goes on with its own
        if pin.folder is None or (pin.commit is not None and not Path(pin.folder).is_dir()):
            continue  # fetched again, by its commit
        for file, facts in pin.files.items():
            path = Path(pin.folder) / file
            if not facts.is_still(path):
                what = "is not the one" if path.exists() else "is missing, one of those"
                raise UserError(
                    f"{path} ({name}) {what} that the run in {output_dir} was begun with; bring "
                    "that one back, or begin a new run with "
                    f"--policy.path={output_dir}/checkpoints/last/pretrained_model"
                )
