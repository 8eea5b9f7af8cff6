import gymnasium
import numpy as np
import pytest

from vla_trqam.envs.chunked import ChunkEnv


class Counter(gymnasium.Env):
    """Observes how many steps were taken and the last action; succeeds after five steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(2, np.float32), {"is_success": False}

    def step(self, action):
        self.steps += 1
        done = self.steps == 5
        observation = np.array([self.steps, action[0]], np.float32)
        return observation, float(done), done, False, {"is_success": done}


@pytest.fixture
def env():
    env = ChunkEnv(Counter(), chunk_length=3)
    env.reset()
    return env


def test_action_space_is_the_chunk(env):
    assert env.action_space.shape == (3, 1)


def test_a_whole_chunk_is_executed_and_recorded(env):
    chunk = np.array([[0.1], [-0.2], [0.3]], np.float32)
    observation, reward, terminated, truncated, info = env.step(chunk)
    np.testing.assert_allclose(observation, [3, 0.3])
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert (info["num_steps"], info["is_success"]) == (3, False)
    np.testing.assert_allclose(info["chunk_observations"], [[0, 0], [1, 0.1], [2, -0.2]])
    np.testing.assert_array_equal(info["chunk_actions"], chunk)


def test_a_chunk_stops_where_the_episode_ends(env):
    env.step(np.zeros((3, 1)))
    observation, reward, terminated, _, info = env.step(np.full((3, 1), 0.5))
    assert observation[0] == 5
    assert (reward, terminated, info["num_steps"], info["is_success"]) == (1.0, True, 2, True)
    np.testing.assert_allclose(info["chunk_rewards"], [0, 1, 0])
    np.testing.assert_allclose(info["chunk_actions"], [[0.5], [0.5], [0]])
    np.testing.assert_allclose(info["chunk_observations"][2], 0)


def test_a_step_before_the_reset_or_after_the_end_is_refused(env):
    env.step(np.zeros((3, 1)))
    env.step(np.zeros((3, 1)))
    for unready in (env, ChunkEnv(Counter(), chunk_length=3)):
        with pytest.raises(gymnasium.error.ResetNeeded):
            unready.step(np.zeros((3, 1)))


def test_recorded_actions_are_the_clipped_ones(env):
    info = env.step(np.array([[2.0], [-3.0], [0.5]]))[4]
    np.testing.assert_array_equal(info["chunk_actions"], [[1.0], [-1.0], [0.5]])


def test_bad_chunks_are_refused(env):
    with pytest.raises(ValueError, match=r"\(2, 1\); it must be \(3, 1\)"):
        env.step(np.zeros((2, 1)))
    with pytest.raises(ValueError, match="chunk_length is 0"):
        ChunkEnv(Counter(), chunk_length=0)


def test_gymnasiums_vector_environment_takes_chunks():
    vector = gymnasium.vector.SyncVectorEnv([lambda: ChunkEnv(Counter(), chunk_length=3)] * 2)
    vector.reset()
    infos = [vector.step(np.zeros((2, 3, 1)))[4] for _ in range(2)]
    assert [info["num_steps"].tolist() for info in infos] == [[3, 3], [2, 2]]
    assert infos[0]["chunk_observations"].shape == (2, 3, 2)
