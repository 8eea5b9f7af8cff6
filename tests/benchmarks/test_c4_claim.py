"""What claim 4's script makes of studies whose numbers are known."""

import csv
from pathlib import Path

import c4_ahead
import claim_studies
import numpy as np
import pytest
from marked import marked

pytestmark = pytest.mark.usefixtures("few_replicates")
SEEDS = range(3)
RATES = (0.9, 0.5), (0.7, 0.3)
"""TRQAM's and another method's on two tasks."""


def study(folder: Path, rates: dict[str, dict[str, float]], *, spread: float = 0.0) -> Path:
    """A study's folder: success by task and method after the online updates; 10 points less before.

    Seeds differ by the spread.
    """
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "curves.png").write_bytes(b"png")
    for name in claim_studies.KEPT:
        (folder / name).write_text("{}")
    with (folder / claim_studies.TABLE).open("w", newline="") as file:
        columns = ("task", "method", "seed", "base", "after_offline", "after_online", "env_steps")
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for task, methods in rates.items():
            for method, rate in methods.items():
                for seed in SEEDS:
                    after = rate + spread * (seed - 1)
                    values = (task, method, seed, 0.25, after - 0.1, after, 7)
                    writer.writerow(dict(zip(columns, values, strict=True)))
    return folder


def same(tasks: int, **methods: float) -> dict[str, dict[str, float]]:
    return {f"task{number}": methods for number in range(tasks)}


def told(tmp_path: Path, rates: dict[str, dict[str, float]], **how: float) -> str:
    return c4_ahead.tell(c4_ahead.read_studies([study(tmp_path / "study", rates, **how)]))


def test_it_holds_where_every_other_is_told_to_be_worse(tmp_path: Path) -> None:
    text = told(tmp_path, same(3, trqam=0.9, qam=0.7, fql=0.5), spread=0.01)
    assert text.count("holds** (place 1 of 3") == 2
    assert text.count("better than qam, fql, worse than none") == 2
    apart = "trqam and qam, trqam and fql, qam and fql."
    assert "Of all 3 pairs of methods (by Holm over all of them) these seeds tell apart" in text
    assert text.count(apart) == 2
    assert "in 9 runs a method, so that none has a p below 0.0039, 2 comparisons none below" in text


def test_few_seeds_that_agree_tell_nothing_apart(tmp_path: Path) -> None:
    # Three runs: no sign-flip test of them is below 2 / 2^3.
    text = told(tmp_path, same(1, trqam=0.9, qam=0.7), spread=0.01)
    assert text.count("first, not told apart** (place 1 of 2") == 2
    assert "better than none, worse than none" in text
    assert text.count("Of all 1 pairs of methods") == text.count("online ones: none.") * 2 == 2


def test_it_does_not_hold_where_another_is_better(tmp_path: Path) -> None:
    text = told(tmp_path, same(3, qam=0.9, trqam=0.7), spread=0.01)
    assert text.count("does not hold** (place 2 of 2") == 2
    assert "better than none, worse than qam" in text


def test_the_table_has_means_of_seeds_before_and_after(tmp_path: Path) -> None:
    rates = {"lift": {"trqam": 0.9, "qam": 0.7}, "maze": {"trqam": 0.5, "qam": 0.3}}
    text = told(tmp_path, rates, spread=0.1)
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert lines[0][:3] == ["method", "lift", "maze"]
    assert lines[2][:3] == ["the base", "25.0% ± 0.0", "25.0% ± 0.0"]
    assert lines[3][:3] == [
        *("trqam", "80.0% ± 10.0 → 90.0% ± 10.0", "40.0% ± 10.0 → 50.0% ± 10.0")
    ]
    # The middle half of six runs, two tasks of three seeds, with quarter weights at its ends.
    runs = np.sort([0.8, 0.9, 1.0, 0.4, 0.5, 0.6])
    middle = float(np.mean(runs[1:5]))
    assert lines[3][3] == "60.0% → 70.0%"
    assert f"→ {100 * middle:.1f}%" in lines[3][4]
    ours, theirs = ([[r + 0.1 * (seed - 1) for seed in SEEDS] for r in rs] for rs in RATES)
    wins = [
        np.mean([(a > b) + 0.5 * (a == b) for a in mine for b in other])
        for mine, other in zip(ours, theirs, strict=True)
    ]
    assert f"→ {100 * np.mean(wins):.1f}%" in lines[4][5]


def test_studies_of_different_tasks_are_one_comparison(tmp_path: Path) -> None:
    methods = {"trqam": 0.9, "qam": 0.7}
    folders = [study(tmp_path / name, {name: methods}, spread=0.01) for name in ("lift", "maze")]
    runs = c4_ahead.read_studies(folders)
    assert {ran.task for ran in runs} == {"lift", "maze"}
    assert "place 1 of 2" in c4_ahead.tell(runs)
    page = tmp_path / "claims.md"
    page.write_text("<!-- begin c4 --><!-- end c4 -->")
    flags = ["--studies", *map(str, folders), "--page", str(page), "--keep", str(tmp_path / "kept")]
    flags += [f"--output={tmp_path / 'c4.png'}"]
    assert c4_ahead.main(flags) == 0
    assert marked(page, "c4").strip() == c4_ahead.tell(runs)
    assert (tmp_path / "c4.png").stat().st_size > 10_000
    for name in ("lift", "maze"):
        kept = {path.name for path in (tmp_path / "kept" / name).iterdir()}
        assert kept == {*claim_studies.KEPT, "pictures"}


def test_what_is_no_such_study_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = study(tmp_path / "one", same(1, trqam=0.9, qam=0.7))
    lonely = study(tmp_path / "lonely", {"maze": {"trqam": 0.9}})
    for folders, said in (
        ([tmp_path], "table.csv is not there"),
        ([one, one], "have the same run"),
        ([lonely], "compares trqam with others"),
        ([one, lonely], "compares trqam with others"),
    ):
        assert c4_ahead.main(["--studies", *map(str, folders)]) == 2
        assert said in capsys.readouterr().err
