"""What every family of environments keeps, as one suite: subclass it and say how to make yours.

    class TestMySimulator(FamilyContract):
        def make_family(self) -> EnvFamily: ...
        def winner(self, env): ...  # where a script solves the task within the limit

Everything is asked through the family, its environments and the pool alone. The fixtures are in
`conftest.py`; what is slow to make is made once for each subclass.
"""

from abc import ABC, abstractmethod

import numpy as np
import pytest

from vla_trqam.data.episode import Episode
from vla_trqam.envs.base import EnvFamily, TaskEnv
from vla_trqam.envs.rollout import ChunkPolicy, RolloutPool

HORIZON, SEEDS = 4, (3, 8, 5)


def chunks_of(family: EnvFamily) -> ChunkPolicy:
    """Depends on all that a policy is given, and asks for more than the limits at times."""
    low, high = np.array(family.action_low), np.array(family.action_high)

    def act(seen: object, seeds: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        state = seen["agent_pos"] if isinstance(seen, dict) else seen
        key = (int(seeds[0]), int(numbers[0]), int(np.abs(state).sum() * 1e3) % 2**31)
        drawn = np.random.default_rng(key).uniform(-0.3, 1.3, (1, HORIZON, len(low)))
        return (low + (high - low) * drawn).astype(np.float32)

    return act


def assert_same(got: Episode, expected: Episode, levels: int = 0) -> None:
    """To the bit; pictures up to so many grey levels."""
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    for name in ("terminated", "truncated", "success", "seed", "task"):
        assert getattr(got, name) == getattr(expected, name), name
    assert got.images.keys() == expected.images.keys()
    for name, images in got.images.items():
        assert_pictures(images, expected.images[name], levels)


def assert_pictures(now: np.ndarray, before: np.ndarray, levels: int) -> None:
    assert now.shape == before.shape
    assert np.abs(now.astype(np.int64) - before.astype(np.int64)).max(initial=0) <= levels


def played(env: TaskEnv, seed: int, actions: np.ndarray) -> list[np.ndarray]:
    """The states of an episode and what was seen at its beginning and end."""
    states = [env.reset(seed=seed)[0]]
    seen = [*env.look().values()]
    for action in actions:
        state, _, terminated, truncated, _ = env.step(action)
        states.append(state)
        if terminated or truncated:
            break
    return [np.stack(states), *seen, *env.look().values()]


class FamilyContract(ABC):
    """The suite.

    Attributes:
        single_in_thread: spares the pool of one worker a process, whose imports take ten seconds.
        levels: by which the renderer's pictures of one state may differ.
    """

    single_in_thread = False
    levels = 0

    @abstractmethod
    def make_family(self) -> EnvFamily:
        """Of a limit of so few steps that the suite is quick."""

    def winner(self, env: TaskEnv) -> tuple[int, np.ndarray] | None:
        """A seed and the actions that solve its episode; None where no script does so."""
        return None

    @pytest.fixture
    def moves(self, family: EnvFamily) -> np.ndarray:
        generator = np.random.default_rng(0)
        size = (family.max_episode_steps, family.action_size)
        return generator.uniform(family.action_low, family.action_high, size).astype(np.float32)

    def test_what_the_family_says_is_what_the_environment_has(self, family, env):
        state, info = env.reset(seed=1)
        assert (state.dtype, state.ndim) == (np.float32, 1)
        assert family.state_size in (None, len(state))
        assert info["is_success"] is False
        np.testing.assert_array_equal(env.action_space.low, np.float32(family.action_low))
        np.testing.assert_array_equal(env.action_space.high, np.float32(family.action_high))
        assert {name: image.shape for name, image in env.look().items()} == family.cameras
        assert all(image.dtype == np.uint8 for image in env.look().values())
        assert env.task_text in family.task_texts
        assert all(family.task_texts)
        assert family.control_rate > 0

    def test_seed_and_actions_alone_decide_an_episode(self, env, moves):
        first = played(env, 5, moves)
        played(env, 6, moves[::-1])
        np.random.seed(12)  # nor does the process-wide generator
        states, *seen = played(env, 5, moves)
        np.testing.assert_array_equal(states, first[0])
        for now, before in zip(seen, first[1:], strict=True):
            assert_pictures(now, before, self.levels)

    def test_another_seed_is_another_initial_state(self, env):
        """Of an arm that starts from one pose, only the pictures show where the objects are."""
        one, other = ([env.reset(seed=seed)[0], *env.look().values()] for seed in (5, 6))
        assert any((a != b).any() for a, b in zip(one, other, strict=True))

    def test_a_reset_leaves_the_process_wide_generator_alone(self, env):
        np.random.seed(3)
        expected = np.random.random()
        np.random.seed(3)
        env.reset(seed=4)
        assert np.random.random() == expected

    def test_an_episode_ends_at_the_limit_or_with_success(self, family, env, episodes):
        for episode in episodes:
            assert 1 <= episode.num_steps <= family.max_episode_steps
            assert episode.observations.shape[0] == episode.num_steps + 1
            assert episode.terminated != episode.truncated
            if episode.truncated:
                assert episode.num_steps == family.max_episode_steps
            assert episode.rewards[:-1].sum() == 0
            assert episode.rewards[-1] == episode.success

    def test_a_solved_episode_ends_there_with_reward_one(self, env):
        won = self.winner(env)
        if won is None:
            pytest.skip("no script solves it within so few steps")
        seed, actions = won
        env.reset(seed=seed)
        before, last = [0.0, False, False, False], [1.0, True, False, True]
        for number, action in enumerate(actions, start=1):
            _, *outcome, info = env.step(action)
            expected = last if number == len(actions) else before
            assert [*outcome, info["is_success"]] == expected, number

    def test_actions_are_executed_within_the_limits_and_stored_so(self, family, episodes):
        low, high = np.float32(family.action_low), np.float32(family.action_high)
        for episode in episodes:
            assert (episode.actions >= low).all()
            assert (episode.actions <= high).all()
            assert ((episode.actions == low) | (episode.actions == high)).any()

    def test_an_episode_carries_its_task(self, family, env, episodes):
        for episode in episodes:
            env.reset(seed=episode.seed)
            assert episode.task == env.task_text

    def test_cameras_look_where_the_policy_decides_and_where_the_limit_cuts(self, family, episodes):
        for episode in episodes:
            looks = -(-episode.num_steps // HORIZON) + episode.truncated
            shapes = {name: (looks, *shape) for name, shape in family.cameras.items()}
            assert {name: seen.shape for name, seen in episode.images.items()} == shapes
            assert (episode.observed is None) == (not shapes)
            assert not shapes or episode.where_observed.sum() == looks
            for seen in episode.images.values():
                assert (seen[0] != seen[-1]).any(), "the picture stands still"

    def test_one_worker_plays_the_episodes_of_two(self, family, episodes, request):
        if self.single_in_thread:
            request.getfixturevalue("in_thread")
        with RolloutPool(family, chunk_length=HORIZON, num_workers=1) as pool:
            for got, expected in zip(pool.run(chunks_of(family), SEEDS), episodes, strict=True):
                assert_same(got, expected, self.levels)
            every = max(family.max_episode_steps // 3, 1)
            (filmed,) = pool.record(chunks_of(family), SEEDS[:1], height=48, width=64, every=every)
        assert_same(filmed, episodes[0], self.levels)
        assert filmed.frames is not None
        assert filmed.frames.shape[1:] == (48, 64, 3)
        assert (filmed.frames[0] != filmed.frames[-1]).any()
