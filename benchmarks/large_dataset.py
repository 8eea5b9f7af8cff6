"""Does a run's memory grow with its dataset, and how soon does it start?

    python benchmarks/large_dataset.py --frames 2000 20000 200000 --folder /tmp/large

Makes LeRobotDatasets of so many frames, three cameras each (a few episodes of noise are filmed, and
repeated as further files), and runs ``finetune_pi0.py`` with a tiny policy on each, which keeps no
prefixes and no frames, for a few updates of the critic and of the policy, in a process of its own.
Prints a Markdown table: seconds from the command until all but the pass over the frames is done,
imports among them; seconds of that pass; what the process keeps in memory that is no file's, and
what of this are next actions and the tables of steps and chunks, by their sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CAMERAS, SIDE, FPS = ("top", "left", "right"), 64, 20
EPISODES, LENGTH = 10, 200
STATE, ACTION, CHUNK, EXECUTED = 8, 7, 10, 5
NEXT_ACTIONS = 2
UPDATES = 4
LAST_FINDING, FIRST_UPDATES = "base  ", "critic: "
"""What the run says before the pass, and after it."""


def write_filmed(
    root: Path,
    *,
    cameras: Sequence[str] = CAMERAS,
    side: int = SIDE,
    episodes: int = EPISODES,
    length: int = LENGTH,
    use_videos: bool = True,
) -> None:
    """Episodes of noise by LeRobot's own writer, every second of which succeeds."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    vectors = {"observation.state": STATE, "action": ACTION, "next.reward": 1}
    features: dict[str, dict[str, Any]] = {
        name: {"dtype": "float32", "shape": (size,), "names": None}
        for name, size in vectors.items()
    }
    shape, names = (side, side, 3), ["height", "width", "channels"]
    kind = "video" if use_videos else "image"
    for camera in cameras:
        key = f"observation.images.{camera}"
        features[key] = {"dtype": kind, "shape": shape, "names": names}
    dataset = LeRobotDataset.create(
        "local/large", fps=FPS, root=root, use_videos=use_videos, features=features
    )
    rng = np.random.default_rng(0)
    for episode in range(episodes):
        for step in range(length):
            won = episode % 2 == 0 and step == length - 1
            frame = {
                "observation.state": rng.uniform(-1, 1, STATE).astype(np.float32),
                "action": rng.uniform(-1, 1, ACTION).astype(np.float32),
                "next.reward": np.array([won], np.float32),
                "task": "come near",
            }
            for camera in cameras:
                coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
                frame[f"observation.images.{camera}"] = coarse.repeat(side // 4, 0).repeat(
                    side // 4, 1
                )
            dataset.add_frame(frame)
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()


def repeat(one: Path, root: Path, times: int) -> None:
    """The dataset so many times over, as further files of one dataset."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    shutil.copytree(one / "meta", root / "meta")
    data = pq.read_table(one / "data/chunk-000/file-000.parquet")
    listed = pq.read_table(one / "meta/episodes/chunk-000/file-000.parquet")
    (root / "data/chunk-000").mkdir(parents=True)
    for camera in CAMERAS:
        (root / f"videos/observation.images.{camera}/chunk-000").mkdir(parents=True)
    pages = []
    for number in range(times):
        moved = _plus(_plus(data, "episode_index", number * EPISODES), "index", number * len(data))
        name = f"file-{number:03d}"
        pq.write_table(moved, root / f"data/chunk-000/{name}.parquet")
        page = _plus(listed, "episode_index", number * EPISODES)
        for column in ("dataset_from_index", "dataset_to_index"):
            page = _plus(page, column, number * len(data))
        page = _plus(page, "data/file_index", number)
        for camera in CAMERAS:
            key = f"observation.images.{camera}"
            page = _plus(page, f"videos/{key}/file_index", number)
            film = f"videos/{key}/chunk-000"
            os.link(one / film / "file-000.mp4", root / film / f"{name}.mp4")
        pages.append(page)
    pq.write_table(pa.concat_tables(pages), root / "meta/episodes/chunk-000/file-000.parquet")
    info = json.loads((one / "meta/info.json").read_text())
    info["total_episodes"], info["total_frames"] = times * EPISODES, times * len(data)
    info["splits"] = {"train": f"0:{times * EPISODES}"}
    (root / "meta/info.json").write_text(json.dumps(info))
    assert pc.max(data["index"]).as_py() == len(data) - 1


def _plus(table: Any, column: str, number: int) -> Any:
    import pyarrow.compute as pc

    place = table.column_names.index(column)
    moved = pc.add(table[column], number).cast(table.schema.field(column).type)
    return table.set_column(place, table.schema.field(column), moved)


def write_policy(folder: Path) -> None:
    """A tiny π0 with random weights that looks through the three cameras."""
    from vla_trqam.adapters.tiny.checkpoints import (
        flow_features,
        tiny_pi0_config,
        unit_stats,
        write_checkpoint,
    )

    features = flow_features(STATE, ACTION, CAMERAS, SIDE)
    sizes = {"max_state_dim": STATE, "max_action_dim": ACTION, "num_inference_steps": 4}
    config = tiny_pi0_config(features, chunk_size=CHUNK, n_action_steps=EXECUTED, **sizes)
    write_checkpoint(config, unit_stats(features), folder)


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        frames: of its dataset.
        start: seconds from the command until the pass over all frames begins.
        whole: seconds of that pass, and of the first updates.
        memory: the most bytes that no file backs, imports and weights among them.
        disk: bytes of the replay, features among them.
    """

    frames: int
    start: float
    whole: float
    memory: int
    disk: int


