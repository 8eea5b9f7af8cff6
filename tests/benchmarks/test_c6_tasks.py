"""What claim 6's script makes of runs whose numbers are known."""

from itertools import product
from pathlib import Path

import c6_tasks
import numpy as np
import pytest
from claim_folders import STATES, make_run
from claim_runs import read_claim_run
from marked import marked
from scipy import stats

from vla_trqam.errors import UserError

TASKS = {"lift": None, "maze": "data/maze.npz"}
SEEDS = range(3)
MORE = {("posterior", "lean"): 3, ("posterior", "scalar"): 1, ("shifted_euler", "lean"): 2}
"""States that a chain and adjoint solve beyond the worst one's."""


def solved(task: str, steps: int, kind: tuple[str, str], seed: int) -> int:
    """The seeds differ by how much the posterior chain is ahead, at three steps alone."""
    more = MORE.get(kind, 0) if steps == 3 else 0
    ahead = seed if (kind[0], steps) == ("posterior", 3) else 0
    return 12 + more + ahead + (task == "maze")


def study(folder: Path) -> list[Path]:
    kinds = list(product(c6_tasks.SCHEMES, c6_tasks.ADJOINTS))
    return [
        make_run(
            folder / f"{task}_{scheme}{steps}_{adjoint}_s{seed}",
            method={"type": "trqam", "scheme": scheme, "adjoint": adjoint, "kl_budget": 0.25},
            tuned=solved(task, steps, (scheme, adjoint), seed),
            seed=seed,
            settings={
                "policy": {"num_flow_steps": steps},
                "dataset": {"path": path, "num_demos": None},
            },
        )
        for (task, path), steps, seed in product(TASKS.items(), (3, 10), SEEDS)
        for scheme, adjoint in kinds
    ]


def test_choices_are_compared_where_all_else_is_the_same(tmp_path: Path) -> None:
    page, figure = tmp_path / "claims.md", tmp_path / "c6.png"
    parts = ("c6_tasks", "c6_rest")
    page.write_text("".join(f"<!-- begin {part} -->\n<!-- end {part} -->\n" for part in parts))
    runs = list(map(str, study(tmp_path / "runs")))
    given = ["--runs", *runs, "--page", str(page), "--output", str(figure)]
    assert c6_tasks.main(given) == 0
    assert figure.read_bytes()[1:4] == b"PNG"
    text = marked(page, "c6_tasks")
    assert not marked(page, "c6_rest").strip()
    # Posterior less shifted Euler at K = 3: (3 - 2 + 1 - 0) / 2 states and the seed's, each task's.
    ahead = (1 + np.arange(3)) / STATES
    spread, degrees = np.var(ahead, ddof=1), 2 * (len(SEEDS) - 1)
    error = np.sqrt(spread / (2 * len(SEEDS)))
    p = 2 * stats.t.sf(ahead.mean() / error, degrees)
    reach = stats.t.ppf(0.975, degrees) * error
    low, high = 100 * (ahead.mean() - reach), 100 * (ahead.mean() + reach)
    # Lean less scalar: (3 - 1 + 2 - 0) / 2 states in every seed, so its p is nearly 0 and first.
    assert (
        f"- K = 3, posterior less shifted Euler: +10.0 points ({low:.1f} to {high:.1f}), "
        f"p = {3 * p:.2g}, **told apart** (lift +10.0, maze +10.0)" in text
    )
    (sure,) = [line for line in text.splitlines() if line.startswith("- K = 3, lean less scalar")]
    assert "+10.0 points (10.0 to 10.0)" in sure
    assert "**told apart** (lift +10.0, maze +10.0)" in sure
    for said in ("posterior less shifted Euler", "lean less scalar"):
        assert f"- K = 10, {said}: +0.0 points (0.0 to 0.0), p = 1, **not told apart**" in text
    # 12 + 2 + seed of 20 states; 10 by its base; the KL of 0.5 is twice its budget.
    assert "| lift | 3 | posterior | scalar | 3 | 50 ± 0 | 70 ± 5 | 20 ± 5 | 2.00 | 1 |" in text
    assert c6_tasks.main([*given, "--marker", "c6_rest"]) == 0
    assert marked(page, "c6_rest") == text


def test_at_some_numbers_of_steps_one_adjoint_alone_was_run(tmp_path: Path) -> None:
    """There the chains are compared by it, and the adjoints not at all."""
    runs = [read_claim_run(folder) for folder in study(tmp_path)]
    lean = [run for run in runs if run.method["adjoint"] == "lean" or "10_" not in run.folder.name]
    found = list(c6_tasks.comparisons(c6_tasks.gains_of(lean)))
    said = [(each.steps, each.said) for each in found]
    assert said == [
        (3, "posterior less shifted Euler"),
        (3, "lean less scalar"),
        (10, "posterior less shifted Euler"),
    ]
    assert "p by Holm over the 3 comparisons" in c6_tasks.verdict(found)
    c6_tasks.draw(tmp_path / "figure.png", lean)


def test_a_run_that_is_missing_or_given_twice_is_refused(tmp_path: Path) -> None:
    runs = [read_claim_run(folder) for folder in study(tmp_path)]
    assert len(c6_tasks.gains_of(runs)) == len(runs)
    with pytest.raises(UserError, match=r"lacks a run: .*steps=10.*'scalar'.*seed 2"):
        c6_tasks.gains_of(runs[:-1])
    with pytest.raises(UserError, match="is a second run of"):
        c6_tasks.gains_of([*runs, runs[0]])
    fewer = {k: v for k, v in c6_tasks.gains_of(runs).items() if k[1] < 2 or k[0].task == "lift"}
    with pytest.raises(UserError, match="the same seeds of each task"):
        list(c6_tasks.comparisons(fewer))
    lost = make_run(
        tmp_path / "lost",
        method={"type": "trqam", "scheme": "posterior", "adjoint": "lean"},
        tuned=None,
        settings={"policy": {"num_flow_steps": 3}},
    )
    with pytest.raises(UserError, match="diverged"):
        c6_tasks.gains_of([read_claim_run(lost)])
