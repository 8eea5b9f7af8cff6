"""Where two runs' folders differ: checkpoints, replay, metrics, outcomes; not in what they cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from vla_trqam.data.frame_files import FRAMES_NAME
from vla_trqam.data.replay import Replay

COSTS = {"time", "updates_per_s", "wall_clock"}
"""Names of what differs from run to run and decides nothing."""
CHECKSUMS = "manifest.json"
"""Of files with costs in them."""


def run_differences(one: Path, other: Path) -> list[str]:
    """What differs, a line each; nothing where both ended alike to the bit.

    Args:
        one: the folder of a finished run.
        other: of another one.
    """
    return [
        *_checkpoint(one, other),
        *_replays(one, other),
        *_metrics(one / "metrics.jsonl", other / "metrics.jsonl"),
        *_json("evaluation.json", one, other),
    ]


def _checkpoint(one: Path, other: Path) -> Iterator[str]:
    """Weights, moments, lambda, random streams, position of the last checkpoints."""
    mine, theirs = ((run / "checkpoints" / "last").resolve() for run in (one, other))
    if mine.name != theirs.name:
        yield f"the last checkpoints are {mine.name} and {theirs.name}"
        return
    names = {_name(path, root) for root in (mine, theirs) for path in _data_files(root)}
    for name in sorted(names - {CHECKSUMS}):
        if not ((mine / name).exists() and (theirs / name).exists()):
            yield f"checkpoint {mine.name}: only one has {name}"
        elif name.endswith(".json"):
            yield from _json(name, mine, theirs, places=(one, other))
        else:
            yield from _tensors(mine / name, theirs / name)


def _data_files(root: Path) -> list[Path]:
    return [*root.rglob("*.safetensors"), *root.rglob("*.json")]


def _name(path: Path, root: Path) -> str:
    return str(path.relative_to(root))


def _tensors(one: Path, other: Path) -> Iterator[str]:
    mine, theirs = load_file(one), load_file(other)
    if mine.keys() != theirs.keys():
        yield f"{one.name}: other tensors"
        return
    for key in sorted(mine):
        if not _same(mine[key], theirs[key]):
            yield f"{one.name}: {key}"


def _json(
    name: str, one: Path, other: Path, places: tuple[Path, Path] | None = None
) -> Iterator[str]:
    """A file of both; the runs' own folders may be named in it."""
    texts = [(root / name).read_text() for root in (one, other)]
    for number, place in enumerate(places or ()):
        texts[number] = texts[number].replace(str(place.resolve()), "RUN")
    mine, theirs = (_without_costs(json.loads(text)) for text in texts)
    if mine == theirs:
        return
    if isinstance(mine, dict) and isinstance(theirs, dict):
        entries = sorted(k for k in mine | theirs if mine.get(k) != theirs.get(k))
        yield f"{name} differs in {', '.join(entries)}"
    else:
        yield f"{name} differs"


def _without_costs(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_costs(v) for k, v in value.items() if k not in COSTS}
    return [_without_costs(v) for v in value] if isinstance(value, list) else value


def _metrics(one: Path, other: Path) -> Iterator[str]:
    mine, theirs = (path.read_text().splitlines() for path in (one, other))
    if len(mine) != len(theirs):
        yield f"metrics.jsonl has {len(mine)} and {len(theirs)} lines"
        return
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True), 1):
        if _without_costs(json.loads(a)) != _without_costs(json.loads(b)):
            yield f"metrics.jsonl: line {number}"
            return


def _replays(one: Path, other: Path) -> Iterator[str]:
    mine, theirs = (_arrays(run / "replay") for run in (one, other))
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs or not _same(mine[name], theirs[name]):
            yield f"replay: {name}"


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Everything that counts in a replay."""
    replay = Replay.open(path)
    episodes = replay.episodes()
    found = {
        "observations": replay.observations,
        "actions": replay.actions,
        "rewards": replay.rewards,
        **{name: getattr(episodes, name) for name in vars(episodes)},
    }
    found |= {f"column {name}": replay.column(name) for name in replay.columns}
    if (path / FRAMES_NAME).exists():
        found |= {f"images {name}": replay.images(name) for name in replay.cameras}
        found["tasks"] = np.array(replay.task_of_episodes())
        found["frames"] = replay.frame_index.rows_of_frames()
    return found


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """To the bit: a NaN is itself."""
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()
