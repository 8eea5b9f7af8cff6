"""What a rollout with images becomes in the replay."""

import numpy as np
import pytest
from packed_policy import ACTION, CAMERA, HORIZON, STATE, TASK, PackedPolicy, frame_replay

from vla_trqam.data.episode import Episode
from vla_trqam.data.feature_cache import FeatureCache
from vla_trqam.engine.episode_store import EpisodeStore
from vla_trqam.envs.rollout import where_cameras_look


def rolled_out(steps, *, terminated):
    """As a pool with cameras gives it: images at decisions, and where the limit cut."""
    looks = len(range(0, steps, HORIZON)) + (not terminated)
    observed = where_cameras_look(steps, HORIZON, terminated)
    rng = np.random.default_rng(steps)
    return Episode(
        observations=rng.normal(size=(steps + 1, STATE)).astype(np.float32),
        actions=np.zeros((steps, ACTION), np.float32),
        rewards=np.zeros(steps, np.float32),
        terminated=terminated,
        truncated=not terminated,
        success=terminated,
        seed=1,
        task=TASK + " it",
        images={CAMERA: rng.integers(0, 256, (looks, 4, 4, 3), dtype=np.uint8)},
        observed=observed,
    )


@pytest.mark.parametrize(
    ("steps", "terminated", "expected"),
    [
        (5, True, [0, 2, 4]),
        (4, True, [0, 2]),
        (5, False, [0, 2, 4, 5]),
        (4, False, [0, 2, 4]),
        (1, True, [0]),
    ],
)
def test_images_belong_to_decisions_and_to_the_state_at_the_limit(
    tmp_path, steps, terminated, expected
):
    policy, replay = PackedPolicy(), frame_replay(tmp_path / "replay")
    cache = FeatureCache(replay, policy.packed, fingerprint="1")
    store = EpisodeStore(replay, cache)
    first_row, episode = (
        replay.num_steps + replay.num_episodes,
        rolled_out(steps, terminated=terminated),
    )
    store.add(episode, source="online")
    rows = np.arange(first_row, first_row + steps + 1)
    assert np.flatnonzero(replay.frame_index.known(rows)).tolist() == expected
    assert np.array_equal(replay.images(CAMERA)[-len(expected) :], episode.images[CAMERA])
    assert cache.num_frames == replay.num_frames
    assert store.num_episodes == 6
    assert replay.task_of_episodes()[-2:] == [TASK, episode.task]
    replay.close()