def measure(policy: Path, dataset: Path, frames: int, run: Path) -> Measured:
    """Runs the recipe in a process of its own and watches it."""
    flags = [
        f"--policy.path={policy}",
        "--dataset.repo_id=local/large",
        f"--dataset.root={dataset}",
        f"--output_dir={run}",
        *("--prefix_cache=none", "--replay.frames=dataset", "--env.type=null"),
        *("--online.steps=0", "--base_episodes=0", "--eval.videos=0", "--evaluate_every=0"),
        *(f"--steps={UPDATES}", f"--critic.warmup_steps={UPDATES}", "--batch_size=8"),
        *(f"--critic.next_actions={NEXT_ACTIONS}", "--log_freq=1", "--save_freq=1000"),
    ]
    command = [sys.executable, "-m", "vla_trqam.recipes.finetune_pi0", *flags]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    begin, peak = time.perf_counter(), [0]
    watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watcher.start()
    assert process.stdout is not None
    times: dict[str, float] = {}
    said = []
    for line in process.stdout:
        said.append(line)
        now = time.perf_counter()
        for mark in (LAST_FINDING, FIRST_UPDATES):
            if mark in line:
                times.setdefault(mark, now)
    if process.wait() != 0:
        raise SystemExit("".join(said[-20:]))
    watcher.join()
    decoded = times[LAST_FINDING]
    header = json.loads((run / "replay/cache.json").read_text())
    assert header["num_frames"] == frames, header["num_frames"]
    blocks = sum(path.stat().st_blocks for path in (run / "replay").iterdir())
    return Measured(frames, decoded - begin, times[FIRST_UPDATES] - decoded, peak[0], 512 * blocks)


def _watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        except OSError:
            return
        if found:
            peak[0] = max(peak[0], 1024 * int(found[1]))
        time.sleep(0.05)


def known_growth(frames: int) -> int:
    """Bytes that grow with the frames by design: next actions, their ages, rows and chunks."""
    chunks = NEXT_ACTIONS * (EXECUTED * ACTION * 4 + 8)
    rows = 4 * (STATE + ACTION + 1) + 8 * 4
    starts = 40
    return frames * (chunks + rows + starts)


def rows_of(found: list[Measured]) -> Iterator[str]:
    """A Markdown table."""
    header = ["frames", "until the pass, s", "pass, s", "ms a frame", "memory, MiB"]
    header += ["that grows by design, MiB", "replay, MiB"]
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    for one in found:
        each = 1000 * one.whole / one.frames
        sizes = [one.memory / 2**20, known_growth(one.frames) / 2**20, one.disk / 2**20]
        yield (
            f"| {one.frames:,} | {one.start:.1f} | {one.whole:.0f} | {each:.1f} | "
            + " | ".join(f"{size:.0f}" for size in sizes)
            + " |"
        )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[2000, 20_000])
    parser.add_argument("--folder", type=Path, required=True, help="new; gets datasets and runs")
    wanted = parser.parse_args()
    size = EPISODES * LENGTH
    if any(frames % size or frames < size for frames in wanted.frames):
        parser.error(f"--frames must be multiples of {size}")
    wanted.folder.mkdir(parents=True)
    write_policy(wanted.folder / "policy")
    write_filmed(wanted.folder / "filmed")
    found = []
    for frames in wanted.frames:
        dataset = wanted.folder / f"dataset_{frames}"
        repeat(wanted.folder / "filmed", dataset, frames // size)
        run = wanted.folder / f"run_{frames}"
        found.append(measure(wanted.folder / "policy", dataset, frames, run))
        print("\n".join(rows_of(found)), flush=True)


if __name__ == "__main__":
    main()
