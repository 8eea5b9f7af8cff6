"""Whether a policy can learn from a dataset, by its tables alone: units, frames, instructions.

All of it is looked at before a picture is decoded, dataset by dataset: among the rows of a large
one those of a small one would not be seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vla_trqam.data.frames import STATE_KEY
from vla_trqam.preflight.data import ACTION_KEY
from vla_trqam.preflight.report import Finding

if TYPE_CHECKING:
    from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
    from vla_trqam.data.sources.lerobot.source import LeRobotReader

MAX_ROWS = 200_000
"""So many rows, evenly spread, are compared with the statistics."""

FAR_OUT = {"MEAN_STD": 5.0, "QUANTILES": 2.0, "QUANTILE10": 2.0, "MIN_MAX": 2.0}
"""By LeRobot's normalisation: the |normalised| beyond which a number lies far out."""
ALLOWED_FAR_OUT = 0.25
"""The share of rows that may lie far out in a dimension.

Of the data that the statistics were made of, at most 1/25 lies beyond 5 standard deviations
(Chebyshev), 1/50 outside the quantiles q01 and q99, 1/5 outside q10 and q90, none outside the
range; a policy's own rollouts lie further out than the demonstrations that it learned from (6% have
been seen), data in other units nearly all.
"""
STILL, MOST = 0.03, 0.8
"""Numbers in other units hardly move in nearly all dimensions: radians where degrees are known.

Their normalised standard deviation is below the first one in more of the dimensions than the second
one: in all but a gripper's, where a robot of many joints that rests most of them moves more.
"""
STOOD = 1000.0
"""Beyond this a number is normalised where the policy's statistics have no spread.

LeRobot divides by 1e-8 there: a hundred-thousandth of a unit.
"""
PROMPTS = 512
"""So many states, evenly spread, are told with the longest instruction, where any is told."""


def check_statistics(policy: LeRobotFlowPolicy, reader: LeRobotReader) -> Finding:
    """The dataset, by the policy's statistics, lies where the policy was trained."""
    if policy.processors is None:
        return Finding.failure(
            "statistics", "the policy has no processors", "a checkpoint with its processors"
        )
    problems = list(policy.processors.statistics_problems())
    if problems:
        return Finding.failure(
            "statistics", "; ".join(problems), "the processors that were saved with the policy"
        )
    problems, notes = [], []
    for key, raw in _numbers(policy, reader).items():
        mode = str(policy.processors.mode(key).value)
        if mode not in FAR_OUT:
            notes.append(f"{key} is not normalised")
            continue
        normalized = policy.processors.normalize(key, raw).cpu()
        flat = policy.processors.flat(key)
        judged = [dim for dim in range(raw.shape[1]) if not flat[dim]]
        problems += _misfits(key, raw, normalized, mode, judged)
        problems += _woken(key, raw, normalized, mode, flat.nonzero().flatten().tolist())
        notes.append(_fit(key, normalized, mode, judged))
    if problems:
        return Finding.failure(
            "statistics",
            "; ".join(problems),
            "data in the units and of the robot that the policy was trained with, or a policy "
            "whose statistics were made of such data",
        )
    return Finding("statistics", "; ".join(notes))


def check_frames(policy: LeRobotFlowPolicy, reader: LeRobotReader) -> Finding:
    """Frames lie where the policy decides: as many executed actions apart, or a part of them."""
    executed = policy.executed_length
    taken = [reader.frames_of(number) for number in range(reader.num_episodes)]
    # An episode's last frame may only show how it was left, as many steps later as were left.
    gaps = np.concatenate([np.diff(f if len(f) < 3 else f[:-1]) for f in taken])
    often = np.bincount(gaps)[::-1]
    spacing = len(often) - 1 - int(often.argmax()) if len(gaps) else 0  # of equals the largest
    if spacing and executed % spacing:
        return Finding.failure(
            "frames",
            f"frames lie {spacing} steps apart, {executed} actions are executed",
            f"--policy.n_action_steps a multiple of {spacing}, or frames every {executed} steps",
        )
    every = f"every {spacing} steps" if spacing > 1 else "every step" if spacing else "one each"
    return Finding("frames", f"{every} in {len(taken)} episodes, {sum(map(len, taken))} in all")


