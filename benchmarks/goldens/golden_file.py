"""The format of golden files (docs/golden.md): reading, and saying what is missing."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from vla_trqam.errors import UserError

# Settings of the recorded runs under which their update is the one that is replayed here.
REPLAYED_SETTINGS: dict[str, Any] = {
    "action_chunking": True,
    "best_of_n": 1,
    "bc_only": False,
    "fql_alpha": 0.0,
    "residual": False,
    "separate": False,
    "target_actor": True,
    "target_guidance": True,
    "use_target_grad": True,
}
AGENTS = ("trqam", "qam", "fql", "ifql", "dsrl", "cgql", "cgql_l")


class GoldenFile:
    """A golden file's arrays and settings; asking for what it does not hold is the user's error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrays = _read_arrays(path)
        self._asked: set[str] = set()
        try:
            self._config = json.loads(bytes(self["config.json"]).decode())
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise UserError(f"{path}: config.json is not JSON in UTF-8") from None
        if not isinstance(self._config, dict):
            raise UserError(f"{path}: config.json is not an object of settings")
        self.agent = self.setting("agent_name")
        if self.agent == "cgql" and self.setting("mode") != "simple":
            self.agent = "cgql_l"
        if self.agent not in AGENTS:
            raise UserError(f"{path} records {self.agent!r}; only {', '.join(AGENTS)} are replayed")
        fixed = REPLAYED_SETTINGS | ({} if self.agent == "qam" else {"edit_scale": 0.0})
        for name, value in fixed.items():
            if self._config.get(name, value) != value:
                raise UserError(f"{path}: {name} is {self._config[name]}; only {value} is replayed")

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._arrays:
            raise UserError(f"{self.path} has no entry {key}; a golden file holds it")
        self._asked.add(key)
        return self._arrays[key]

    def setting(self, name: str) -> Any:
        """One entry of the file's config.json."""
        if name not in self._config:
            raise UserError(f"{self.path}: config.json has no {name}; a golden file holds it")
        return self._config[name]

    def refuse(self, reason: str) -> NoReturn:
        """Says what is wrong with the file.

        Raises:
            UserError: always.
        """
        raise UserError(f"{self.path}: {reason}")

    @property
    def edits(self) -> bool:
        """Whether it is QAM's with an edit behind the flow: QAM-E."""
        return self.agent == "qam" and self._config.get("edit_scale", 0.0) != 0.0

    def has_setting(self, name: str) -> bool:
        """Whether the file's config.json has it."""
        return name in self._config

    def tensor(self, key: str, shape: Sequence[int]) -> Tensor:
        """An array in float32, in a shape of as many numbers."""
        array = self[key]
        if array.size != np.prod(shape, dtype=int):
            raise UserError(
                f"{self.path}: {key} has shape {array.shape}; config.json and the batch say "
                f"{tuple(shape)}"
            )
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).reshape(tuple(shape))

    def keys(self, prefix: str) -> list[str]:
        """The sorted keys that begin so."""
        return sorted(key for key in self._arrays if key.startswith(prefix))

    def unasked_groups(self) -> list[str]:
        """What the file holds and nothing looked at, without the update's number."""
        unasked = self._arrays.keys() - self._asked
        return sorted({"/".join(key.split("/")[1:3]) or key for key in unasked})

    @property
    def num_updates(self) -> int:
        """How many consecutive updates are recorded, from ``u0`` on."""
        number = 0
        while self.keys(f"u{number}/"):
            number += 1
        if number == 0:
            raise UserError(f"{self.path} holds no updates (no u0/... entries) to compare")
        return number


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the path of a golden npz file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError):
        raise UserError(f"{path} is not a readable npz archive of plain arrays") from None
