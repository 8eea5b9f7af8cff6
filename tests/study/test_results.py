"""What is read of finished runs, and the tables and pictures made of it."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest

from vla_trqam.errors import UserError
from vla_trqam.methods.fql import FQLConfig
from vla_trqam.methods.trqam import TRQAMConfig
from vla_trqam.report.evaluation import PairedEvaluation
from vla_trqam.report.metrics import MetricsLog
from vla_trqam.study.comparison import write_comparison
from vla_trqam.study.results import read_result, read_results
from vla_trqam.study.settings import CompareConfig, SweepConfig
from vla_trqam.study.sweep import write_sweep
from vla_trqam.study.trials import Trial, Trials

pytestmark = pytest.mark.usefixtures("few_replicates")
STEPS, ONLINE = 10, 5
TABLE = {"lift": {"recipe": "finetune_robomimic"}}
TRIED = {"trqam": [{"kl_budget": 0.2}, {"kl_budget": 0.5}], "fql": [{"alpha": 1.0}, {"alpha": 3.0}]}
TUNED = {"lift": {"recipe": "finetune_robomimic", "trials": TRIED}}
TRIALS = Trials(
    {("lift", "trqam"): [Trial({"kl_budget": 0.2}, 0.75, {}), Trial({"kl_budget": 0.5}, None, {})]}
)


def finished(folder, label, seed, *, final, method=None, budget=None, kl=None, lam_min=None):
    """A run's folder with two evaluations in the offline updates and rollouts in both phases."""
    folder = folder / f"{label}_s{seed}"
    folder.mkdir(parents=True)
    now = [0.0]
    with MetricsLog(folder / "metrics.jsonl", clock=lambda: now[0]) as log:

        def line(step, phase, **values):
            now[0] += 1
            log.log(step, phase, values)

        line(3, "pretrain", bc_loss=1.0)
        line(0, "eval", success_rate=0.2, episodes=10)
        line(0, "offline", success=1.0, episode_steps=30)
        line(0, "offline", success=0.0, episode_steps=50)
        region = {} if budget is None else {"kl_budget": budget, "kl_ema": kl, "lam": 1.0}
        region |= {} if lam_min is None else {"lam_min": lam_min}
        line(5, "offline", updates_per_s=70.0, kl_estimate=kl or 0.0, **region)
        line(STEPS, "offline", updates_per_s=80.0, kl_estimate=kl or 0.0, **region)
        line(STEPS, "eval", success_rate=0.6, episodes=10)
        line(STEPS, "online", success=1.0, episode_steps=20)
        line(STEPS + ONLINE, "online", updates_per_s=60.0, kl_estimate=kl or 0.0, **region)
        line(STEPS + ONLINE, "eval", success_rate=0.8, episodes=10)
    count = 20
    tuned = np.arange(count) < round(final * count)
    base = np.arange(count) < 4
    steps = np.full(count, 9)
    evaluation = PairedEvaluation(np.arange(count), base, tuned, steps, steps)
    (folder / "evaluation.json").write_text(json.dumps(evaluation.to_json()))
    (folder / "report.json").write_text("{}")
    online = SimpleNamespace(steps=ONLINE)
    config = SimpleNamespace(steps=STEPS, online=online, method=method or TRQAMConfig())
    step = SimpleNamespace(done=folder / "report.json")
    return SimpleNamespace(
        task="lift", label=label, seed=seed, folder=folder, config=config, step=step
    )


def test_a_run_is_read_as_it_was_logged(tmp_path):
    found = read_result(finished(tmp_path, "trqam", 0, final=0.9))
    assert (found.base, found.offline, found.final) == (0.2, 0.6, 0.9)
    assert found.curve.updates.tolist() == [0, 10, 15]
    assert found.curve.env_steps.tolist() == [0, 80, 100]
    assert found.curve.rate.tolist() == [0.2, 0.6, 0.8]
    assert (found.env_steps, found.updates_per_s, found.kl_unit) == (100, 80.0, "nats per action")


def test_a_curve_goes_on_to_the_final_evaluation(tmp_path):
    run = finished(tmp_path, "trqam", 0, final=0.9)
    curve = read_result(run).curve_to_end
    # It takes the place of one during training at the same update.
    assert curve.updates.tolist() == [0, 10, 15]
    assert curve.rate.tolist() == [0.2, 0.6, 0.9]
    assert curve.env_steps.tolist() == [0, 80, 100]
    assert curve.episodes.tolist() == [10, 10, 20]
    run.config.online.steps = 2 * ONLINE
    assert read_result(run).curve_to_end.updates.tolist() == [0, 10, 15, 20]


def test_without_online_updates_the_end_is_after_the_offline_ones(tmp_path):
    run = finished(tmp_path, "trqam", 0, final=0.9)
    run.config.online.steps = 0
    assert read_result(run).offline == 0.9
    run.config.online.steps, run.config.steps = ONLINE, 0
    assert np.isnan(read_result(run).offline)


