"""Let an operator do a task once and keep what happened, as a function of one seed."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vla_trqam.data.sources.robomimic.writer import Attribute, Demonstration
from vla_trqam.envs.robomimic.demonstrators.operators import Operator, draw_operator
from vla_trqam.envs.robomimic.demonstrators.tasks import DemoTask
from vla_trqam.envs.robomimic.env import LOW_DIM_KEYS, RobomimicEnv, env_meta_for

# Widths of LOW_DIM_KEYS by the length of the concatenated observation.
_WIDTHS = {19: (3, 4, 2, 10), 23: (3, 4, 2, 14)}


KeepStates = Literal["all", "initial", "none"]


@dataclass(frozen=True)
class EpisodePlan:
    """All that determines an episode: same plan, same episode, in any process."""

    seed: int
    index: int
    operator: str
    keep_states: KeepStates = "initial"
    keep_model: bool = False


@dataclass
class _Track:
    """What has happened so far; observations and states run one ahead of actions and rewards."""

    observations: list[NDArray[np.float32]]
    actions: list[NDArray[np.float32]]
    rewards: list[float]
    states: list[NDArray[np.float64]]

    def add(
        self,
        observation: NDArray[np.float32],
        action: NDArray[np.float32],
        reward: float,
        state: NDArray[np.float64],
    ) -> None:
        self.observations.append(observation)
        self.actions.append(action)
        self.rewards.append(reward)
        self.states.append(state)


def make_env(task: DemoTask) -> RobomimicEnv:
    """The simulator in which `task` is demonstrated."""
    return RobomimicEnv(env_meta_for(task.env_name), max_episode_steps=task.max_steps)


def record_episode(env: RobomimicEnv, task: DemoTask, plan: EpisodePlan) -> Demonstration:
    """Play one episode to its success or to the task's cap."""
    rng = np.random.default_rng([plan.seed, plan.index])
    reset_seed = int(rng.integers(2**31))
    operator = draw_operator(plan.operator, rng)
    demonstrator = task.demonstrator(operator, rng)
    observation, _ = env.reset(seed=reset_seed)
    model = env.robosuite.sim.model.get_xml() if plan.keep_model else None
    track = _Track([observation], [], [], [env.sim_state()])
    ended = False
    while not ended:
        action = demonstrator.act(observation)
        observation, reward, terminated, truncated, _ = env.step(action)
        track.add(observation, action, reward, env.sim_state())
        ended = terminated or truncated
    success = track.rewards[-1] > 0
    return Demonstration(
        observations=_by_key(np.stack(track.observations)),
        actions=np.stack(track.actions),
        rewards=np.array(track.rewards, dtype=np.float32),
        states=_kept_states(track.states[:-1], plan.keep_states),
        model_file=model,
        attributes=_attributes(plan, operator, reset_seed, success=success),
        filter_keys=_filter_keys(operator, success=success),
    )


def _kept_states(states: list[NDArray[np.float64]], keep: KeepStates) -> NDArray[np.float64] | None:
    if keep == "none":
        return None
    return np.stack(states if keep == "all" else states[:1])


def _by_key(observations: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    ends = np.cumsum(_WIDTHS[observations.shape[1]])
    return dict(zip(LOW_DIM_KEYS, np.split(observations, ends[:-1], axis=1), strict=True))


def _attributes(
    plan: EpisodePlan, operator: Operator, reset_seed: int, *, success: bool
) -> dict[str, Attribute]:
    return {
        "operator": operator.name,
        "operator_parameters": json.dumps(dataclasses.asdict(operator)),
        "success": success,
        "seed": reset_seed,
        "episode_index": plan.index,
    }


def _filter_keys(operator: Operator, *, success: bool) -> tuple[str, ...]:
    outcome = "successful" if success else "failed"
    return operator.quality, operator.name, outcome, f"{operator.quality}_{outcome}"
