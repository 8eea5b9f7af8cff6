"""Whatever LeRobot's own factory makes, as a family: `pusht`, `metaworld`, plugins.

Observations are what stock `lerobot-eval` gives a policy: they go through LeRobot's
`preprocess_observation` and the environment's own processor. A suite of several tasks plays task
`seed % n`, so that the seed alone decides task and initial state. Success at any step ends the
episode, and it is left as it ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from vla_trqam.data.frames import IMAGE_PREFIX, STATE_KEY
from vla_trqam.envs.base import EnvFamily, SeededTaskEnv
from vla_trqam.envs.lerobot.sight import Sight, SightByType
from vla_trqam.envs.lerobot.types import facts_of
from vla_trqam.errors import UserError, one_line


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What makes the environments, here and in the simulators' processes; all of it picklable."""

    env_type: str
    options: Mapping[str, Any]
    instruction: str | None


def lerobot_family(
    env_type: str,
    *,
    max_episode_steps: int,
    task: str | None = None,
    instruction: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> EnvFamily:
    """A task, or a suite of them, of one of LeRobot's environment types.

    The environments are made once, without a reset, to ask for their sizes.

    Args:
        env_type: as ``lerobot-eval --env.type`` has it; plugins are looked for.
        max_episode_steps: control steps after which an episode is truncated.
        task: LeRobot's name; None for the type's default.
        instruction: what a policy is told; None for the environment's own text.
        options: further settings of the type's config, by name.

    Raises:
        UserError: there is no such type, it is not installed, it does not take an option, or its
            environments have other observations than a policy's or end earlier.
    """
    facts = facts_of(env_type)
    if facts.refused is not None:
        raise UserError(
            f"--env.type={env_type} is not played: {facts.refused}, so no two policies could be "
            "compared on the same initial states"
        )
    choice = _choice(env_type, max_episode_steps, task, instruction, options or {})
    config = _config(choice)
    envs, texts = _environments(choice)
    seen = _Seen(config)
    first = _one_of_all(envs, env_type)
    action = first.action_space
    if not isinstance(action, gymnasium.spaces.Box) or len(action.shape) != 1:
        raise UserError(f"--env.type={env_type} takes {action} for actions, not a row of numbers")
    _check_limit(first, max_episode_steps, env_type)
    box = _executed(action, choice)
    state, images = seen.parts(first.observation_space.sample())
    for env in envs:
        env.close()
    return EnvFamily(
        name=env_type,
        task=config.task or env_type,
        make=partial(_make, choice, max_episode_steps),
        max_episode_steps=max_episode_steps,
        control_rate=config.fps,
        task_texts=tuple(texts),
        action_low=tuple(map(float, box.low)),
        action_high=tuple(map(float, box.high)),
        state_size=len(state),
        cameras={name: image.shape for name, image in images.items()},
        notes=() if facts.note is None else (f"--env.type={env_type}: {facts.note}",),
    )


def _choice(
    env_type: str,
    max_episode_steps: int,
    task: str | None,
    instruction: str | None,
    options: Mapping[str, Any],
) -> _Choice:
    """The settings, each by its owner, in LeRobot's names."""
    for name, owner in (("task", "env.task"), ("episode_length", "eval.max_episode_steps")):
        if name in options:
            raise UserError(f"--env.options has {name}, which is --{owner}'s; give that")
    settings = dict(options)
    if task is not None:
        settings["task"] = task
    if "episode_length" in {item.name for item in dataclasses.fields(_config_class(env_type))}:
        settings["episode_length"] = max_episode_steps
    return _Choice(env_type, settings, instruction)


class LeRobotTaskEnv(SeededTaskEnv):
    """The environments of a type, one for each task; those that can render at `look` only.

    Attributes:
        sight: eyes of the environment under way; None for one that renders at every step.
    """

    def __init__(self, choice: _Choice, max_episode_steps: int) -> None:
        """Make them all; most of LeRobot's build their simulator at the first reset."""
        self._envs, texts = _environments(choice)
        super().__init__(self._envs[0], max_episode_steps)
        self._seen = _Seen(_config(choice))
        self._choice, self._facts = choice, facts_of(choice.env_type)
        close = self._facts.sight
        self._sights = [None if close is None else close(env.unwrapped) for env in self._envs]
        self.action_space = _executed(self._envs[0].action_space, choice)
        self.sight: Sight | None = None
        self.task_text = texts[0]
        self._observation: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start the episode of a seed, which has the task of that seed."""
        assert seed is not None, "an episode is a function of its seed"
        state, number = divmod(seed, len(self._envs))
        self.env, self.sight = self._envs[number], self._sights[number]
        if self._facts.start is not None:
            self._facts.start(self.env.unwrapped, state)
        try:
            started = super().reset(seed=seed, options=options)
        except ImportError as error:  # of a simulator that is built now
            raise UserError(_not_installed(self._choice.env_type, error)) from None
        self.task_text = _text(self.env, self._choice)  # some write it when they start
        return started

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Execute one control step."""
        with _left_as_it_ended(self.env.unwrapped):
            return super().step(action)

    def state_of(self, observation: Any) -> np.ndarray:
        """What LeRobot calls `observation.state`."""
        self._observation = observation
        return self._seen.state(observation)

    def succeeded(self, info: Mapping[str, Any]) -> bool:
        """As LeRobot counts it."""
        return bool(info.get("is_success", False))

    def look(self) -> dict[str, np.ndarray]:
        """Rendered now, where the environment can be asked; else of its last step."""
        observation = self._observation if self.sight is None else self.sight.open()
        return self._seen.parts(observation)[1]

    def close(self) -> None:
        """Close them all."""
        for env in self._envs:
            env.close()


class _Seen:
    """From an environment's observation to state and images, as LeRobot's policies get them."""

    def __init__(self, config: Any) -> None:
        self._name = config.type
        self._processor, after = config.get_env_processors()
        if after.steps:
            raise UserError(
                f"--env.type={self._name} changes actions on their way to the simulator, which "
                "rollouts do not do"
            )

    def state(self, observation: Any) -> np.ndarray:
        """(S,) float32, without a look at pictures."""
        if not isinstance(observation, dict):
            raise UserError(
                f"--env.type={self._name} gives no state and pictures by name; its option "
                f"obs_type may: --env.options='{{obs_type: {SightByType.SEEING}}}'"
            )
        blind = {name: part for name, part in observation.items() if name != "pixels"}
        found = self._processed(blind).get(STATE_KEY)
        if found is None:
            raise UserError(f"--env.type={self._name} gives no {STATE_KEY}, which policies need")
        state: np.ndarray = found[0].float().numpy()
        return state.copy()

    def parts(self, observation: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """State, and name -> (height, width, 3) uint8."""
        state, images = self.state(observation), {}
        for key, image in self._processed(observation).items():
            if key.startswith("observation.image"):
                pixels = (image[0] * 255).round().byte().permute(1, 2, 0)
                images[key.removeprefix(IMAGE_PREFIX)] = pixels.contiguous().numpy()
        return state, images

    def _processed(self, observation: dict[str, Any]) -> dict[str, Any]:
        from lerobot.envs.utils import preprocess_observation

        seen: dict[str, Any] = self._processor(preprocess_observation(_batched(observation)))
        return seen


def _batched(part: Any) -> Any:
    """Every array with an axis of one environment, as a vector environment has it."""
    if isinstance(part, dict):
        return {name: _batched(value) for name, value in part.items()}
    return np.ascontiguousarray(part)[None]


def _make(choice: _Choice, max_episode_steps: int, rendering: bool) -> LeRobotTaskEnv:
    # Pictures are rendered in any case; mujoco reads the platform when it is imported.
    os.environ.setdefault("MUJOCO_GL", "egl")
    return LeRobotTaskEnv(choice, max_episode_steps)


def _config_class(env_type: str) -> Any:
    """LeRobot's config of a type.

    Raises:
        UserError: there is none, or its code would come from the Hub.
    """
    from lerobot.envs.configs import EnvConfig, HubEnvConfig
    from lerobot.utils.import_utils import register_third_party_plugins

    if env_type not in EnvConfig.get_known_choices():
        register_third_party_plugins()
    known = EnvConfig.get_known_choices()
    if env_type not in known:
        raise UserError(
            f"--env.type={env_type} is not known; there are robomimic, ogbench, and LeRobot's "
            f"{', '.join(sorted(set(known) - {'robomimic'}))}"
        )
    if issubclass(known[env_type], HubEnvConfig):
        raise UserError(f"--env.type={env_type} would run code from the Hub, which is not done")
    return known[env_type]


def _config(choice: _Choice) -> Any:
    import draccus

    config_class = _config_class(choice.env_type)
    fields = {item.name for item in dataclasses.fields(config_class)} - {"features", "features_map"}
    unknown = sorted(choice.options.keys() - fields)
    if unknown:
        raise UserError(
            f"--env.options has {', '.join(unknown)}; of --env.type={choice.env_type} there are "
            f"{', '.join(sorted(fields))}"
        )
    try:
        return draccus.decode(config_class, dict(choice.options))
    except Exception as error:  # whatever a type's own checks raise
        raise UserError(f"--env.options do not suit {choice.env_type}: {one_line(error)}") from None


def _environments(
    choice: _Choice,
) -> tuple[Sequence[gymnasium.Env[Any, np.ndarray]], Sequence[str]]:
    """All of a type's, in LeRobot's order, and what a policy is told in each."""
    from lerobot.envs.factory import make_env

    try:
        with _quiet():
            suites = make_env(_config(choice), n_envs=1, use_async_envs=False)
    except ImportError as error:
        raise UserError(_not_installed(choice.env_type, error)) from None
    except (ValueError, KeyError, AttributeError, gymnasium.error.Error) as error:
        raise UserError(
            f"LeRobot does not make --env.type={choice.env_type} with {dict(choice.options)}: "
            f"{type(error).__name__}: {error}"
        ) from None
    envs = [vector.envs[0] for tasks in suites.values() for vector in tasks.values()]
    return envs, [_text(env, choice) for env in envs]


def _text(env: gymnasium.Env[Any, np.ndarray], choice: _Choice) -> str:
    own = getattr(env.unwrapped, "task_description", None) or getattr(env.unwrapped, "task", None)
    text = choice.instruction or own or facts_of(choice.env_type).text
    if not text:
        raise UserError(
            f"--env.type={choice.env_type} does not say what its task is; tell the policy by "
            "--env.instruction='...'"
        )
    return str(text)


def _not_installed(env_type: str, error: ImportError) -> str:
    how = facts_of(env_type).install or f"uv pip install 'lerobot[{env_type}]==0.6.1'"
    reason = one_line(error)
    return f"--env.type={env_type} needs a simulator that is not here ({reason}): {how}"


def _one_of_all(
    envs: Sequence[gymnasium.Env[Any, np.ndarray]], env_type: str
) -> gymnasium.Env[Any, np.ndarray]:
    """The first, which stands for all."""
    first = envs[0]
    for env in envs:
        spaces = env.observation_space, env.action_space
        if spaces != (first.observation_space, first.action_space):
            raise UserError(
                f"the tasks of --env.type={env_type} have different observations or actions; name "
                "one of them by --env.task"
            )
    return first


def _executed(space: gymnasium.spaces.Space[np.ndarray], choice: _Choice) -> gymnasium.spaces.Box:
    """The box of what is executed as it is asked for: all numbers where its own is a formality."""
    assert isinstance(space, gymnasium.spaces.Box)
    if not facts_of(choice.env_type).nominal_box(choice.options):
        return space
    return gymnasium.spaces.Box(-np.inf, np.inf, space.shape, np.float32)


@contextlib.contextmanager
def _left_as_it_ended(env: Any) -> Iterator[None]:
    """Some of LeRobot's environments reset themselves in the step that ends an episode.

    That takes as long as any reset, and shows the next scene in the last frame of a film.
    """
    env.reset = lambda **_: (None, {})
    try:
        yield
    finally:
        del env.reset


def _check_limit(env: gymnasium.Env[Any, np.ndarray], asked: int, env_type: str) -> None:
    own = getattr(env.unwrapped, "_max_episode_steps", None)
    if own is not None and own < asked:
        raise UserError(
            f"--eval.max_episode_steps={asked} is more than the {own} steps that an episode of "
            f"--env.type={env_type} has"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """LeRobot tells what it makes; pygame greets."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
