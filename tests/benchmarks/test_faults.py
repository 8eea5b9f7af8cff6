"""The harness of faults: it sees every difference, and its faults befall the chosen moment."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import faults
import numpy as np
import pytest
from failing import hook
from run_results import run_difference
from safetensors.numpy import load_file, save_file

from vla_trqam.data.episode import Episode
from vla_trqam.data.replay import Replay

WRITES = """
import sys
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir()
for area in ("replay", "checkpoints"):
    (folder / area).mkdir()
    for number in range(3):
        (folder / area / f"{number}.txt").write_text("x")
(folder / "last").symlink_to("replay")
(folder / "replay/0.txt").read_text()
"""


def write_run(folder: Path) -> None:
    checkpoint = folder / "checkpoints" / "000002"
    (checkpoint / "algorithm").mkdir(parents=True)
    (checkpoint / "training_state").mkdir()
    save_file({"w": np.arange(3, dtype=np.float32)}, checkpoint / "algorithm/networks.safetensors")
    (checkpoint / "algorithm/scalars.json").write_text(json.dumps({"lam": 3.0}))
    position = {"step": 2, "wall_clock": {"offline": np.random.default_rng().uniform()}}
    (checkpoint / "training_state/position.json").write_text(json.dumps(position))
    (folder / "checkpoints/last").symlink_to("000002")
    lines = [{"step": n, "time": 0.1 * n, "td_loss": 1.0 / n} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "evaluation.json").write_text(json.dumps({"tuned_success": [True]}))
    replay = Replay.create(folder / "replay", observation_dim=2, action_dim=1, capacity=9)
    rewards = np.array([0.0, 0.0, 1.0])
    episode = Episode(np.ones((4, 2)), np.ones((3, 1)), rewards, True, False, True)
    replay.add(episode, source="online")
    replay.close()


def change_weight(folder: Path) -> None:
    path = folder / "checkpoints/000002/algorithm/networks.safetensors"
    weights = load_file(path)["w"].copy()
    weights[1] = np.nextafter(weights[1], np.float32(2.0))
    save_file({"w": weights}, path)


def change_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def change_reward(folder: Path) -> None:
    rewards = np.load(folder / "replay/rewards.npy")
    rewards[1] = 1e-30
    np.save(folder / "replay/rewards.npy", rewards)


def earlier_checkpoint(folder: Path) -> None:
    (folder / "checkpoints/000002").rename(folder / "checkpoints/000001")
    (folder / "checkpoints/last").unlink()
    (folder / "checkpoints/last").symlink_to("000001")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a weight's last bit": (change_weight, "networks.safetensors: w"),
    "lambda": (
        change_text("checkpoints/000002/algorithm/scalars.json", "3.0", "3.0000001"),
        "scalars.json",
    ),
    "a metric": (change_text("metrics.jsonl", "0.5", "0.25"), "metrics.jsonl: line 2"),
    "a line more": (change_text("metrics.jsonl", "}\n", "}\n{}\n"), "4 and 2 lines"),
    "an outcome": (change_text("evaluation.json", "true", "false"), "evaluation.json"),
    "a reward": (change_reward, "replay: rewards"),
    "a file less": (
        lambda folder: (folder / "checkpoints/000002/algorithm/scalars.json").unlink(),
        "only one has algorithm/scalars.json",
    ),
    "another checkpoint": (earlier_checkpoint, "000001 and 000002"),
}


def test_runs_that_differ_in_what_they_cost_alone_are_equal(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_run(tmp_path / name)
    change_text("metrics.jsonl", '"time": 0.1', '"time": 0.7')(tmp_path / "one")
    assert run_difference.run_differences(tmp_path / "one", tmp_path / "other") == []


@pytest.mark.parametrize("change", CHANGES)
def test_every_difference_is_seen(tmp_path: Path, change: str) -> None:
    write_run(tmp_path / "other")
    shutil.copytree(tmp_path / "other", tmp_path / "one", symlinks=True)
    alter, words = CHANGES[change]
    alter(tmp_path / "one")
    found = run_difference.run_differences(tmp_path / "one", tmp_path / "other")
    assert len(found) == 1
    assert words in found[0]


def hooked(tmp_path: Path, **fault: object) -> subprocess.CompletedProcess[str]:
    program, folder = tmp_path / "writes.py", tmp_path / "run"
    program.write_text(WRITES)
    described = json.dumps({"folder": str(folder), **fault})
    command = [sys.executable, hook.__file__, described, str(program), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def written(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run").rglob("*.txt"))


def test_operations_that_write_are_counted_by_area(tmp_path: Path) -> None:
    done = hooked(tmp_path, counts=str(tmp_path / "counts.json"))
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    # A folder and three files each; the run's own folder and the link belong to neither.
    assert (counts["replay"], counts["checkpoints"]) == (4, 4)
    assert counts["anywhere"] >= 10


def test_a_kill_comes_before_the_chosen_operation(tmp_path: Path) -> None:
    done = hooked(tmp_path, area="checkpoints", act="kill", at=3)
    assert done.returncode == -signal.SIGKILL
    assert written(tmp_path) == ["0.txt", "0.txt", "1.txt", "2.txt"]


def test_a_full_disk_stays_full(tmp_path: Path) -> None:
    done = hooked(tmp_path, area="replay", act="full", at=2)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert written(tmp_path) == []


def test_every_fault_is_met_on_both_kinds_of_run_and_moments_are_the_seeds() -> None:
    todo = faults.plans(50, seed=0)
    assert {(p.fault, p.kind) for p in todo} == {
        (fault, kind) for fault in faults.FAULTS for kind in faults.KINDS
    }
    assert [p.moment for p in todo] == [p.moment for p in faults.plans(50, seed=0)]
    assert [p.moment for p in todo] != [p.moment for p in faults.plans(50, seed=1)]


def test_an_outcome_with_a_problem_is_not_counted_as_equal() -> None:
    plan, other = faults.plans(1, seed=0)[0], faults.plans(2, seed=0)[1]
    good = faults.Outcome(plan, "line 3", "SIGKILL", 1, ())
    bad = faults.Outcome(other, "line 4", "SIGKILL", 1, ("metrics.jsonl: line 2",))
    rows = faults.table([good, bad])
    assert f"| {plan.fault} | 1 {plan.kind} | 1 | 1 |" in rows
    assert f"| {other.fault} | 1 {other.kind} | 1 | 0 |" in rows


@pytest.mark.long
def test_a_run_killed_inside_its_writes_ends_as_an_undisturbed_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    todo = [
        faults.Plan(number, "state", fault, moment)
        for number, (fault, moment) in enumerate(
            {
                "killed inside a checkpoint's write": 0.6,
                "killed inside the replay's write": 0.98,
                "disk full": 0.8,
            }.items()
        )
    ]
    outcomes = faults.run_all(todo, tmp_path, jobs=2)
    assert [o.problems for o in outcomes] == [(), (), ()]
    assert all(o.resumes for o in outcomes)
