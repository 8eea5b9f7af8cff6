"""Figures show the numbers of the run, read back here from the axes as drawn."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from run_results.combined_runs import plot_comparison
from scipy import stats

from vla_trqam.errors import UserError
from vla_trqam.report import comparison_plots, plots
from vla_trqam.report.evaluation import PairedEvaluation
from vla_trqam.report.metrics import MetricsLog, read_metrics

STEPS = list(range(100, 1100, 100))


def write_run(path, *, budget=0.1, broken_step=None, kl=0.09):
    with MetricsLog(path) as log:
        log.log(50, "pretrain", {"bc_loss": 0.5})
        log.log(8000, "critic", {"td_loss": 0.5})
        for step in STEPS:
            loss = math.inf if step == broken_step else 2.0
            values = {"kl_estimate": kl, "kl_ema": kl, "kl_budget": budget, "lam": 0.3}
            values |= {"lam_min": 0.01, "lam_max": 10.0, "adjoint_norm_terminal": 3.0}
            values |= {"adjoint_norm_initial": 6.0, "adjoint_loss": loss, "td_loss": 0.2}
            values |= {"q_mean": -20.0, "q_std": 1.0, "target_mean": -21.0}
            log.log(step, "offline" if step <= 600 else "online", values)
        log.log(1000, "online", {"success": 1})
        for step, rate in ((0, 0.5), (500, 0.6), (1000, 0.9)):
            log.log(step, "eval", {"success_rate": rate, "episodes": 20})
    return path


def make_evaluation():
    base = np.arange(20) < 10
    tuned = (np.arange(20) >= 2) & (np.arange(20) < 18)
    return PairedEvaluation(np.arange(20), base, tuned, np.full(20, 90), np.full(20, 60))


def record_saved(patch):
    """Figures saved from here on, by file name."""
    figures = {}
    original = Figure.savefig

    def keep(self, path, **options):
        figures[path.name] = self
        original(self, path, **options)

    patch.setattr(Figure, "savefig", keep)
    return figures


@pytest.fixture
def drawn(monkeypatch):
    return record_saved(monkeypatch)


@pytest.fixture(scope="module")
def run_figures(tmp_path_factory):
    """Files and figures of one whole run; the other tests draw only what they look at."""
    folder = tmp_path_factory.mktemp("run")
    path = write_run(folder / "metrics.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        figures = record_saved(patch)
        files = plots.plot_run(
            path, folder / "plots", evaluation=make_evaluation(), kl_unit="nats per action"
        )
    return files, figures


def line_of(axes, label):
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def test_a_run_gives_every_figure_as_a_readable_png(run_figures):
    files, _ = run_figures
    names = ["pretraining", "episodes", "success", "kl", "lambda", "adjoint", "critic"]
    assert [file.stem for file in files] == names
    for file in files:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert min(image.size) > 300
            assert np.ptp(np.asarray(image.convert("L"))) > 200


def test_a_run_without_trust_region_gives_the_figures_it_has_numbers_for(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log(1, "pretrain", {"bc_loss": 1.0})
    written = plots.plot_run(path, tmp_path / "plots")
    assert [file.name for file in written] == ["pretraining.png"]
    with pytest.raises(UserError, match="'kl_estimate'"):
        plots.plot_kl(read_metrics(path), tmp_path / "kl.png")


def test_every_axis_says_what_it_shows(run_figures):
    _, figures = run_figures
    for name, figure in figures.items():
        for axes in figure.axes:
            assert axes.get_xlabel(), name
            assert axes.get_ylabel() or name == "episodes.png", name
    assert "nats per action" in figures["kl.png"].axes[0].get_ylabel()


def test_the_success_figure_ends_with_the_last_update_of_the_policy(run_figures):
    _, figures = run_figures
    (axes,) = figures["success.png"].axes
    by_label = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    final = by_label["tuned, final: 20 episodes"].lines[0]
    assert (final.get_xdata().tolist(), final.get_ydata().tolist()) == ([1000], [0.8])


def test_the_online_rate_has_a_point_for_every_round_of_rollouts(tmp_path, drawn):
    path = tmp_path / "metrics.jsonl"
    rounds = [(0, [1, 0] * 20), (100, [1] * 20), (200, [0] * 40)]
    with MetricsLog(path) as log:
        for step, outcomes in rounds:
            for success in outcomes:
                log.log(step, "online", {"success": success})
    plots.plot_success(read_metrics(path), tmp_path / "success.png")
    steps, rates = line_of(drawn["success.png"].axes[0], "online: last 50 episodes")
    assert steps.tolist() == [0, 100, 200]
    np.testing.assert_allclose(rates, [20 / 40, (15 + 20) / 50, 10 / 50])


def test_the_kl_figure_draws_estimate_average_and_budget(run_figures):
    (axes,) = run_figures[1]["kl.png"].axes
    for label, value in (("estimate", 0.09), ("moving average", 0.09), ("budget ± 20%", 0.1)):
        x, y = line_of(axes, label)
        assert x.tolist() == STEPS
        np.testing.assert_allclose(y, value)
    assert line_of(axes, "online begins")[0].tolist() == [700, 700]


def test_lambda_adjoint_and_td_loss_are_on_log_axes_with_their_bounds(run_figures):
    _, figures = run_figures
    (lam,) = figures["lambda.png"].axes
    np.testing.assert_allclose(line_of(lam, "lower bound")[1], 0.01)
    np.testing.assert_allclose(line_of(lam, "upper bound")[1], 10.0)
    scales = [axes.get_yscale() for axes in (lam, *figures["adjoint.png"].axes)]
    assert scales == ["log"] * 3
    assert figures["critic.png"].axes[0].get_yscale() == "log"


def test_the_success_figure_draws_wilson_bars_and_the_base(run_figures):
    (axes,) = run_figures[1]["success.png"].axes
    assert line_of(axes, "base")[1].tolist() == [0.5, 0.5]
    bars = axes.containers[0].lines[2][0].get_segments()
    for (bottom, top), (step, wins) in zip(bars, ((0, 10), (500, 12), (1000, 18)), strict=True):
        expected = stats.binomtest(wins, 20).proportion_ci(method="wilson")
        np.testing.assert_allclose([bottom, top], [[step, expected.low], [step, expected.high]])


def test_the_episode_figure_counts_the_outcomes(run_figures):
    strip = run_figures[1]["episodes.png"].axes[0]
    labels = [text.get_text() for text in strip.get_legend().get_texts()]
    assert labels == ["kept: 8", "gained: 8", "lost: 2", "both failed: 2"]
    assert [bar.get_width() for bar in strip.patches] == [8, 8, 2, 2]


def test_a_suite_has_a_row_for_every_task(tmp_path, drawn):
    evaluation = PairedEvaluation(
        np.arange(6),
        [True, False, False, False, True, False],
        [True, True, True, False, True, True],
        np.full(6, 5),
        np.full(6, 5),
        tasks=("open", "close", "open", "close", "open", "close"),
    )
    plots.plot_by_task(evaluation, tmp_path / "tasks.png")
    (axes,) = drawn["tasks.png"].axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["close (3)", "open (3)"]
    points = sorted(
        (round(float(y)), round(float(x), 3))
        for bars in axes.containers
        for x, y in zip(*bars.lines[0].get_data(), strict=True)
    )
    assert points == [(0, 0.0), (0, 0.667), (1, 0.667), (1, 1.0)]


def test_a_loss_that_is_not_finite_is_marked_at_its_step(tmp_path, drawn):
    path = write_run(tmp_path / "m.jsonl", broken_step=400)
    plots.plot_adjoint(read_metrics(path), tmp_path / "adjoint.png")
    loss = drawn["adjoint.png"].axes[1]
    assert line_of(loss, "not finite: adjoint-matching loss")[0].tolist() == [400]
    assert np.isfinite(line_of(loss, "adjoint-matching loss")[1]).all()


def test_q_against_returns_leaves_out_unknown_returns_and_says_so(tmp_path, drawn):
    returns = np.array([-3.0, -2.0, np.nan, -1.0])
    q = np.array([-2.0, -1.0, 5.0, 0.0])
    plots.plot_q_against_returns(q, returns, tmp_path / "q.png", success=[True, False, True, True])
    (axes,) = drawn["q.png"].axes
    assert axes.get_title() == "3 of 4 steps, bias +1, rank correlation 1.00"
    assert line_of(axes, "successful")[0].tolist() == [-3.0, -1.0]
    assert line_of(axes, "failed")[1].tolist() == [-1.0]


@pytest.mark.parametrize(
    ("q", "returns", "message"), [([1.0, 2.0], [1.0], "alike"), ([1.0], [np.nan], "no pair")]
)
def test_q_against_returns_refuses_what_it_cannot_draw(tmp_path, q, returns, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_q_against_returns(q, returns, tmp_path / "q.png")


def test_rank_correlation_is_spearmans_also_with_ties():
    # By hand: ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4 have deviations that multiply to 3.
    found = plots.rank_correlation(np.array([0.0, 5.0, 5.0, 9.0]), np.array([2.0, 1.0, 3.0, 40.0]))
    assert found == pytest.approx(3.0 / math.sqrt(4.5 * 5))
    assert math.isnan(plots.rank_correlation(np.arange(50.0), np.ones(50)))


def test_the_comparison_draws_each_run_and_the_median(tmp_path, drawn):
    runs = {"TRQAM": [], "QAM": []}
    for label, kls in (("TRQAM", (0.1, 0.2, 0.6)), ("QAM", (2.0,))):
        runs[label] = [write_run(tmp_path / f"{label}{kl}.jsonl", kl=kl) for kl in kls]
    plot_comparison(runs, tmp_path / "comparison.png")
    kl = drawn["comparison.png"].axes[1]
    np.testing.assert_allclose(line_of(kl, "TRQAM (3 seeds)")[1], 0.2)
    np.testing.assert_allclose(line_of(kl, "QAM")[1], 2.0)
    # three runs and their median, one run and its median, a budget line for each of the four
    assert len(kl.get_lines()) == 4 + 2 + 4


def test_runs_logged_at_other_updates_are_drawn_without_a_median(tmp_path, drawn):
    whole = write_run(tmp_path / "whole.jsonl")
    short = tmp_path / "short.jsonl"
    kept = [
        line for line in whole.read_text().splitlines(keepends=True) if '"step": 1000' not in line
    ]
    short.write_text("".join(kept))
    plot_comparison({"TRQAM": [whole, short]}, tmp_path / "c.png")
    assert len(line_of(drawn["c.png"].axes[1], "TRQAM (2 seeds)")[0]) == 0


def test_the_budget_sweep_sets_the_realised_kl_against_the_budget(tmp_path, drawn):
    runs = {
        budget: [write_run(tmp_path / f"{budget}.jsonl", budget=budget, kl=1.1 * budget)]
        for budget in (1.0, 0.1)
    }
    comparison_plots.plot_budget_sweep(runs, tmp_path / "sweep.png")
    realised = drawn["sweep.png"].axes[2]
    lines = [line.get_xydata() for line in realised.get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose(np.concatenate(lines), [[0.1, 0.11], [1.0, 1.1]])


def test_nothing_to_compare_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to compare"):
        plot_comparison({}, tmp_path / "c.png")
    with pytest.raises(UserError, match="QAM"):
        plot_comparison({"QAM": []}, tmp_path / "c.png")
