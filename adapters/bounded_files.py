"""Files of strangers: read only if they are as small as such files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vla_trqam.errors import UserError

LARGEST_JSON = 10_000_000
LARGEST_HEADER = 10_000_000
"""Bytes. A config has thousands; the header of a model with 3e9 weights has 1e5."""
LENGTH = 8
"""Bytes in front of a safetensors file that say how long its header is."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file is missing, too large, or holds something else.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise UserError(
                f"{path} has {size / 1e6:.0f} MB, and a file of settings at most "
                f"{LARGEST_JSON / 1e6:.0f}"
            )
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a policy folder holds {path.name}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be a file of settings") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not a JSON object")
    return fields


def check_header(path: Path) -> None:
    """Whether the header that a safetensors file declares can be one.

    Raises:
        UserError: it is longer than the file or than any model's.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            declared = int.from_bytes(file.read(LENGTH), "little")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if size < LENGTH or declared > min(LARGEST_HEADER, size - LENGTH):
        raise UserError(
            f"{path} is not a readable safetensors file: its {size} bytes declare a header of "
            f"{declared}"
        )
