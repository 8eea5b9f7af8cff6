"""What the claims' scripts make of run folders whose numbers are known."""

import json
from pathlib import Path
from typing import Any

import c1_fragile
import c2_budget
import numpy as np
import pytest
from claim_folders import LINES, make_run
from claim_runs import mean_and_spread, read_claim_run, read_claim_runs
from marked import marked
from matplotlib.figure import Figure
from scipy import stats

from vla_trqam.engine.folder.run_folder import DIVERGED_NAME
from vla_trqam.errors import UserError

TRQAM = {"type": "trqam"}
GROWING = tuple(np.geomspace(1.0, 1000.0, LINES))


@pytest.fixture(autouse=True)
def no_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn but not rendered, which takes most of the time."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: path.write_bytes(b"png"))


def qam(beta: float) -> dict[str, Any]:
    return {"type": "qam", "inverse_temperature": beta}


def page_of(tmp_path: Path, name: str) -> Path:
    page = tmp_path / "claims.md"
    page.write_text(f"# Claims\n<!-- begin {name} -->\n<!-- end {name} -->\nend\n")
    return page


def row(text: str, *start: str) -> list[str]:
    head = "| " + " | ".join(start) + " |"
    (line,) = [line for line in text.splitlines() if line.startswith(head)]
    return line.strip("| ").split(" | ")


def test_a_fragile_temperature_is_told_from_one_that_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy = {"critic": {"ensemble_size": 4, "gradient_noise": 4.0}}
    runs = []
    for seed in range(4):
        for label, settings in (("plain", {}), ("noisy", noisy)):
            for name, method, tuned in (
                ("trqam", TRQAM, 14 + seed),
                ("qam1", qam(1), 15 + seed % 2),
                ("qam10", qam(10), None if label == "plain" and seed == 3 else 4 + seed),
            ):
                folder = tmp_path / f"{label}_{name}_s{seed}"
                loss = GROWING if "plain_qam10_s0" in folder.name else (100.0,) * LINES
                runs.append(
                    make_run(
                        folder, method=method, tuned=tuned, seed=seed, settings=settings, loss=loss
                    )
                )
    page, figure = page_of(tmp_path, "c1"), tmp_path / "figures" / "c1.png"
    record = tmp_path / "runs.json"
    given = ["--runs", *map(str, runs), "--page", str(page), "--output", str(figure)]
    assert c1_fragile.main([*given, f"--record={record}"]) == 0
    kept = {run["run"]: run for run in json.loads(record.read_text())["runs"]}
    assert kept.keys() == {run.name for run in runs}
    assert (kept["plain_qam1_s1"]["base"], kept["plain_qam1_s1"]["tuned"]) == (0.5, 0.8)
    assert kept["plain_qam1_s1"]["command"].endswith("finetune_robomimic.py")
    assert kept["plain_qam10_s3"]["tuned"] is None
    text = marked(page, "c1")
    assert text in capsys.readouterr().out
    assert figure.is_file()
    assert text.startswith(
        "**Claim 1 does not hold.** Less gain than TRQAM's over all critics: QAM β=10; more of it "
        "lost by a critic's imperfection: none. Mean gains over 8 runs each: "
    )
    assert "TRQAM +28 points (0 below their base); " in text
    # 7 of 8 end at 4, 5, 6 (7) of 20; what diverged lost the base's 10 of 20.
    mean = 100 * (2 * (4 + 5 + 6) + 7 + 0 - 80) / 160
    # Each seed's mean over its two critics, by Student's t of four seeds.
    ahead = np.array([14 - 4, 15 - 5, 16 - 6, 17 - (0 + 7) / 2]) / 20
    test = stats.ttest_1samp(ahead, 0.0)
    low, high = (100 * end for end in test.confidence_interval(0.95))
    assert (
        f"QAM β=10 {mean:+.0f} points (8 below their base), of which TRQAM is ahead by "
        f"{100 * ahead.mean():.0f} ({low:.0f} to {high:.0f}), p = {2 * test.pvalue:.2g}" in text
    )
    own = row(text, "lift", "4 critics", "TRQAM")
    assert own[3:8] == ["4", "50 ± 0", "78 ± 6", "30", "0"]
    lost = row(text, "lift", "4 critics", "QAM β=10")
    assert lost[3:6] == ["4", "50 ± 0", "25 ± 5"]
    assert (lost[7], lost[10]) == ("4", "2")
    assert float(lost[9]) == pytest.approx(
        np.median(GROWING[-4:]) / np.median(GROWING[18:22]), rel=0.01
    )
    assert row(text, "lift", "4 critics, noise 4", "QAM β=10")[7] == "4"


