"""Whether our two fields are the policy that the host executes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vla_trqam.data.frames import FrameObservation
from vla_trqam.data.replay import Replay
from vla_trqam.methods.parts.adjoint_matching import sampled_fields
from vla_trqam.methods.trqam_config import TRQAMConfig
from vla_trqam.preflight.report import Finding
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

if TYPE_CHECKING:
    from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

BATCH = 2
SEED = 0
TOLERANCE, HALF_TOLERANCE = 1e-4, 5e-2
"""Largest difference of two samplers, in units of the largest action; the second one where weights
are in half precision, and on a GPU, where an observation is encoded with TF32."""

Velocity = Callable[[Tensor, Tensor], Tensor]


def device_of(policy: LeRobotFlowPolicy) -> torch.device:
    """Where the policy computes."""
    return next(policy.host.parameters()).device


def prepared(policy: LeRobotFlowPolicy, seen: FrameObservation) -> dict[str, Any]:
    """Raw observations as the policy's preprocessor gives them."""
    assert policy.processors is not None
    return policy.processors.observe(seen)


def repeated(seen: FrameObservation, times: int) -> FrameObservation:
    """The same raw observations so many times, one after the other."""
    return {
        key: entry * times if isinstance(entry, list) else torch.cat([entry] * times)
        for key, entry in seen.items()
    }


def first_observations(policy: LeRobotFlowPolicy, replay: Replay, count: int) -> dict[str, Any]:
    """The replay's first observations as the policy's preprocessor gives them."""
    rows = replay.frame_index.rows_of_frames()[:count]
    return prepared(policy, replay.observation_at(rows))


@torch.no_grad()
def check_observation(
    policy: LeRobotFlowPolicy, seen: FrameObservation, tasks: Sequence[str]
) -> Finding:
    """The policy takes raw observations like this one, told any of these tasks."""
    right = "images, state and instruction as in the policy's training"
    try:
        features = policy.features(policy.encode(prepared(policy, seen)))
    # Of a host that is given sizes which it cannot take.
    except (RuntimeError, ValueError) as error:
        return Finding.failure("observation", f"the policy does not take it: {error}", right)
    found = f"{features.shape[1]} features for the critic; instructions: {len(tasks)}"
    if not bool(torch.isfinite(features).all()):
        return Finding.failure("observation", f"{found}; some features are not finite", right)
    return Finding("observation", f"{found}, one is {tasks[0]!r}")


def check_time_direction(policy: LeRobotFlowPolicy, replay: Replay) -> Finding:
    """Euler on our tuned field gives the actions that the host's own loop executes."""
    observation = first_observations(policy, replay, BATCH)
    theirs, noise = host_actions(policy, observation)
    context = policy.encode(observation)

    def field(x: Tensor, tau: Tensor) -> Tensor:
        return policy.velocity(x, tau, context)

    scale = float(theirs.abs().max())
    allowed = tolerance(policy) * max(scale, 1.0)
    difference = _difference(policy, field, noise, theirs)
    found = f"Euler on our field differs by {difference:.2g} from the host's sampler"
    found += f" (actions up to {scale:.2g}, allowed {allowed:.2g})"
    if difference <= allowed:
        return Finding("time direction", found)
    variants: dict[str, Velocity] = {
        "its sign reversed": lambda x, tau: -field(x, tau),
        "its time reversed": lambda x, tau: field(x, 1.0 - tau),
        "its sign and time reversed": lambda x, tau: -field(x, 1.0 - tau),
    }
    fits = [
        name for name, v in variants.items() if _difference(policy, v, noise, theirs) <= allowed
    ]
    known = f"{found}; with {fits[0]} it would agree" if fits else found
    return Finding.failure(
        "time direction", known, "a field that runs from noise at tau = 0 to the action at tau = 1"
    )


def tolerance(policy: LeRobotFlowPolicy) -> float:
    """Looser where not every number has the bits of float32."""
    dtypes = {p.dtype for p in policy.host.parameters() if p.is_floating_point()}
    exact = dtypes <= {torch.float32, torch.float64} and device_of(policy).type != "cuda"
    return TOLERANCE if exact else HALF_TOLERANCE


@torch.no_grad()
def _difference(
    policy: LeRobotFlowPolicy, velocity: Velocity, noise: Tensor, theirs: Tensor
) -> float:
    chunk = policy.real_actions(sample_ode(velocity, noise, TimeGrid(policy.num_flow_steps)))
    return float((chunk[:, : theirs.shape[1]] - theirs).abs().max())


def host_actions(policy: LeRobotFlowPolicy, observation: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the host executes of one chunk, through the path that ``lerobot-eval`` takes.

    The hosts draw the noise first of all, from torch's generator: the same seed gives it to us.

    Returns:
        Normalised actions (B, n_action_steps, a), and the noise they came from (B, H, A).
    """
    host, device = policy.host, device_of(policy)
    host.reset()
    with seeded(device):
        steps = [host.select_action(dict(observation)) for _ in range(host.config.n_action_steps)]
    host.reset()
    with seeded(device):
        noise = torch.randn(len(steps[0]), *policy.chunk_shape, device=device)
    return torch.stack(steps, dim=1).float(), noise


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Torch's generators start from a fixed seed inside the block, and go on as before after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        yield


def check_base(policy: LeRobotFlowPolicy, replay: Replay, *, resumed: bool) -> Finding:
    """Before the first step the tuned field is the base field, to the bit, along a whole path."""
    context = policy.encode(first_observations(policy, replay, BATCH))
    # A chain that may have a single step: the claim is of any state.
    authors = TRQAMConfig(scheme="shifted_euler")
    rows = len(policy.features(context))
    with seeded(device_of(policy)):
        fields = sampled_fields(policy, context, rows, authors)
    gap = float((fields.tuned().detach() - fields.base()).abs().max())
    found = f"the tuned field differs by {gap:.2g} from the base"
    if gap == 0.0 or (resumed and math.isfinite(gap)):
        return Finding("base", found + (" (training goes on)" if resumed else ""))
    return Finding.failure(
        "base",
        found + " before the first step, so the KL does not start at 0",
        "a policy as load_policy gives it, or --resume where training goes on",
    )
