"""What pages of results say of bases that came with another number of flow steps."""

from __future__ import annotations

from collections.abc import Sequence

from run_results.finished_run import FinishedRun
from vla_trqam.errors import UserError
from vla_trqam.report.flow_steps import FlowSteps
from vla_trqam.report.formats import percent
from vla_trqam.report.success import flow_steps

BASE, AS_IT_CAME = "base", "base as it came"


def one_setting_of_steps(runs: Sequence[FinishedRun]) -> FlowSteps | None:
    """The numbers of flow steps of all runs; None where each base acts as it came.

    Raises:
        UserError: two runs differ.
    """
    other = [run for run in runs if run.flow_steps != runs[0].flow_steps]
    if other:
        raise UserError(
            f"{other[0].folder} was trained with {_said(other[0])}, {runs[0].folder} with "
            f"{_said(runs[0])}; seeds of one setting have the same"
        )
    return runs[0].flow_steps


def _said(run: FinishedRun) -> str:
    steps = run.flow_steps
    if steps is None:
        return "its base's own number of flow steps"
    return f"{flow_steps(steps.tuned)} where its base came with {steps.own}"


def bases(runs: Sequence[FinishedRun]) -> str:
    """The bases' success in the order of the seeds, and as they came where that is another.

    Raises:
        UserError: see :func:`one_setting_of_steps`.
    """
    steps = one_setting_of_steps(runs)
    base = ", ".join(percent(run.evaluation.base_rate) for run in runs)
    if steps is None:
        return f"base {base}"
    came = ", ".join(_rate(run.rate_as_it_came) for run in runs)
    return (
        f"base as it came ({flow_steps(steps.own)}) {came}; base with {flow_steps(steps.tuned)} "
        f"{base}"
    )


def note_on_steps(runs: Sequence[FinishedRun]) -> list[str]:
    """A note, where a base came with another number."""
    if all(run.flow_steps is None for run in runs):
        return []
    return [
        "Base: with the tuned policy's number of flow steps, against which a gain is tuning's; as "
        "it came: with its own number, where that is another."
    ]


def with_base_as_it_came(
    header: list[str], rows: list[list[str]], rates: Sequence[float | None]
) -> tuple[list[str], list[list[str]]]:
    """A table with one more column before the base's, where a base came with another number."""
    if all(rate is None for rate in rates):
        return header, rows
    at = header.index(BASE)
    wider = [[*row[:at], _rate(rate), *row[at:]] for row, rate in zip(rows, rates, strict=True)]
    return [*header[:at], AS_IT_CAME, *header[at:]], wider


def _rate(rate: float | None) -> str:
    return "" if rate is None else percent(rate)