def claim_of(folder: Path, tuned: dict[str, tuple[list[int], list[int]]]) -> str:
    """The verdict of TRQAM, 14 of 20 throughout, and of methods with these numbers.

    Args:
        folder: for the runs.
        tuned: by method's name, solved states of each seed with the preset's and a single critic.
    """
    methods = {"t": TRQAM} | {name: qam(float(name[1:])) for name in tuned}
    seeds = len(next(iter(tuned.values()))[0])
    solved = {"t": ([14] * seeds, [14] * seeds)} | tuned
    runs = [
        make_run(
            folder / f"{name}_{critics}_{seed}",
            method=method,
            tuned=count,
            seed=seed,
            settings={"critic": {"ensemble_size": critics, "gradient_noise": 0.0}},
        )
        for name, method in methods.items()
        for critics, counts in zip((4, 1), solved[name], strict=True)
        for seed, count in enumerate(counts)
    ]
    return c1_fragile.verdict(c1_fragile.groups_of([read_claim_run(run) for run in runs]))


def test_the_budget_is_ahead_of_no_temperature_that_does_as_well(tmp_path: Path) -> None:
    """Nor of one that does worse in a single pair."""
    assert claim_of(tmp_path, {"q3": ([2], [1])}).startswith(
        "**Claim 1 does not hold.** Less gain than TRQAM's over all critics: none; more"
    )


def test_it_holds_for_a_temperature_that_loses_by_the_critic(tmp_path: Path) -> None:
    """Not for one that loses as much under a good one, nor where only the loss is larger."""
    text = claim_of(
        tmp_path,
        {
            "q3": ([12, 13, 12], [2, 1, 3]),
            "q10": ([3, 4, 3], [4, 3, 4]),
            "q1": ([20, 20, 19], [14, 15, 14]),
        },
    )
    assert text.startswith(
        "**Claim 1 holds for QAM β=3.** Less gain than TRQAM's over all critics: QAM β=3, QAM "
        "β=10; more of it lost by a critic's imperfection: QAM β=1, QAM β=3. "
    )
    lost = np.array([10, 12, 9]) / 20
    test = stats.ttest_1samp(lost, 0.0)
    low, high = (100 * end for end in test.confidence_interval(0.95))
    assert "from the preset's critic to the imperfect ones: TRQAM 0; QAM β=1 27, of which " in text
    assert (
        f"; QAM β=3 {100 * lost.mean():.0f}, of which TRQAM is ahead by {100 * lost.mean():.0f} "
        f"({low:.0f} to {high:.0f}), p = " in text
    )


def test_imperfect_critics_are_compared_with_the_presets(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, method=m) for name, m in (("t", TRQAM), ("q", qam(3)))]
    groups = c1_fragile.groups_of([read_claim_run(run) for run in runs])
    with pytest.raises(UserError, match="imperfect critics with the preset's"):
        c1_fragile.verdict(groups)


def test_methods_without_the_same_runs_are_not_compared(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "t", method=TRQAM),
        make_run(tmp_path / "q", method=qam(3)),
        make_run(tmp_path / "q1", method=qam(3), seed=1),
    ]
    groups = c1_fragile.groups_of([read_claim_run(run) for run in runs])
    with pytest.raises(UserError, match="TRQAM and QAM β=3 has no run on lift, 4 critics, seed 1"):
        c1_fragile.verdict(groups)


