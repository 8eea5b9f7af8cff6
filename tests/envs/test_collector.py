"""A toy with LeRobot's observations instead of a simulator; the dataset's round trip is real."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from vla_trqam.data.frame_replay import FrameObservation, FrameReplay
from vla_trqam.data.lerobot_source import LeRobotConfig, LeRobotReader
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.envs.collector import CollectedEpisode, Collector, collect_dataset
from vla_trqam.envs.robomimic_images import HoldAfterEnd
from vla_trqam.errors import UserError

CHUNK, LIMIT = 3, 12


class Toy(gymnasium.Env[dict[str, Any], np.ndarray]):
    """Adds up actions; seeds divisible by 3 succeed after 4 + seed % 4 steps."""

    task_description = "add up"
    _max_episode_steps = LIMIT

    def __init__(self, render_every: int = CHUNK) -> None:
        self.observation_space = gymnasium.spaces.Dict(
            {
                "agent_pos": gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32),
                "pixels": gymnasium.spaces.Dict(
                    {"top": gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)}
                ),
            }
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._every = render_every

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._seed, self._t = 0 if seed is None else seed, 0
        self._sum = np.zeros(2, np.float32)
        self._look()
        return self._observation(), {"frame_is_new": True, "is_success": False}

    def step(self, action: np.ndarray) -> Any:
        assert (np.abs(action) <= 1).all()
        self._t += 1
        self._sum = self._sum + action
        success = self._seed % 3 == 0 and self._t == 4 + self._seed % 4
        truncated = not success and self._t >= LIMIT
        new = not success and (truncated or self._t % self._every == 0)
        if new:
            self._look()
        info = {"frame_is_new": new, "is_success": success}
        return self._observation(), float(success), success, truncated, info

    def _look(self) -> None:
        self._image = np.full((8, 8, 3), (17 * self._seed + 5 * self._t) % 256, np.uint8)

    def _observation(self) -> dict[str, Any]:
        state = np.array([*self._sum, self._t], np.float32)
        return {"agent_pos": state, "pixels": {"top": self._image}}


def policy(observation: FrameObservation, seeds: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Depends on everything that it is given, and asks for more than 1 at times."""
    state, image = observation["observation.state"], observation["observation.images.top"]
    assert isinstance(state, torch.Tensor)
    assert isinstance(image, torch.Tensor)
    assert image.dtype == torch.float32
    assert image.shape[1:] == (3, 8, 8)
    assert observation["task"] == ["add up"] * len(seeds)
    lead = state[:, :1].numpy() + image[:, 0, :1, 0].numpy() + seeds[:, None] / 7 + index[:, None]
    return 1.3 * np.sin(lead[:, :, None] + np.arange(CHUNK * 2).reshape(1, CHUNK, 2))


def vector(num_envs: int, mode: AutoresetMode, *, held: bool = False, every: int = CHUNK) -> Any:
    def make() -> gymnasium.Env[Any, Any]:
        return HoldAfterEnd(Toy(every)) if held else Toy(every)

    return SyncVectorEnv([make] * num_envs, autoreset_mode=mode)


def collect(path: Path, env: Any, seeds: list[int]) -> tuple[FrameReplay, list[CollectedEpisode]]:
    collector = Collector(env, policy)
    replay = collector.create_replay(path, num_episodes=len(seeds))
    return replay, collector.collect(replay, seeds)


