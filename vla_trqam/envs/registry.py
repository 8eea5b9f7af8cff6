"""From a run's settings to the family that it plays: `--env.type` is a choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

from vla_trqam.envs.base import EnvFamily
from vla_trqam.envs.lerobot.family import lerobot_family
from vla_trqam.envs.ogbench.family import ogbench_family
from vla_trqam.envs.robomimic.env_meta import Task, env_meta_for
from vla_trqam.envs.robomimic.family import robomimic_family
from vla_trqam.envs.robomimic.images import STATE_KEYS, CameraSettings
from vla_trqam.errors import UserError


@dataclass
class EnvConfig:
    """The simulator; without one the run is offline and nothing is evaluated.

    Attributes:
        type: "robomimic", "ogbench", or one of LeRobot's, like "pusht" and "metaworld"; null for
            none.
        task: its name there; null for Lift, or for the default of LeRobot's type.
        cameras: of Robomimic; their images are ``observation.images.<camera>``.
        image_size: of Robomimic; height and width in pixels.
        shadows: of Robomimic, and reflections; a frame without them takes half the time on a CPU.
        instruction: of LeRobot's types, what the policy is told; null for the simulator's text.
        options: of LeRobot's types, further settings of theirs by name.
    """

    type: str | None = None
    task: str | None = None
    cameras: tuple[str, ...] = ("agentview",)
    image_size: int = 96
    shadows: bool = True
    instruction: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


OF_ROBOMIMIC = ("cameras", "image_size", "shadows")
OF_LEROBOT = ("instruction", "options")


def robomimic_task(task: str | None) -> Task:
    """Robomimic's task of ``--env.task``.

    Raises:
        UserError: there is none of that name.
    """
    for known in get_args(Task):
        if task in (None, known):
            chosen: Task = known
            return chosen
    raise UserError(f"--env.task={task} must be one of {', '.join(get_args(Task))}")


def make_family(config: EnvConfig, *, max_episode_steps: int) -> EnvFamily:
    """What the settings choose.

    Raises:
        UserError: there is no such simulator or task, it is not installed, or a setting is not one
            of its.
    """
    assert config.type is not None, "a run without a simulator plays nothing"
    build, owned = BUILDERS.get(config.type, (_lerobot, OF_LEROBOT))
    default = EnvConfig()
    for name in set(OF_ROBOMIMIC + OF_LEROBOT) - set(owned):
        value = getattr(config, name)
        if value != getattr(default, name):
            raise UserError(
                f"--env.{name}={value} is no setting of --env.type={config.type}; leave it out"
            )
    return build(config, max_episode_steps)


def _robomimic(config: EnvConfig, max_episode_steps: int) -> EnvFamily:
    return robomimic_family(
        env_meta_for(robomimic_task(config.task)),
        max_episode_steps=max_episode_steps,
        obs_keys=STATE_KEYS,
        cameras=CameraSettings(config.cameras, config.image_size, config.shadows),
    )


def _ogbench(config: EnvConfig, max_episode_steps: int) -> EnvFamily:
    return ogbench_family(config.task, max_episode_steps=max_episode_steps)


def _lerobot(config: EnvConfig, max_episode_steps: int) -> EnvFamily:
    assert config.type is not None
    return lerobot_family(
        config.type,
        max_episode_steps=max_episode_steps,
        task=config.task,
        instruction=config.instruction,
        options=config.options,
    )


Build = Callable[[EnvConfig, int], EnvFamily]
BUILDERS: dict[str, tuple[Build, tuple[str, ...]]] = {
    "robomimic": (_robomimic, OF_ROBOMIMIC),
    "ogbench": (_ogbench, ()),
}
"""Our own, and which of the settings beside type and task are theirs; all others are LeRobot's."""
