"""Next actions drawn before, and the learners that use them."""

import copy

import numpy as np
import pytest
import torch
from packed_policy import HORIZON, PackedPolicy, frame_episode, frame_replay

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.feature_cache import FRAME, FeatureCache, NumberedFeatures
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.engine.cached import Cached, CriticOnly, TrainedWeights
from vla_trqam.engine.folder.state import load_module_tensors, module_tensors
from vla_trqam.engine.next_actions import NextActions
from vla_trqam.methods.base import FlowActor
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

BATCH, CRITIC_BATCH, SLOTS = 8, 16, 3


@pytest.fixture
def setting(tmp_path):
    policy, replay = PackedPolicy(), frame_replay(tmp_path / "replay")
    cache = FeatureCache(replay, policy.packed, fingerprint="1")
    cache.update()
    yield policy, replay, cache
    replay.close()


def sampler(replay, cache):
    return replay.sampler(
        chunk_length=HORIZON,
        discount=0.9,
        short_chunks="pad",
        reward=RewardSpec(),
        observer=NumberedFeatures(cache, replay),
    )


def next_actions(policy, replay, cache):
    seen = NumberedFeatures(cache, replay)
    return NextActions(policy, FlowActor(policy), replay, seen, chunks_per_frame=SLOTS)


def make_learner(policy, replay, cache, critic_updates=3, **settings):
    torch.manual_seed(1)
    critic = Critic(CriticEnsemble(4, HORIZON * 2, (8,), 2))
    return Cached(
        TRQAM(policy, critic, TRQAMConfig()),
        next_actions(policy, replay, cache),
        sampler(replay, cache),
        critic_updates=critic_updates,
        batch_size=CRITIC_BATCH,
        **settings,
    )


def test_every_frame_gets_chunks_of_the_policy_from_standard_noise(setting):
    policy, replay, cache = setting
    actions = next_actions(policy, replay, cache)
    count = replay.num_frames
    assert actions.fill(torch.Generator().manual_seed(5), batch_size=count) == count
    generator = torch.Generator().manual_seed(5)
    rows = replay.frame_index.rows_of_frames()
    context = policy.encode(policy.packed(replay.observation_at(rows)))
    for slot in range(SLOTS):
        x_0 = torch.empty(count, *policy.chunk_shape).normal_(generator=generator)
        with torch.no_grad():
            x_1 = sample_ode(lambda x, tau: policy.velocity(x, tau, context), x_0, TimeGrid(4))
        assert torch.allclose(actions.chunks[:count, slot], x_1.clamp(-1, 1), atol=1e-6)


def test_frames_that_have_chunks_keep_them_and_new_ones_get_theirs(setting):
    policy, replay, cache = setting
    actions = next_actions(policy, replay, cache)
    generator = torch.Generator().manual_seed(0)
    actions.fill(generator)
    before, old = actions.chunks.clone(), replay.num_frames
    assert actions.fill(generator) == 0
    replay.add(frame_episode(6, success=False, seed=9), source="online")
    cache.update()
    assert actions.fill(generator) == replay.num_frames - old > 0
    assert torch.equal(actions.chunks[:old], before[:old])
    assert actions.chunks[old : replay.num_frames].abs().sum() > 0


def test_a_target_takes_one_of_the_frames_chunks_and_newer_ones_replace_them(setting):
    policy, replay, cache = setting
    actions = next_actions(policy, replay, cache)
    generator = torch.Generator().manual_seed(0)
    actions.fill(generator)
    frames = torch.tensor([3] * 200)
    picked = actions.pick(frames, generator)
    distance = (picked[:, None] - actions.chunks[3]).abs().amax(dim=(2, 3))
    assert (distance.amin(dim=1) == 0).all()
    assert set(distance.argmin(dim=1).tolist()) == set(range(SLOTS))
    newer = torch.full((1, HORIZON, 2), 0.5)
    actions.put(torch.tensor([3]), newer, generator)
    assert (actions.chunks[3] == 0.5).all(dim=(1, 2)).sum() == 1


def test_the_observation_bears_the_number_of_its_frame(setting):
    policy, replay, cache = setting
    rows = replay.frame_index.rows_of_frames()
    seen = NumberedFeatures(cache, replay, ("features",)).at(rows)
    assert seen[FRAME].tolist() == list(range(replay.num_frames))
    expected = policy.packed(replay.observation_at(rows))["features"]
    assert torch.equal(seen["features"], expected)


def test_the_warm_up_moves_the_critic_alone(setting):
    policy, replay, cache = setting
    learner = make_learner(policy, replay, cache)
    critic, before = learner.method.critic, copy.deepcopy(policy.state_dict())
    old = copy.deepcopy(critic.state_dict())
    warm, generator = CriticOnly(learner), torch.Generator().manual_seed(0)
    warm.update(learner.sampler.sample(BATCH, np.random.default_rng(0)), generator)
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    assert any(not torch.equal(v, old[k]) for k, v in critic.state_dict().items())
    assert warm.metrics()["td_loss"] > 0


