"""Checksums of the files of a folder: what was written is what is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class FileFacts:
    """What a file must be.

    Attributes:
        size: in bytes.
        digest: of its bytes, BLAKE2b with 32 bytes.
    """

    size: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> FileFacts:
        """Those of a file."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32))
        return cls(path.stat().st_size, digest.hexdigest())


def write_manifest(folder: Path) -> None:
    """Writes the facts of every file in the folder into its ``manifest.json``: the last to be."""
    files = {name: asdict(FileFacts.of(folder / name)) for name in _names(folder)}
    (folder / MANIFEST_NAME).write_text(json.dumps({"files": files}, indent=2) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with the first file that is not as the manifest says; None if all are.

    A folder without a manifest is of a version that wrote none, and taken as it is.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        files = {
            n: FileFacts(**facts) for n, facts in json.loads(path.read_text())["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{path} is damaged"
    return next((f"{folder / n} {why}" for n, why in _wrong(folder, files.items())), None)


def _wrong(folder: Path, files: Iterable[tuple[str, FileFacts]]) -> Iterable[tuple[str, str]]:
    for name, facts in files:
        path = folder / name
        if not path.is_file():
            yield name, "is missing"
        elif path.stat().st_size != facts.size:
            yield name, f"has {path.stat().st_size} bytes, not the {facts.size} that were written"
        elif FileFacts.of(path) != facts:
            yield name, "is damaged: its checksum is not that of what was written"


def _names(folder: Path) -> list[str]:
    own = folder / MANIFEST_NAME
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != own)
    return [str(path.relative_to(folder)) for path in paths]