def alone(seed: int) -> tuple[list[np.ndarray], list[np.ndarray], bool]:
    """States, executed actions and success of one episode by a plain loop."""
    env = Toy()
    observation, _ = env.reset(seed=seed)
    states, actions, chunk = [observation["agent_pos"]], [], np.empty((0, 2))
    for t in range(LIMIT):
        if t % CHUNK == 0:
            raw: FrameObservation = {
                "observation.state": torch.from_numpy(observation["agent_pos"])[None],
                "observation.images.top": torch.from_numpy(observation["pixels"]["top"])
                .permute(2, 0, 1)[None]
                .float()
                / 255,
                "task": ["add up"],
            }
            chunk = policy(raw, np.array([seed]), np.array([t // CHUNK]))[0]
        actions.append(np.clip(chunk[t % CHUNK].astype(np.float32), -1, 1))
        observation, _, terminated, truncated, _ = env.step(actions[-1])
        states.append(observation["agent_pos"])
        if terminated or truncated:
            break
    return states, actions, terminated


@pytest.mark.parametrize(
    ("mode", "held"),
    [
        (AutoresetMode.NEXT_STEP, False),
        (AutoresetMode.NEXT_STEP, True),
        (AutoresetMode.SAME_STEP, False),
    ],
)
def test_episodes_equal_a_plain_loop_over_one_environment(
    tmp_path: Path, mode: AutoresetMode, held: bool
) -> None:
    seeds = [3, 1, 6, 2, 9]
    replay, results = collect(tmp_path / "replay", vector(2, mode, held=held), seeds)
    table = replay.steps.episodes()
    for number, seed in enumerate(seeds):
        states, actions, success = alone(seed)
        first, steps = table.first_step[number], table.num_steps[number]
        row = table.first_observation[number]
        assert np.array_equal(replay.steps.observations[row : row + steps + 1], states)
        assert np.array_equal(replay.steps.actions[first : first + steps], actions)
        ends = table.terminated[number], table.truncated[number], table.success[number]
        assert ends == (success, not success, success)
        assert results[number] == CollectedEpisode(seed, success, len(actions))
        shown = [t for t in range(steps) if t % CHUNK == 0] + ([] if success else [steps])
        assert (
            np.flatnonzero(replay.frame_index.known(row + np.arange(steps + 1))).tolist() == shown
        )


def test_limit_of_an_environment_that_never_truncates_is_a_truncation(tmp_path: Path) -> None:
    collector = Collector(vector(1, AutoresetMode.NEXT_STEP, every=1), policy, max_episode_steps=6)
    replay = collector.create_replay(tmp_path / "replay", num_episodes=1)
    collector.collect(replay, [1])
    table = replay.steps.episodes()
    assert (table.num_steps[0], table.truncated[0], table.terminated[0]) == (6, True, False)


def test_rendering_too_seldom_for_the_chunks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at step 3 there is no new frame. Set render_every"):
        collect(tmp_path / "replay", vector(1, AutoresetMode.NEXT_STEP, every=4), [1])


def test_environment_without_images_is_refused() -> None:
    env = gymnasium.make_vec("CartPole-v1", num_envs=1)
    with pytest.raises(UserError, match="`agent_pos` and `pixels`"):
        Collector(env, policy)


def transitions(replay: FrameReplay) -> Any:
    sampler = replay.sampler(
        chunk_length=CHUNK, discount=0.9, short_chunks="pad", reward=RewardSpec()
    )
    return sampler.gather(np.arange(sampler.num_starts))


def read(root: Path, path: Path) -> FrameReplay:
    reader = LeRobotReader(LeRobotConfig("local/rollouts", root=root))
    replay = reader.create_replay(path)
    reader.load_into(replay, say=lambda line: None)
    return replay


@pytest.mark.slow
class TestDataset:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(self, root: Path, seeds: list[int], **changes: Any) -> int:
        collector = Collector(vector(2, AutoresetMode.NEXT_STEP, held=True), policy)
        return collect_dataset(collector, seeds, root, repo_id="local/rollouts", fps=20, **changes)

    def test_dataset_reads_back_to_what_was_collected(self, tmp_path: Path) -> None:
        seeds = [3, 1, 6, 2]
        direct, _ = collect(tmp_path / "direct", vector(2, AutoresetMode.NEXT_STEP), seeds)
        assert self.run(tmp_path / "set", seeds) == 4
        again = transitions(read(tmp_path / "set", tmp_path / "again"))
        expected = transitions(direct)
        assert expected.truncated.any()
        assert expected.terminated.any()
        for name in ("action", "chunk_return", "discount", "terminated", "truncated", "valid"):
            assert torch.equal(getattr(again, name), getattr(expected, name)), name
        open_ended = ~expected.terminated
        for key in ("observation.state", "observation.images.top"):
            assert torch.equal(again.observation[key], expected.observation[key])
            ours, theirs = again.next_observation[key], expected.next_observation[key]
            assert torch.equal(ours[open_ended], theirs[open_ended])
        assert again.observation["task"] == expected.observation["task"]
        assert not list(tmp_path.glob(".collecting.*"))

    def test_interruption_leaves_a_readable_dataset_of_whole_episodes(self, tmp_path: Path) -> None:
        def interrupt(episode: CollectedEpisode) -> None:
            if episode.seed == 6:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path / "set", [3, 1, 6, 2, 9], on_episode=interrupt)
        replay = read(tmp_path / "set", tmp_path / "again")
        lengths = [len(alone(seed)[1]) for seed in (3, 1, 6)]
        assert replay.steps.episodes().num_steps.tolist() == lengths

    def test_killed_collection_goes_on_where_it_was(self, tmp_path: Path) -> None:
        seeds = [3, 1, 6, 2]
        env = vector(2, AutoresetMode.NEXT_STEP, held=True)
        part = Collector(env, policy).create_replay(
            tmp_path / ".collecting.set", num_episodes=len(seeds)
        )
        Collector(env, policy).collect(part, seeds[:3])
        part.close()
        told: list[CollectedEpisode] = []
        assert self.run(tmp_path / "set", seeds, on_episode=told.append) == 4
        assert [episode.seed for episode in told] == [2]
        lengths = [len(alone(seed)[1]) for seed in seeds]
        replay = read(tmp_path / "set", tmp_path / "again")
        assert replay.steps.episodes().num_steps.tolist() == lengths

    def test_existing_folder_is_refused_before_anything_is_collected(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="exists already"):
            self.run(tmp_path, [1])
