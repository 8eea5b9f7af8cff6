import numpy as np
import pytest

from vla_trqam.envs.env_meta import env_meta_for
from vla_trqam.envs.vector import make_vector_env


@pytest.mark.slow
def test_vector_environment_steps_as_a_single_one_does(lift, restless_actions):
    chunk = restless_actions(3, 1).clip(-1, 1).astype(np.float32)
    vector = make_vector_env(env_meta_for("Lift"), num_envs=1, max_episode_steps=9, chunk_length=3)
    first, _ = vector.reset(seed=[5])
    got, *_, info = vector.step(chunk[None])
    vector.close()
    assert info["num_steps"].tolist() == [3]
    np.testing.assert_array_equal(first[0], lift.reset(seed=5)[0])
    for action in chunk:
        expected = lift.step(action)[0]
    np.testing.assert_array_equal(got[0], expected)