def test_a_loss_that_is_not_finite_has_diverged(tmp_path: Path) -> None:
    loss = (*((1.0,) * (LINES - 1)), float("nan"))
    run = read_claim_run(make_run(tmp_path / "q", method=qam(3), loss=loss))
    (group,) = c1_fragile.groups_of([run])
    assert (group.diverged, group.growth) == (1, float("inf"))


def test_a_run_that_only_makes_a_base_is_none_of_a_claim(tmp_path: Path) -> None:
    alone = make_run(tmp_path / "base", method=TRQAM, tuned=None, settings={"steps": 0})
    (alone / DIVERGED_NAME).unlink()
    broken = make_run(tmp_path / "broken", method=TRQAM, tuned=None)
    assert [run.folder for run in read_claim_runs([alone, broken])] == [broken]


def test_a_run_that_has_not_come_to_its_end_is_refused(tmp_path: Path) -> None:
    running = make_run(tmp_path / "running", method=TRQAM, tuned=None)
    (running / DIVERGED_NAME).unlink()
    with pytest.raises(UserError, match="/running neither finished nor diverged: go on with it"):
        read_claim_runs([running])


def test_a_target_kept_and_one_passed_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rising = tuple(np.linspace(0.1, 0.5, LINES))
    inside, outside = ({"type": name, "kl_budget": 0.2} for name in ("trqam", "external_kl"))
    on_top = (*((1.0,) * 34), *((10.0,) * 6))
    wide = {"type": "external_kl", "kl_budget": 0.4}
    runs = [
        make_run(tmp_path / "in", method=inside, kl=(0.21,) * LINES),
        make_run(tmp_path / "out", method=outside, kl=rising, lam=on_top),
        make_run(tmp_path / "idle", method=wide, kl=(0.05,) * LINES, lam=(0.1,) * LINES),
    ]
    page, figure = page_of(tmp_path, "c2"), tmp_path / "c2.png"
    given = ["--runs", *map(str, runs), "--page", str(page), "--output", str(figure)]
    assert c2_budget.main(given) == 0
    text = marked(page, "c2")
    assert text in capsys.readouterr().out
    assert (
        "**Lambda inside keeps the target: holds** (within a fifth most of the time in 1 o" in text
    )
    assert (
        "**The penalty outside lies above it: holds** (by more than a fifth in 1 of the 1 " in text
    )
    assert "at work; in the other 1 its weight lies on a bound)" in text
    assert row(text, "external_kl", "0.4", "1")[7] == "100%"
    kept = row(text, "trqam", "0.2", "1")
    assert kept[3].startswith("1.05 (")
    assert kept[4] == "100%"
    assert abs(float(kept[5].split()[0])) < 1e-6
    assert kept[7] == "0%"
    passed = row(text, "external_kl", "0.2", "1")
    late = np.array(rising[20:])
    assert float(passed[3].split()[0]) == pytest.approx(late.mean() / 0.2, abs=5e-3)
    assert float(passed[5].split()[0]) == pytest.approx((late[-1] - late[0]) / 0.2, abs=5e-3)
    assert passed[6].startswith("10 (")
    assert passed[7] == "30%"


def test_what_cannot_be_compared_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "one", method=TRQAM)
    for script, said in ((c1_fragile, "compares TRQAM's runs"), (c2_budget, "give both")):
        assert script.main(["--runs", str(run)]) == 2
        assert said in capsys.readouterr().err
        assert script.main(["--runs", str(run), str(run)]) == 2
        assert "is given twice" in capsys.readouterr().err
        assert script.main(["--runs", str(tmp_path)]) == 2
        assert "is no run's folder" in capsys.readouterr().err


def test_a_run_without_a_report_did_not_finish(tmp_path: Path) -> None:
    run = read_claim_run(make_run(tmp_path / "cut", method=TRQAM, tuned=None))
    assert run.diverged
    assert run.gain is None
    assert run.worst == 0.3
    with pytest.raises(UserError, match=r"empty is no run's folder: it has no report\.json"):
        read_claim_run(tmp_path / "empty")


def test_a_mean_of_one_has_no_spread() -> None:
    assert (mean_and_spread([]), mean_and_spread([0.5])) == ("-", "50")
    assert mean_and_spread([0.5, 0.7]) == "60 ± 14"
