import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vla_trqam.envs import worker
from vla_trqam.envs.chunked import ChunkEnv
from vla_trqam.envs.robomimic.env_meta import env_meta_for
from vla_trqam.envs.robomimic.family import robomimic_family
from vla_trqam.envs.rollout import RolloutPool
from vla_trqam.errors import UserError

SEEDS = [30, 10, 20]
NUM_STEPS = 12


def noise_policy(observations, seeds, indices):
    """Chunks that depend on the observation, the episode and the chunk; many beyond [-1, 1]."""
    rows = [
        np.random.default_rng([s, k]).normal(size=(5, 7))
        for s, k in zip(seeds, indices, strict=True)
    ]
    return np.stack(rows) + observations[:, :1, None]


def make_pool(**changes):
    settings = {"chunk_length": 5, "num_workers": 2} | changes
    names = {"max_episode_steps", "obs_keys"} & settings.keys()
    task = {"max_episode_steps": NUM_STEPS} | {name: settings.pop(name) for name in names}
    return RolloutPool(robomimic_family(env_meta_for("Lift"), **task), **settings)


@pytest.fixture(scope="module")
def pool():
    with make_pool() as pool:
        yield pool


@pytest.fixture(scope="module")
def episodes(pool):
    return pool.run(noise_policy, SEEDS)


def assert_same(got, expected):
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    for name in ("terminated", "truncated", "success", "seed"):
        assert getattr(got, name) == getattr(expected, name)


def test_sizes_are_known(pool):
    assert (pool.observation_size, pool.action_size) == (19, 7)


def test_episodes_come_in_the_order_of_the_seeds(pool, episodes):
    delivered = []
    pool.run(noise_policy, SEEDS, on_episode=delivered.append)
    assert [e.seed for e in episodes] == [e.seed for e in delivered] == SEEDS


def test_an_episode_has_one_observation_more_than_actions(episodes):
    for episode in episodes:
        assert episode.observations.shape == (NUM_STEPS + 1, 19)
        assert episode.actions.shape == (NUM_STEPS, 7)
        assert (episode.terminated, episode.truncated, episode.success) == (False, True, False)
        assert episode.rewards.tolist() == [0.0] * NUM_STEPS
        assert episode.frames is None


def test_stored_actions_are_the_policys_clipped_to_one(episodes):
    first = noise_policy(episodes[0].observations[:1], [30], [0])[0]
    assert np.abs(first).max() > 1
    np.testing.assert_array_equal(episodes[0].actions[:5], np.clip(first.astype(np.float32), -1, 1))


def test_an_episode_is_the_one_that_an_environment_in_this_process_gives(episodes, lift):
    lift._max_episode_steps, limit = NUM_STEPS, lift._max_episode_steps
    env = ChunkEnv(lift, chunk_length=5)
    for episode in episodes:
        observation, _ = env.reset(seed=episode.seed)
        for k in range(3):
            chunk = noise_policy(observation[None], [episode.seed], [k])[0]
            np.testing.assert_array_equal(episode.observations[5 * k], observation)
            observation, *_ = env.step(chunk)
        np.testing.assert_array_equal(episode.observations[-1], observation)
    lift._max_episode_steps = limit


def test_an_episode_does_not_depend_on_the_others(pool, episodes):
    alone = pool.run(noise_policy, [*SEEDS[::-1], 99])[2::-1]
    for got, expected in zip(alone, episodes, strict=True):
        assert_same(got, expected)


def test_an_episode_does_not_depend_on_the_number_of_workers(episodes, in_thread):
    with make_pool(num_workers=1) as single:
        for got, expected in zip(single.run(noise_policy, SEEDS), episodes, strict=True):
            assert_same(got, expected)


def test_no_seeds_give_no_episodes(pool):
    assert pool.run(noise_policy, []) == []


@pytest.mark.parametrize(
    "change", [{"chunk_length": 0}, {"num_workers": 0}, {"max_episode_steps": 0}]
)
def test_numbers_below_one_are_refused(change):
    with pytest.raises(UserError, match=f"{next(iter(change))} is 0"):
        make_pool(**change)


def test_recording_wants_positive_sizes(pool):
    with pytest.raises(UserError, match="every 0"):
        pool.record(noise_policy, [1], every=0)


def test_a_workers_user_error_reaches_the_user(in_thread):
    pool = make_pool(num_workers=1, obs_keys=["robot0_eef_poss"])
    with pytest.raises(UserError, match="robot0_eef_poss"):
        pool.run(noise_policy, [1])


def test_a_workers_failure_comes_with_its_traceback(in_thread, monkeypatch):
    monkeypatch.setattr(worker, "EnvServer", lambda settings: 1 / 0)
    pool = make_pool(num_workers=1)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ZeroDivisionError"):
        pool.run(noise_policy, [1])


def test_a_policy_of_the_wrong_shape_is_refused_and_closes_the_pool(in_thread):
    pool = make_pool(num_workers=1)
    with pytest.raises(ValueError, match=r"\(1, 4, 7\).*\(1, 5, 7\)"):
        pool.run(lambda observations, seeds, indices: np.zeros((1, 4, 7)), [1])
    with pytest.raises(RuntimeError, match="closed"):
        pool.run(noise_policy, [1])


def test_recorded_episodes_are_the_same_and_have_frames(episodes, in_thread):
    with make_pool(num_workers=1) as pool:
        # The thread that plays is started before the one that records: both draw from `np.random`.
        assert pool.observation_size == 19
        try:
            recorded = pool.record(noise_policy, SEEDS[:2], height=24, width=32, every=5)
        except UserError as error:
            pytest.skip(f"no off-screen rendering here: {error}")
    for got, expected in zip(recorded, episodes, strict=False):
        assert_same(got, expected)
        assert got.frames.shape == (4, 24, 32, 3)  # steps 0, 5, 10 and the last, 12
        assert got.frames.dtype == np.uint8
        assert got.frames.std() > 10
        assert (got.frames[0] != got.frames[-1]).any()


TRAINER = """
import signal
import sys
import numpy as np
from vla_trqam.envs.robomimic.env_meta import env_meta_for
from vla_trqam.envs.robomimic.family import robomimic_family
from vla_trqam.envs.rollout import RolloutPool

# A shell that starts us in the background has us ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

def policy(observations, seeds, indices):
    if seeds[0] == 1 and indices[0] == 0:
        print("running", flush=True)
    return np.zeros((1, 5, 7))

lift = robomimic_family(env_meta_for("Lift"), max_episode_steps=50)
with RolloutPool(lift, chunk_length=5, num_workers=1) as pool:
    print(*[w._process.pid for w in pool._workers], flush=True)
    try:
        pool.run(policy, range(100000))
    except KeyboardInterrupt:
        pool.close()
        sys.exit(130)
"""


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_ctrl_c_ends_workers_without_a_word_and_they_need_no_gl():
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER],
        env=environment | {"PYOPENGL_PLATFORM": "none"},  # any use of GL would fail
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        worker_pid = int(trainer.stdout.readline())
        assert trainer.stdout.readline() == "running\n"
        assert is_running(worker_pid)
        os.killpg(trainer.pid, signal.SIGINT)  # as a terminal does: the whole group gets it
        _, errors = trainer.communicate(timeout=120)
    finally:
        trainer.kill()
    assert not is_running(worker_pid)
    assert (trainer.returncode, errors) == (130, "")


def test_a_worker_ends_when_its_trainer_is_gone():
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "vla_trqam.envs.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
    ours.close()
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, b"")
