"""The rows of the tables of results: what a run says among methods and among KL budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from run_results.finished_run import FinishedRun
from vla_trqam.errors import UserError
from vla_trqam.report.metrics import join_phases, on_same_lines, summarise_trust_region

Groups = Mapping[str, Sequence[FinishedRun]]


@dataclass(frozen=True)
class MethodRow:
    """One run of a comparison of methods.

    Attributes:
        run: its name.
        seed: training seed.
        as_it_came: success of its base with the base's own number of flow steps, on the final
            initial states; None where that is the tuned policy's too.
        base: the same with the tuned policy's number.
        tuned: success of its tuned policy on them.
        first_evaluation: success of the base on the states of the evaluations during training.
        worst_evaluation: least success of the tuned policy on those.
        kl_max: largest logged KL estimate (of one batch).
        kl_final: mean KL estimate of the last tenth of the logged lines.
        adjoint_loss_first: median of the first tenth; single batches are up to ten times as large.
        adjoint_loss_last: median of the last tenth.
        lam_final: the last lambda.
    """

    run: str
    seed: int
    as_it_came: float | None
    base: float
    tuned: float
    first_evaluation: float
    worst_evaluation: float
    kl_max: float
    kl_final: float
    adjoint_loss_first: float
    adjoint_loss_last: float
    lam_final: float


@dataclass(frozen=True)
class BudgetRow:
    """One run of a sweep, over the last half of its updates.

    Attributes:
        run: its name.
        seed: training seed.
        budget: KL budget.
        ratio_mean: mean of kl_ema / budget.
        ratio_min: its least.
        ratio_max: its largest.
        unclipped_ratio: mean of kl_estimate / budget; `kl_ema` averages clipped estimates.
        share_within: share of logged lines with kl_ema within 20% of the budget.
        share_on_bound: share of logged lines with lambda on one of its bounds.
        held: every line is within 20% or has lambda on a bound.
        lam_final: the last lambda.
        as_it_came: success of its base with the base's own number of flow steps; None where that is
            the tuned policy's too.
        base: the same with the tuned policy's number.
        tuned: success of its tuned policy.
    """

    run: str
    seed: int
    budget: float
    ratio_mean: float
    ratio_min: float
    ratio_max: float
    unclipped_ratio: float
    share_within: float
    share_on_bound: float
    held: bool
    lam_final: float
    as_it_came: float | None
    base: float
    tuned: float


def one_kl_unit(runs: Sequence[FinishedRun]) -> str:
    """The unit of all runs' KL.

    Raises:
        UserError: some count per action and some per chunk.
    """
    other = [run for run in runs if run.kl_unit != runs[0].kl_unit]
    if other:
        raise UserError(
            f"{other[0].folder} has its KL in {other[0].kl_unit}, {runs[0].folder} in "
            f"{runs[0].kl_unit}; only equal units can be compared"
        )
    return runs[0].kl_unit


def check_initial_states(runs: Sequence[FinishedRun]) -> None:
    """Refuses runs that were evaluated on different initial states.

    Raises:
        UserError: two runs differ.
    """
    for run in runs:
        if not np.array_equal(run.evaluation.seeds, runs[0].evaluation.seeds):
            raise UserError(
                f"{run.folder} was evaluated on other initial states than {runs[0].folder}; "
                "only evaluations on the same ones can be compared"
            )


def same_bases(groups: Groups) -> str:
    """A sentence: do the runs of one training seed start from one base, to the bit?"""
    bases: dict[int, list[str | None]] = {}
    for run in (run for group in groups.values() for run in group):
        bases.setdefault(run.seed, []).append(run.base_weights)
    shared = {seed: digests for seed, digests in bases.items() if len(digests) > 1}
    other = sorted(seed for seed, digests in shared.items() if len(set(digests)) > 1)
    same = sorted(shared.keys() - set(other))
    listed = ", ".join(map(str, same)) or "none"
    text = f"Seeds whose runs all start from one base policy, to the bit: {listed}."
    if other:
        text += f" **Seeds whose bases differ between runs: {', '.join(map(str, other))}.**"
    return text


def method_row(run: FinishedRun) -> MethodRow:
    """One run among methods.

    Raises:
        UserError: it was not evaluated at its start and during training, or logged no KL.
    """
    evaluations = run.values("success_rate", ("eval",))
    if join_phases(run.metrics, "success_rate", ("eval",)).step[0] != 0 or len(evaluations) < 2:
        raise UserError(f"{run.folder} has no evaluations of the base and during training")
    return MethodRow(
        run=run.name,
        seed=run.seed,
        as_it_came=run.rate_as_it_came,
        base=run.evaluation.base_rate,
        tuned=run.evaluation.tuned_rate,
        first_evaluation=float(evaluations[0]),
        worst_evaluation=float(evaluations[1:].min()),
        kl_max=float(run.values("kl_estimate").max()),
        kl_final=float(run.last("kl_estimate").mean()),
        adjoint_loss_first=float(np.median(run.first("adjoint_loss"))),
        adjoint_loss_last=float(np.median(run.last("adjoint_loss"))),
        lam_final=float(run.values("lam")[-1]),
    )


def budget_row(run: FinishedRun, budget: float) -> BudgetRow:
    """One run of a sweep.

    Raises:
        UserError: it has no KL budget, or another.
    """
    region = summarise_trust_region(run.metrics)
    if region is None:
        raise UserError(f"{run.folder} has no KL budget; only TRQAM's runs have")
    if not np.isclose(region.kl_budget, budget):
        raise UserError(f"{run.folder} has the KL budget {region.kl_budget:g}, not {budget:g}")
    ema, estimate = on_same_lines(run.metrics, "kl_ema", "kl_estimate")
    late = ema.step >= (ema.step[0] + ema.step[-1]) / 2
    ratio = ema.value[late] / budget
    return BudgetRow(
        run=run.name,
        seed=run.seed,
        budget=budget,
        ratio_mean=float(ratio.mean()),
        ratio_min=float(ratio.min()),
        ratio_max=float(ratio.max()),
        unclipped_ratio=float(estimate.value[late].mean() / budget),
        share_within=region.share_within,
        share_on_bound=region.share_on_lower_bound + region.share_on_upper_bound,
        held=region.held,
        lam_final=region.lam_final,
        as_it_came=run.rate_as_it_came,
        base=run.evaluation.base_rate,
        tuned=run.evaluation.tuned_rate,
    )