def check_instructions(policy: LeRobotFlowPolicy, readers: Mapping[str, LeRobotReader]) -> Finding:
    """No instruction is cut by the tokenizer; LeRobot cuts without a word."""
    tasks = sorted({text for reader in readers.values() for text in reader.tasks})
    assert policy.processors is not None, "check_statistics looks at it"
    states = torch.cat([_spread_rows(r.row_numbers().states, PROMPTS) for r in readers.values()])
    first = states[:1].expand(len(tasks), -1)
    counted = policy.processors.prompt_lengths(tasks, first)
    if counted is None:
        return Finding("instructions", f"{len(tasks)}, which no tokenizer reads")
    longest = tasks[int(np.argmax(counted.lengths))]
    with_states = policy.processors.prompt_lengths([longest] * len(states), states)
    assert with_states is not None
    found, limit = max(with_states.lengths), counted.limit
    if found > limit:
        return Finding.failure(
            "instructions",
            f"{longest!r} becomes {found} tokens, what is beyond {limit} is cut",
            f"instructions of at most {limit} tokens, or a policy that was trained with a larger "
            "tokenizer_max_length",
        )
    return Finding("instructions", f"{len(tasks)}, at most {found} tokens of {limit}")


def _numbers(policy: LeRobotFlowPolicy, reader: LeRobotReader) -> dict[str, Tensor]:
    """(N, d) rows of what the policy normalises, in the data's units."""
    rows = reader.row_numbers()
    found = {ACTION_KEY: _spread_rows(rows.actions, MAX_ROWS)}
    if policy.host.config.robot_state_feature is not None:
        found[STATE_KEY] = _spread_rows(rows.states, MAX_ROWS)
    return found


def _spread_rows(rows: np.ndarray, most: int) -> Tensor:
    every = -(-len(rows) // most) or 1
    return torch.from_numpy(np.array(rows[::every], dtype=np.float32))


def _misfits(
    key: str, raw: Tensor, normalized: Tensor, mode: str, judged: Sequence[int] | None = None
) -> Iterator[str]:
    """Of the dimensions that the statistics can judge; None takes all."""
    limit, judged = FAR_OUT[mode], range(raw.shape[1]) if judged is None else judged
    share = (normalized.abs() > limit).float().mean(dim=0)
    for dim in judged:
        if float(share[dim]) > ALLOWED_FAR_OUT:
            yield (
                f"{key}[{dim}] lies from {raw[:, dim].min():.4g} to {raw[:, dim].max():.4g}, which "
                f"is for {share[dim]:.0%} of the data more than {limit:g} from the middle of the "
                f"policy's normalised range ({mode})"
            )
    still = [dim for dim in judged if float(normalized[:, dim].std(correction=0)) < STILL]
    if len(still) > MOST * len(judged):
        widest = max(float(normalized[:, dim].std(correction=0)) for dim in still)
        yield (
            f"{key} hardly moves: its normalised standard deviation is at most {widest:.2g} in "
            f"{len(still)} of {len(judged)} dimensions"
        )


def _woken(
    key: str, raw: Tensor, normalized: Tensor, mode: str, flat: Sequence[int]
) -> Iterator[str]:
    """Dimensions without a spread in the policy's statistics that have one here."""
    stood = "has equal quantiles in the policy's statistics, for it hardly ever moved,"
    if mode in ("MEAN_STD", "MIN_MAX"):
        stood = "stood still in the policy's training"
    for dim in flat:
        largest = float(normalized[:, dim].abs().max())
        if largest > STOOD:
            yield (
                f"{key}[{dim}] {stood} and lies from "
                f"{raw[:, dim].min():.4g} to {raw[:, dim].max():.4g} here: normalised it is up to "
                f"{largest:.2g}"
            )


def _fit(key: str, normalized: Tensor, mode: str, judged: Sequence[int]) -> str:
    limit = FAR_OUT[mode]
    share = (normalized.abs() > limit).float().mean(dim=0)
    still = [f"{key}[{dim}]" for dim in range(normalized.shape[1]) if dim not in judged]
    note = f"; not judged, for its statistics have no spread: {', '.join(still)}" if still else ""
    if not judged:
        return f"{key} {mode}{note}"
    dim = max(judged, key=lambda d: float(share[d]))
    return f"{key} {mode}, at most {share[dim]:.1%} beyond {limit:g} ({key}[{dim}]){note}"
