"""What claim 3's script makes of sweeps whose numbers are known."""

import csv
from collections.abc import Callable
from pathlib import Path

import c3_response
import claim_studies
import numpy as np
import pytest
from marked import marked

BUDGETS = (0.1, 0.5, 1.0, 2.0, 4.0)
SEEDS = range(3)


def sweep(folder: Path, **tasks: Callable[[float, int], float]) -> Path:
    """A sweep's folder: success by task, of budget and seed."""
    (folder / "pictures").mkdir(parents=True)
    for name in claim_studies.KEPT:
        (folder / name).write_text("{}")
    with (folder / claim_studies.TABLE).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*c3_response.COLUMNS, "env_steps"])
        for task, success in tasks.items():
            for budget in BUDGETS:
                for seed in SEEDS:
                    found = (success(budget, seed), budget, 0.9 * budget, 7)
                    writer.writerow([task, seed, 0.25, *found])
    return folder


def rising(budget: float, seed: int) -> float:
    return 0.5 + 0.1 * BUDGETS.index(budget) + 0.01 * seed


def flat(budget: float, seed: int) -> float:
    return 0.9 + 0.01 * seed


def cliff(budget: float, seed: int) -> float:
    return 0.2 + 0.01 * BUDGETS.index(budget) + 0.6 * (budget > 0.5)


def told(tmp_path: Path, **tasks: Callable[[float, int], float]) -> str:
    return c3_response.tell(c3_response.read_studies([sweep(tmp_path / "sweep", **tasks)]))


def test_it_holds_where_success_rises_by_small_steps(tmp_path: Path) -> None:
    text = told(tmp_path, lift=rising, maze=rising)
    in_order = "success is in order on lift (rising), maze (rising), "
    assert text.startswith(f"**Claim 3 holds** on lift, maze: {in_order}")
    assert "and smooth on lift, maze." in text
    # The error of a difference of two means of three seeds, which scatter by 1 point.
    error = 100 * np.sqrt(2 * 0.01**2 / 3)
    assert (
        f"| largest step ± standard error, points | 10 ± {error:.0f} | 10 ± {error:.0f} |" in text
    )
    assert "| of each seed alone | +1.00, +1.00, +1.00 | +1.00, +1.00, +1.00 |" in text
    # Budgets with their KL, the mean of three seeds and their standard deviation, 1 point.
    assert "| 0.5 | 61.0% ± 1.0: 0.45 | 61.0% ± 1.0: 0.45 |" in text
    assert "| the base | 25.0% ± 0.0 | 25.0% ± 0.0 |" in text


@pytest.mark.parametrize(
    ("second", "in_order", "smooth"),
    [(flat, "lift (rising)", "lift, second"), (cliff, "lift (rising), second (rising)", "lift")],
    ids=["flat", "cliff"],
)
def test_it_does_not_hold_where_one_task_is_without_order_or_has_a_cliff(
    tmp_path: Path, second: Callable[[float, int], float], in_order: str, smooth: str
) -> None:
    text = told(tmp_path, lift=rising, second=second)
    assert "**Claim 3 does not hold**" in text
    assert f"in order on {in_order}, and smooth on {smooth}." in text


def test_success_that_falls_by_small_steps_is_in_order_too(tmp_path: Path) -> None:
    text = told(tmp_path, lift=lambda budget, seed: 1.0 - rising(budget, seed))
    assert "**Claim 3 holds** on lift: success is in order on lift (falling), and smooth" in text
    assert "| rank correlation (95%) | -0.98 (" in text


def test_sweeps_of_different_tasks_are_one_claim_and_are_kept(tmp_path: Path) -> None:
    folders = [sweep(tmp_path / name, **{name: rising}) for name in ("lift", "maze")]
    page, picture = tmp_path / "claims.md", tmp_path / "c3.png"
    page.write_text("<!-- begin c3 --><!-- end c3 -->")
    flags = ["--studies", *map(str, folders), "--page", str(page), "--output", str(picture)]
    assert c3_response.main([*flags, "--keep", str(tmp_path / "kept")]) == 0
    assert marked(page, "c3").strip() == c3_response.tell(c3_response.read_studies(folders))
    assert picture.stat().st_size > 10_000
    for name in ("lift", "maze"):
        kept = {path.name for path in (tmp_path / "kept" / name).iterdir()}
        assert kept == {*claim_studies.KEPT, "pictures"}


def test_what_is_no_such_sweep_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, short = (sweep(tmp_path / name, lift=rising) for name in ("one", "short"))
    table = short / claim_studies.TABLE
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:-1]) + "\n")
    other = sweep(tmp_path / "other", lift=rising)
    (other / claim_studies.TABLE).write_text("task,method\nlift,trqam\n")
    for folders, said in (
        ([tmp_path], "table.csv is not there"),
        ([one, one], "have the same run"),
        ([short], "those of lift lack runs"),
        ([other], "has no column seed: it is of another kind of study"),
    ):
        assert c3_response.main(["--studies", *map(str, folders)]) == 2
        assert said in capsys.readouterr().err