def test_an_update_of_the_policy_brings_so_many_of_the_critic(setting, monkeypatch):
    policy, replay, cache = setting
    learner = make_learner(policy, replay, cache, critic_updates=3)
    sizes = []
    update = learner.method.update_critic
    monkeypatch.setattr(
        learner.method,
        "update_critic",
        lambda batch, *rest: sizes.append(len(batch)) or update(batch, *rest),
    )
    before = copy.deepcopy(policy.tuned.weight)
    batch = learner.sampler.sample(BATCH, np.random.default_rng(0))
    learner.update(batch, torch.Generator().manual_seed(0))
    assert sizes == [CRITIC_BATCH] * 3
    assert not torch.equal(policy.tuned.weight, before)
    drawn = learner.method.next_action
    frames = batch.next_observation[FRAME]
    kept = (learner.next_actions.chunks[frames] == drawn[:, None]).all(dim=(2, 3)).any(dim=1)
    # Of chunks with the same next frame only the last one put may be left.
    assert kept.sum() >= len(set(frames.tolist()))


def test_where_no_next_prefix_is_wanted_every_frame_that_is_bootstrapped_from_is_renewed(setting):
    """Also the last of an episode that was cut, at which no chunk begins."""
    policy, replay, cache = setting
    learner = make_learner(policy, replay, cache, critic_updates=0, draws_next=False)
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    for _ in range(100):
        learner.update(learner.sampler.sample(BATCH, rng), generator)
    every = learner.sampler.gather(np.arange(learner.sampler.num_starts))
    wanted = every.next_observation[FRAME][~every.terminated]
    begins = replay.frame_index.frames(learner.sampler.start_rows)
    assert set(wanted.tolist()) - set(begins.tolist()), "the replay has no such frame"
    assert (learner.next_actions.drawn[wanted] > 0).any(dim=1).all()
    replay.add(frame_episode(6, success=False, seed=9), source="online")
    cache.update()
    last = replay.num_frames - 1
    for _ in range(100):
        learner.update(learner.sampler.sample(BATCH, rng), generator)
    updates = learner.next_actions.updates
    assert (learner.next_actions.drawn[last] > updates - 100).any(), "an episode that came later"


def test_micro_batches_change_the_memory_and_not_the_update(setting):
    _, replay, cache = setting
    whole, parts = (
        make_learner(PackedPolicy(), replay, cache, critic_updates=1, num_micro_batches=count)
        for count in (1, 3)
    )
    parts.method.policy.load_state_dict(whole.method.policy.state_dict())
    for learner in (whole, parts):
        batch = learner.sampler.sample(BATCH, np.random.default_rng(0))
        for seed in range(3):
            learner.update(batch, torch.Generator().manual_seed(seed))
    assert len(parts.method._result.outputs) == 3
    expected, found = module_tensors(whole), module_tensors(parts)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name].float(), value.float(), atol=1e-5), name


def test_a_checkpoint_holds_what_is_trained_and_restores_it(setting):
    policy, replay, cache = setting
    learner = make_learner(policy, replay, cache)
    batch = learner.sampler.sample(BATCH, np.random.default_rng(0))
    learner.update(batch, torch.Generator().manual_seed(0))
    tensors = {k: v.clone() for k, v in module_tensors(learner).items()}
    assert {k for k in tensors if k.startswith("policy.")} == {
        "policy.tuned/weight",
        "policy.tuned/bias",
    }
    other = make_learner(PackedPolicy(), replay, cache)
    load_module_tensors(other, tensors)
    assert torch.equal(other.method.policy.tuned.weight, policy.tuned.weight)
    assert torch.equal(other.next_actions.chunks, learner.next_actions.chunks)
    assert other.next_actions.num_known == learner.next_actions.num_known > 0


def test_a_checkpoint_has_no_room_for_frames_yet_to_come(setting):
    policy, replay, cache = setting
    actions = next_actions(policy, replay, cache)
    actions.fill(torch.Generator().manual_seed(0))
    saved = actions.state_dict()["chunks"]
    assert len(saved) == replay.num_frames < len(actions.chunks)
    assert torch.equal(saved, actions.chunks[: replay.num_frames])


@pytest.mark.parametrize("strange", [{}, {"chunks": torch.zeros(2, SLOTS + 1, HORIZON, 2)}])
def test_next_actions_of_another_shape_are_refused(strange, setting):
    policy, *rest = setting
    actions = next_actions(policy, *rest)
    with pytest.raises(RuntimeError, match="chunks"):
        actions.load_state_dict(strange)


def test_trained_weights_are_the_policys_own():
    policy = PackedPolicy()
    trained = dict(TrainedWeights(policy).named_parameters())
    assert trained["tuned/weight"] is policy.tuned.weight
    assert set(trained) == {"tuned/weight", "tuned/bias"}