def test_only_finished_runs_are_read(tmp_path):
    runs = [finished(tmp_path, "trqam", seed, final=0.5) for seed in (0, 1)]
    runs[0].step.done.unlink()
    assert [result.seed for result in read_results(runs)] == [1]
    (runs[1].folder / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json cannot be read"):
        read_results(runs)


@pytest.fixture
def compared(tmp_path):
    finals = {("trqam", 0): 0.8, ("trqam", 1): 1.0, ("fql", 0): 0.4, ("fql", 1): 0.5}
    fql = FQLConfig(alpha=3.0)
    runs = [
        finished(tmp_path, label, seed, final=final, method=fql if label == "fql" else None)
        for (label, seed), final in finals.items()
    ]
    settings = CompareConfig(
        output_dir=tmp_path, methods=("trqam", "fql"), tasks=("lift",), seeds=(0, 1), table=TUNED
    )
    return settings, runs


@pytest.mark.slow
def test_the_page_has_the_numbers_the_knobs_and_what_is_not_told_apart(compared, tmp_path):
    settings, runs = compared
    page = write_comparison(settings, runs, read_results(runs), TRIALS)
    assert (
        "| lift | trqam | 2 | 20.0% ± 0.0 | 60.0% ± 0.0 | 90.0% ± 14.1 | +70.0 | 80 | 100 |"
    ) in page
    assert "| lift | fql | 2 | 20.0% ± 0.0 | 60.0% ± 0.0 | 45.0% ± 7.1 | +25.0 | 80 | 100 |" in page
    for stage in ("After offline", "After online"):
        assert f"{stage}: **These seeds tell no two methods apart.**" in page, "two seeds are few"
    assert "| trqam | 90.0% (80.0% to 100.0%) |  |" in page
    assert "| fql | 45.0% (40.0% to 50.0%) | 100.0% (100.0% to 100.0%) |" in page
    assert "| trqam - fql | +45.0 | -18.5 to +108.5 | 0.5 | 0.5 | no |" in page
    assert "| lift | trqam | defaults | kl_budget 0.2: 75.0%; kl_budget 0.5: failed |" in page
    assert "| lift | fql | alpha 3.0 | this value alone |" in page
    assert "Trials: seeds 100; settings beside: no others." in page
    assert (tmp_path / "table.md").read_text() == page
    for name in ("curves_lift.png", "after_offline.png", "after_online.png"):
        assert f"(pictures/{name})" in page
        assert (tmp_path / "pictures" / name).stat().st_size > 10_000
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["after_online"]) for row in rows] == [
        ("trqam", "0", "0.8"),
        ("trqam", "1", "1.0"),
        ("fql", "0", "0.4"),
        ("fql", "1", "0.5"),
    ]
    with (tmp_path / "means.csv").open() as file:
        means = {row["method"]: row for row in csv.DictReader(file)}
    assert means["fql"]["seeds"] == "2"
    assert float(means["fql"]["after_online_mean"]) == pytest.approx(0.45)
    assert float(means["fql"]["after_online_sd"]) == pytest.approx(np.std([0.4, 0.5], ddof=1))
    assert float(means["trqam"]["base_sd"]) == 0.0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["after online"]["interquartile_mean"]["fql"]["value"] == pytest.approx(0.45)
    assert summary["after offline"]["interquartile_mean"]["fql"]["value"] == pytest.approx(0.6)
    assert summary["after online"]["pairs"][0]["told_apart"] is False


@pytest.mark.slow
def test_a_method_without_one_of_its_runs_is_told_and_not_aggregated(compared):
    settings, runs = compared
    runs[3].step.done.unlink()
    page = write_comparison(settings, runs, read_results(runs), TRIALS)
    assert "**Missing, and left out of what is below:** lift/fql_s1." in page
    assert "There is one method: nothing to tell apart." in page
    assert "| lift | fql | 1 | 20.0% | 60.0% | 40.0% |" in page
    with pytest.raises(UserError, match="there is nothing to compare"):
        write_comparison(settings, runs, [], TRIALS)


@pytest.mark.slow
def test_the_page_of_a_sweep_orders_budgets_and_recommends_one(tmp_path):
    finals = {0.1: (0.4, 0.5), 0.5: (0.8, 0.9), 2.0: (0.85, 0.85)}
    runs = [
        finished(tmp_path, f"kl{budget:g}", seed, final=final, budget=budget, kl=0.9 * budget)
        for budget, pair in finals.items()
        for seed, final in enumerate(pair)
    ]
    settings = SweepConfig(
        output_dir=tmp_path, tasks=("lift",), seeds=(0, 1), table=TABLE, budgets=tuple(finals)
    )
    page = write_sweep(settings, runs, read_results(runs))
    assert "**lift: take a budget of 0.5 nats per action** (the best mean success, 85.0%)" in page
    assert "of budget and realised KL +1.00 (95% interval +1.00 to +1.00)" in page
    assert "| 0.5 | 2 | 20.0% ± 0.0 | 60.0% ± 0.0 | 85.0% ± 7.1 | 0.45 | 0.90 | 0% | 1 |" in page
    assert (tmp_path / "pictures/budgets_lift.png").stat().st_size > 10_000
    rows = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert rows[-1]["kl_realised"] == pytest.approx(1.8)
    bound = [
        finished(tmp_path, "bound", seed, final=0.95, budget=4.0, kl=0.5, lam_min=1.0)
        for seed in (0, 1)
    ]
    page = write_sweep(settings, [*runs, *bound], read_results([*runs, *bound]))
    assert (
        "take a budget of 4 nats per action** (the best mean success, 95.0%). There λ sat" in page
    )
    other = finished(tmp_path, "fql", 0, final=0.5)
    with pytest.raises(UserError, match="logged no KL budget: its method has none"):
        write_sweep(settings, [other], read_results([other]))
