"""How a paired evaluation is told, in the terminal, in the report and on the model card.

A gain of tuning is against the base with the tuned policy's number of flow steps. Where the base
came with another number, two more differences stand beside it: what that number alone makes of the
base, and both together.
"""

from __future__ import annotations

from dataclasses import dataclass

from vla_trqam.report.evaluation import Interval, PairedEvaluation, wilson_interval
from vla_trqam.report.formats import percent, points, points_interval, table


@dataclass(frozen=True)
class Names:
    """What the two policies of an evaluation are called, and the difference of their rates."""

    base: str = "base"
    tuned: str = "tuned"
    gain: str = "gain"


OF_A_RUN = Names()


@dataclass(frozen=True)
class Rate:
    """A policy's success."""

    label: str
    successes: int
    count: int

    @property
    def rate(self) -> float:
        """Between 0 and 1."""
        return self.successes / self.count

    @property
    def interval(self) -> Interval:
        """Wilson's, 95%."""
        return wilson_interval(self.successes, self.count)


def flow_steps(count: int) -> str:
    """4 -> 4 flow steps."""
    return f"{count} flow step{'' if count == 1 else 's'}"


def rates(evaluation: PairedEvaluation, names: Names = OF_A_RUN) -> list[Rate]:
    """Of base and tuned policy, and before them of the base as it came where that is another."""
    came, labels = evaluation.as_it_came, [names.base, names.tuned]
    outcomes = [evaluation.base_success, evaluation.tuned_success]
    if came is not None:
        labels = [f"{label}, {flow_steps(came.flow_steps.tuned)}" for label in labels]
        labels.insert(0, f"base as it came, {flow_steps(came.flow_steps.own)}")
        outcomes.insert(0, came.success)
    return [
        Rate(label, int(success.sum()), len(success))
        for label, success in zip(labels, outcomes, strict=True)
    ]


def differences(
    evaluation: PairedEvaluation, name: str = "difference"
) -> list[tuple[str, PairedEvaluation]]:
    """The pairs whose difference is told, by label: that of tuning first."""
    alone, total = evaluation.by_steps_alone(), evaluation.in_total()
    if evaluation.as_it_came is None or alone is None or total is None:
        return [(name, evaluation)]
    change = evaluation.as_it_came.flow_steps.change
    return [("gain of tuning", evaluation), (f"{change} alone", alone), ("in total", total)]


def success_table(evaluation: PairedEvaluation) -> str:
    """Rates and differences with their intervals, in Markdown."""
    rows = [
        [
            found.label,
            percent(found.rate),
            f"{percent(found.interval.low)} to {percent(found.interval.high)}",
            f"{found.successes} of {found.count}",
        ]
        for found in rates(evaluation)
    ]
    rows += [
        [
            label,
            f"{points(pair.difference)} points",
            f"{points_interval(pair.difference_interval())} points",
            f"{len(pair.gained)} gained, {len(pair.lost)} lost",
        ]
        for label, pair in differences(evaluation)
    ]
    return table(["", "success", "95% interval", "episodes"], rows) + _by_task(evaluation)


def _by_task(evaluation: PairedEvaluation) -> str:
    """A table of each task's rates and their difference; empty where there are not several."""
    rows = [
        [
            task,
            percent(pair.base_rate),
            percent(pair.tuned_rate),
            f"{points(pair.difference)} points",
            f"{points_interval(pair.difference_interval())} points",
            f"{len(pair.gained)} gained, {len(pair.lost)} lost of {len(pair)}",
        ]
        for task, pair in evaluation.by_task().items()
    ]
    if not rows:
        return ""
    header = ["task", "base", "tuned", "gain", "95% interval", "episodes"]
    return "\n\n" + table(header, rows)


def success_lines(evaluation: PairedEvaluation, names: Names = OF_A_RUN) -> list[str]:
    """The same for the terminal."""
    width = max(len(found.label) for found in rates(evaluation, names))
    lines = []
    for found in rates(evaluation, names):
        low, high = found.interval.low, found.interval.high
        interval = f"(95% interval {percent(low)} to {percent(high)})"
        lines.append(f"{found.label:<{width}}  {percent(found.rate)} {interval}")
    for label, pair in differences(evaluation, names.gain):
        interval = f"(95% interval {points_interval(pair.difference_interval())})"
        lines.append(
            f"{label:<{width}}  {points(pair.difference)} points {interval} on {len(pair)} initial "
            f"states; {len(pair.gained)} gained, {len(pair.lost)} lost"
        )
    for task, pair in evaluation.by_task().items():
        interval = f"(95% interval {points_interval(pair.difference_interval())})"
        lines.append(
            f"  {percent(pair.base_rate)} to {percent(pair.tuned_rate)}, "
            f"{points(pair.difference)} points {interval} of {len(pair)}: {task}"
        )
    return lines


def effect_of_steps(evaluation: PairedEvaluation) -> str:
    """A sentence: what of the change is not tuning's; empty where the base acts as it came."""
    came, alone, total = (
        evaluation.as_it_came,
        evaluation.by_steps_alone(),
        evaluation.in_total(),
    )
    if came is None or alone is None or total is None:
        return ""
    shown = "" if alone.difference_interval().excludes_zero() else ", so no difference is shown"
    return (
        f"The base came with {flow_steps(came.flow_steps.own)}: {came.flow_steps.change} alone "
        f"make {_change(alone)}{shown}; with tuning, in total, {_change(total)}."
    )


def _change(pair: PairedEvaluation) -> str:
    interval = points_interval(pair.difference_interval())
    return f"{points(pair.difference)} points (95% interval {interval})"
