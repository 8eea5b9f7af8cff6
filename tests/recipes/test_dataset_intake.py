"""LeRobotDatasets that users bring, through the recipe: a run that works, or a sentence."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_images import CAMERA, TASK
from vla_runs import Files, files, forgetful_pool, main, without_simulator

from vla_trqam.data.frame_files import CacheHeader
from vla_trqam.data.replay import Replay

__all__ = ["files", "forgetful_pool", "without_simulator"]

pytestmark = pytest.mark.slow
DATA, KEY = "data/chunk-000/file-000.parquet", f"observation.images.{CAMERA}"
OFFLINE = [
    *("--env.type=null", "--base_episodes=0", "--online.steps=0", "--evaluate_every=0"),
    *("--steps=1", "--critic.warmup_steps=1", "--critic.updates_per_step=1"),
]
Edit = Callable[[Path], None]


def declare(**values: Any) -> Edit:
    def edit(root: Path) -> None:
        info = json.loads((root / "meta/info.json").read_text())
        info["features"][KEY].update(values)
        (root / "meta/info.json").write_text(json.dumps(info))

    return edit


def set_column(name: str, values: Callable[[list[Any]], list[Any]]) -> Edit:
    def edit(root: Path) -> None:
        table = pq.read_table(root / DATA)
        number = table.column_names.index(name)
        column = pa.array(values(table.column(name).to_pylist()), table.schema.field(name).type)
        pq.write_table(table.set_column(number, name, column), root / DATA)

    return edit


def two_tasks(root: Path) -> None:
    """Of which the second one is told from each episode's third frame on."""
    tasks = pa.table({"task": ["stop there", TASK], "task_index": [1, 0]})
    pq.write_table(tasks, root / "meta/tasks.parquet")
    frames = pq.read_table(root / DATA).column("frame_index").to_pylist()
    set_column("task_index", lambda _: [int(frame >= 2) for frame in frames])(root)


def costs(root: Path) -> None:
    set_column("next.reward", lambda values: [value - 1 for value in values])(root)


def dense(root: Path) -> None:
    set_column("next.reward", lambda values: [value + 0.25 for value in values])(root)


@pytest.fixture
def brought(files: Files, tmp_path: Path) -> Callable[..., int]:
    """Runs the recipe on an edited copy of the toy dataset."""

    def run(edit: Edit, *flags: str) -> int:
        shutil.copytree(files.dataset, tmp_path / "set")
        edit(tmp_path / "set")
        where = [f"--dataset.root={tmp_path / 'set'}", f"--output_dir={tmp_path / 'run'}"]
        return main(*files.flags(), *OFFLINE, *where, *flags)

    return run


@pytest.mark.parametrize(
    ("edit", "flags", "message"),
    [
        (declare(shape=[48, 48, 3]), [], f"The camera {CAMERA} is declared with 48 x 48 x 3"),
        (dense, [], "frame 0 has the next.reward 0.25, .*: --dataset.reward=success takes them"),
        (
            costs,
            ["--dataset.kind=column", "--env.type=robomimic", "--base_episodes=1"],
            "rollouts have 0 and 1, but a critic learns one reward",
        ),
        (two_tasks, [], "the task changes at episode 1, frame 2, .*--dataset.task_changes=first"),
        (lambda _: None, ["--dataset.episodes=[0,999]"], "names 999, .* the last is 5"),
        (lambda root: (root / DATA).unlink(), [], f"has no file {DATA}"),
    ],
    ids=["size", "dense reward", "costs and rollouts", "task changes", "episodes", "no data"],
)
def test_what_cannot_be_read_is_one_sentence_and_leaves_no_folder(
    brought: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    edit: Edit,
    flags: list[str],
    message: str,
) -> None:
    assert brought(edit, *flags) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


def cached(replay: Replay) -> list[np.ndarray]:
    """What the policy made of each frame."""
    header = CacheHeader.read(replay.path)
    assert header is not None
    paths = [replay.path / f"cache.{name}.npy" for name in header.features]
    return [np.load(path, allow_pickle=False)[: replay.num_frames] for path in paths]


def test_a_task_that_changes_reaches_the_policy_frame_by_frame(
    brought: Callable[..., int], files: Files, tmp_path: Path
) -> None:
    assert brought(two_tasks, "--dataset.task_changes=frame") == 0
    assert main(*files.flags(), *OFFLINE, f"--output_dir={tmp_path / 'plain'}") == 0
    ours, theirs = (Replay.open(tmp_path / name / "replay") for name in ("run", "plain"))
    rows = ours.frame_index.rows_of_frames()
    assert theirs.observation_at(rows)["task"] == [TASK] * len(rows)
    other = np.array(ours.observation_at(rows)["task"]) == "stop there"
    assert 0 < other.sum() < len(rows)
    differs = np.zeros(len(rows), dtype=bool)
    for one, two in zip(cached(ours), cached(theirs), strict=True):
        differs |= (one != two).reshape(len(rows), -1).any(1)
    assert np.array_equal(differs, other)


def test_a_camera_declared_channel_first_trains_alike(
    brought: Callable[..., int], files: Files, tmp_path: Path
) -> None:
    assert brought(declare(shape=[3, 32, 32], names=["channels", "height", "width"])) == 0
    plain = [*files.flags(), *OFFLINE, f"--output_dir={tmp_path / 'plain'}"]
    assert main(*plain) == 0
    ours, theirs = (Replay.open(tmp_path / name / "replay") for name in ("run", "plain"))
    assert ours.cameras == theirs.cameras == {CAMERA: (32, 32, 3)}
    assert np.array_equal(ours.images(CAMERA), theirs.images(CAMERA))
