"""Rolls a policy out with images, into a `FrameReplay` or a LeRobotDataset."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from vla_trqam.data.frame_replay import (
    STATE_KEY,
    TASK_KEY,
    FrameEpisode,
    FrameObservation,
    FrameReplay,
    image_key,
)
from vla_trqam.data.lerobot_writer import write_lerobot_dataset
from vla_trqam.errors import UserError

ImagePolicy = Callable[[FrameObservation, np.ndarray, np.ndarray], np.ndarray]
"""(N observations in LeRobot's raw format, episode seeds (N,) int64, chunk indices (N,) int64) ->
(N, n, A) actions in the environment's units, all n of which are executed.

The seed and the index let a policy draw the same noise for the same chunk of the same episode."""

VectorEnv = gymnasium.vector.SyncVectorEnv | gymnasium.vector.AsyncVectorEnv


@dataclass(frozen=True)
class CollectedEpisode:
    """What became of one seed."""

    seed: int
    success: bool
    num_steps: int


class Collector:
    """Rolls a policy out in a vector environment with LeRobot's observations.

    The environment gives `agent_pos` and `pixels` (one camera or a dictionary of them) and
    `info["is_success"]`; `RobomimicImageEnv` and LeRobot's own do. Where `info["frame_is_new"]` is
    there, frames that are not new are not kept.
    """

    def __init__(
        self,
        env: VectorEnv,
        policy: ImagePolicy,
        *,
        max_episode_steps: int | None = None,
    ) -> None:
        """Prepare the rollouts.

        Args:
            env: of N environments, whose autoreset is gymnasium's NEXT_STEP or SAME_STEP.
            policy: see `ImagePolicy`; its actions are clipped to the action space when executed.
            max_episode_steps: truncate after so many steps; None asks the environment.

        Raises:
            UserError: the environment's observations have another layout.
        """
        spaces = env.single_observation_space
        if not isinstance(spaces, gymnasium.spaces.Dict) or not {"agent_pos", "pixels"} <= set(
            spaces
        ):
            raise UserError(
                "The environment gives no `agent_pos` and `pixels`, which a policy of images needs."
            )
        assert isinstance(env.single_action_space, gymnasium.spaces.Box)
        self._env, self._policy = env, policy
        self._low, self._high = env.single_action_space.low, env.single_action_space.high
        self._limit = max_episode_steps or int(env.call("_max_episode_steps")[0])
        self._tasks = [str(task) for task in env.call("task_description")]
        self._state_dim = int(np.prod(spaces["agent_pos"].shape or (1,)))
        self._cameras = {
            name: np.shape(image) for name, image in _cameras(spaces["pixels"].sample()).items()
        }

    def create_replay(self, path: Path, *, num_episodes: int) -> FrameReplay:
        """An empty replay with room for so many episodes."""
        steps = num_episodes * self._limit
        return FrameReplay.create(
            path,
            state_dim=self._state_dim,
            action_dim=int(np.prod(self._low.shape)),
            cameras={name: (s[0], s[1], s[2]) for name, s in self._cameras.items()},
            capacity=steps,
            frame_capacity=steps + num_episodes,
        )

    def collect(
        self,
        replay: FrameReplay,
        seeds: Sequence[int],
        *,
        source: str = "online",
        on_episode: Callable[[CollectedEpisode], None] | None = None,
    ) -> list[CollectedEpisode]:
        """One episode per seed, added to the replay in the order of `seeds`.

        Args:
            replay: from `create_replay`, or of the same shapes.
            seeds: of the initial states.
            source: name that the episodes get there.
            on_episode: called in the order of `seeds`, once the episode is in the replay.

        Raises:
            UserError: the environment renders too seldom for the policy's chunks, or the replay
                does not take an episode.
            ValueError: the policy returns something other than finite (N, n, A) numbers.
        """
        results: list[CollectedEpisode] = []

        def deliver(recording: _Recording) -> None:
            replay.add_episode(recording.finish(), source=source)
            results.append(recording.result())
            if on_episode is not None:
                on_episode(results[-1])

        for first in range(0, len(seeds), self._env.num_envs):
            self._round([int(s) for s in seeds[first : first + self._env.num_envs]], deliver)
        return results

    def _round(self, seeds: list[int], deliver: Callable[[_Recording], None]) -> None:
        """As many episodes as there are environments, or fewer; delivered in order."""
        idle = self._env.num_envs - len(seeds)
        all_seeds: list[int | None] = [*seeds, *[seeds[-1]] * idle]
        observation, info = self._env.reset(seed=all_seeds)
        recordings = [_Recording(seed, self._tasks[i]) for i, seed in enumerate(seeds)]
        for i, recording in enumerate(recordings):
            recording.see(_of_env(observation, i), new=True)
        delivered, step = 0, 0
        chunk = np.empty((0, 0, 0), np.float32)
        started = 0
        while delivered < len(recordings):
            active = [i for i, recording in enumerate(recordings) if not recording.ended]
            if step - started == chunk.shape[1]:
                chunk, started = self._chunks(recordings, active), step
            actions = np.clip(chunk[:, step - started], self._low, self._high)
            observation, rewards, terminated, truncated, info = self._env.step(actions)
            step += 1
            for i in active:
                ends = bool(terminated[i]), bool(truncated[i]) or step >= self._limit
                after, its_info = _after(observation, info, i, ended=ends[0] or bool(truncated[i]))
                recordings[i].step(actions[i], float(rewards[i]), *ends, its_info)
                recordings[i].see(after, new=bool(its_info.get("frame_is_new", True)))
            while delivered < len(recordings) and recordings[delivered].ended:
                deliver(recordings[delivered])
                delivered += 1

    def _chunks(self, recordings: list[_Recording], active: list[int]) -> np.ndarray:
        """(num_envs, n, A); zeros for the environments whose episode has ended."""
        asking = [recordings[i] for i in active]
        if not all(recording.observed[-1] for recording in asking):
            raise UserError(
                f"The policy executes chunks of other lengths than the environment renders for: "
                f"at step {len(asking[0].actions)} there is no new frame. Set render_every to the "
                "number of actions executed, or to a divisor of it."
            )
        seeds = np.array([recording.seed for recording in asking])
        index = np.array([recording.num_chunks for recording in asking])
        answer = np.asarray(self._policy(_batch(asking), seeds, index), dtype=np.float32)
        expected = (len(asking), *answer.shape[1:2], *self._low.shape)
        if answer.shape != expected or answer.size == 0 or not np.isfinite(answer).all():
            raise ValueError(
                f"the policy returned {answer.shape} for {len(asking)} observations; it must be "
                f"finite numbers (N, n, {', '.join(map(str, self._low.shape))})"
            )
        chunk = np.zeros((self._env.num_envs, *answer.shape[1:]), np.float32)
        chunk[active] = answer
        for recording in asking:
            recording.num_chunks += 1
        return chunk


def collect_dataset(
    collector: Collector,
    seeds: Sequence[int],
    root: Path,
    *,
    repo_id: str,
    fps: int,
    robot_type: str | None = None,
    use_videos: bool = False,
    on_episode: Callable[[CollectedEpisode], None] | None = None,
) -> int:
    """Collect one episode per seed into a LeRobotDataset, which `LeRobotReader` reads back.

    Interrupted by an exception or Ctrl-C, it writes the dataset of the whole episodes so far and
    raises on. Killed, it leaves them in `.collecting.<root's name>` beside `root`; the same call
    goes on from there.

    Args:
        collector: of the policy and the environment.
        seeds: of the initial states.
        root: folder of the dataset; must not exist.
        repo_id: see `write_lerobot_dataset`, as the next three.
        fps: control steps per second.
        robot_type: for the dataset's card.
        use_videos: lossy mp4 instead of PNG.
        on_episode: see `Collector.collect`.

    Returns:
        Episodes in the dataset.

    Raises:
        UserError: the folder exists, or as `Collector.collect`.
    """
    if root.exists():
        raise UserError(f"{root} exists already: name another folder for the dataset.")
    spool = root.with_name(f".collecting.{root.name}")
    if (spool / "replay.json").exists():
        replay = FrameReplay.open(spool)
    else:
        replay = collector.create_replay(spool, num_episodes=len(seeds))
    try:
        collector.collect(replay, seeds[replay.num_episodes :], on_episode=on_episode)
    finally:
        if replay.num_episodes:
            write_lerobot_dataset(
                replay,
                root,
                repo_id=repo_id,
                fps=fps,
                robot_type=robot_type,
                use_videos=use_videos,
            )
        count = replay.num_episodes
        replay.close()
        shutil.rmtree(spool)
    return count


@dataclass
class _Recording:
    """An episode under way."""

    seed: int
    task: str
    states: list[np.ndarray] = field(default_factory=list)
    frames: list[dict[str, np.ndarray]] = field(default_factory=list)
    observed: list[bool] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    terminated: bool = False
    truncated: bool = False
    success: bool = False
    num_chunks: int = 0

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated

    def see(self, observation: dict[str, Any], *, new: bool) -> None:
        self.states.append(np.asarray(observation["agent_pos"], np.float32).reshape(-1).copy())
        self.observed.append(new)
        if new:
            cameras = _cameras(observation["pixels"])
            self.frames.append({name: image.copy() for name, image in cameras.items()})

    def step(
        self,
        action: np.ndarray,
        reward: float,
        terminated: bool,
        truncated: bool,
        info: dict[str, Any],
    ) -> None:
        self.actions.append(action)
        self.rewards.append(reward)
        self.terminated, self.truncated = terminated, truncated and not terminated
        self.success = self.success or bool(info.get("is_success", False))

    def finish(self) -> FrameEpisode:
        return FrameEpisode(
            states=np.stack(self.states),
            images={n: np.stack([f[n] for f in self.frames]) for n in self.frames[0]},
            observed=np.array(self.observed),
            actions=np.stack(self.actions),
            rewards=np.array(self.rewards, np.float32),
            terminated=self.terminated,
            truncated=self.truncated,
            success=self.success,
            task=self.task,
        )

    def result(self) -> CollectedEpisode:
        return CollectedEpisode(self.seed, self.success, len(self.actions))


def _batch(recordings: list[_Recording]) -> FrameObservation:
    """What each sees now, in LeRobot's raw format."""
    observation: FrameObservation = {
        STATE_KEY: torch.from_numpy(np.stack([r.states[-1] for r in recordings]))
    }
    for name in recordings[0].frames[-1]:
        images = torch.from_numpy(np.stack([r.frames[-1][name] for r in recordings]))
        observation[image_key(name)] = (images.permute(0, 3, 1, 2).float() / 255).contiguous()
    observation[TASK_KEY] = [r.task for r in recordings]
    return observation


def _cameras(pixels: Any) -> dict[str, np.ndarray]:
    """Camera -> image; LeRobot calls a single camera without a name `observation.image`."""
    return dict(pixels) if isinstance(pixels, dict) else {"observation.image": pixels}


def _of_env(batched: Any, index: int) -> Any:
    """The part of environment `index` of a batched observation."""
    if isinstance(batched, dict):
        return {name: _of_env(value, index) for name, value in batched.items()}
    return batched[index]


def _after(observation: Any, info: dict[str, Any], index: int, *, ended: bool) -> tuple[Any, Any]:
    """What environment `index` showed after its step, whichever way the vector resets it."""
    if ended and "final_obs" in info and info["final_obs"][index] is not None:
        return info["final_obs"][index], _of_env(info["final_info"], index)
    return _of_env(observation, index), _of_env(info, index)
