"""What a run's files say, without where they lay on the machine that made them.

``/home/ann/data/lift`` becomes ``<lift>``: a stranger has no such folder, and need not know of Ann.
The files of the run stay as they are.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from vla_trqam.errors import UserError, one_line

# A slash with no word before it: no part of USER/NAME, m/s, ../x or https://.
ABSOLUTE = re.compile(r"file://[^\s'\"]+|(?<![\w.:/<>*~-])(?:~[\w.-]*)?/[^\s'\",;:=\[\]{}()<>|]+")
COMMAND = "command"
# Fields of a policy's config that say where it was read from; nothing is loaded from there.
WHERE_FROM = ("pretrained_path",)


def public_copy(file: Path) -> bytes | None:
    """A text file of a run as it may be pushed; None where it may go as it is.

    Raises:
        UserError: it is damaged.
    """
    readers = {".json": _json, ".jsonl": _json_lines, ".yaml": _yaml}
    if file.suffix not in readers:
        return None
    try:
        text = file.read_text(encoding="utf-8")
        public = readers[file.suffix](text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from None
    return None if public is None else public.encode()


def without_paths(value: Any, name: str = "") -> Any:
    """Settings, records and texts with the last part of each absolute path alone."""
    if isinstance(value, dict):
        return {without_paths(k): without_paths(v, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [without_paths(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if name in WHERE_FROM and _is_path(value):
        return None
    return _command(value) if name == COMMAND else _text(value)


def _json(text: str) -> str | None:
    value = json.loads(text)
    public = without_paths(value)
    return None if public == value else json.dumps(public, indent=2) + "\n"


def _json_lines(text: str) -> str | None:
    if "/" not in text and "~" not in text:
        return None  # numbers, as ever
    lines = text.splitlines()
    public = [_json_line(line) for line in lines]
    return None if public == lines else "\n".join(public) + "\n"


def _json_line(line: str) -> str:
    value = json.loads(line)
    public = without_paths(value)
    return line if public == value else json.dumps(public)


def _yaml(text: str) -> str | None:
    value = yaml.safe_load(text)
    public = without_paths(value)
    return None if public == value else yaml.safe_dump(public)


def _text(value: str) -> str:
    if _is_path(value):
        return _named(value)
    return ABSOLUTE.sub(lambda found: _named(found.group()), value)


def _is_path(value: str) -> bool:
    return re.match(r"/|\.\./|~[\w.-]*/", value) is not None


def _named(path: str) -> str:
    return f"<{Path(path.rstrip('/')).name or 'folder'}>"


def _command(value: str) -> str:
    """A command line; programs and recipes keep a name by which they can be started."""
    try:
        words = shlex.split(value)
    except ValueError:
        return _text(value)
    public = [_word(word) for word in words]
    return value if public == words else shlex.join(public)


def _word(word: str) -> str:
    path = Path(word)
    if _is_path(word) and path.parent.name in ("bin", "Scripts"):
        return path.name
    if _is_path(word) and path.suffix == ".py":
        return f"recipes/{path.name}" if path.parent.name == "recipes" else path.name
    head, equals, value = word.partition("=")
    return f"{_text(head)}={_text(value)}" if equals else _text(word)
