"""How old the next actions are, and those that are drawn anew."""

import numpy as np
import pytest
import torch
from packed_policy import PackedPolicy, frame_replay

from vla_trqam.config.vla_settings import FinetuneVLAConfig, VLACriticConfig
from vla_trqam.data.feature_cache import FeatureCache
from vla_trqam.engine import next_actions
from vla_trqam.engine.next_actions import CHUNKS, NextActions, _last_of_same
from vla_trqam.errors import UserError
from vla_trqam.methods.base import FlowActor

SLOTS = 3


@pytest.fixture
def actions(tmp_path):
    policy, replay = PackedPolicy(), frame_replay(tmp_path / "replay")
    cache = FeatureCache(replay, policy.packed, fingerprint="1")
    cache.update()
    made = NextActions(policy, FlowActor(policy), replay, cache, chunks_per_frame=SLOTS)
    made.fill(torch.Generator().manual_seed(0))
    yield made
    replay.close()


def test_a_chunk_ages_by_every_update_of_the_policy_until_a_newer_one_takes_its_place(actions):
    generator, all_chunks = torch.Generator().manual_seed(1), actions.num_known * SLOTS
    assert actions.mean_age == 0.0
    for _ in range(4):
        actions.policy_moved()
    assert actions.mean_age == 4.0
    actions.put(torch.tensor([2, 5]), torch.zeros(2, *actions.chunks.shape[2:]), generator)
    assert actions.mean_age == pytest.approx(4 * (all_chunks - 2) / all_chunks)


def test_of_several_chunks_for_one_place_the_last_is_kept_whole():
    places = torch.tensor([4, 1, 4, 3, 1, 4])
    assert _last_of_same(places).tolist() == [5, 4, 5, 3, 4, 5]


def test_the_oldest_chunks_are_drawn_anew_by_the_policy_as_it_is(actions):
    generator, before = torch.Generator().manual_seed(1), actions.chunks.clone()
    actions.policy_moved()
    fresh = torch.arange(actions.num_known - 4)
    for slot in range(SLOTS):  # all but the last four frames are new
        actions.drawn[fresh, slot] = 1
    actions.redraw(4, generator)
    changed = (actions.chunks != before).any(dim=(2, 3))[: actions.num_known].sum(dim=1)
    assert changed.tolist() == [0] * (actions.num_known - 4) + [1] * 4
    assert (actions.drawn[: actions.num_known] == 1).sum() == len(fresh) * SLOTS + 4


class Still:
    """Never moves."""

    def chunk(self, context, noise):
        return torch.zeros_like(FlowActor(PackedPolicy()).chunk(context, noise))


def test_before_the_first_update_another_actor_may_draw(tmp_path):
    policy, replay = PackedPolicy(), frame_replay(tmp_path / "replay")
    cache = FeatureCache(replay, policy.packed, fingerprint="1")
    cache.update()
    made = NextActions(
        policy, FlowActor(policy), replay, cache, chunks_per_frame=SLOTS, first_actor=Still()
    )
    made.fill(torch.Generator().manual_seed(0))
    assert made.chunks.abs().max() == 0.0
    made.policy_moved()
    made.redraw(10**6, torch.Generator().manual_seed(1))
    assert (made.chunks[: made.num_known] != 0.0).any(dim=(2, 3)).sum() == made.num_known
    replay.close()


def test_redrawing_every_frame_as_often_as_it_has_chunks_leaves_nothing_old(actions):
    generator = torch.Generator().manual_seed(1)
    actions.policy_moved()
    for _ in range(SLOTS):
        assert actions.mean_age > 0.0
        actions.redraw(10**6, generator)
    assert actions.mean_age == 0.0


def test_a_redrawn_chunk_is_one_of_its_own_frame(actions, monkeypatch):
    asked = []
    draw = actions._draw

    def seen(rows, generator, count):
        asked.append((rows, count))
        return draw(rows, generator, count)

    monkeypatch.setattr(actions, "_draw", seen)
    actions.policy_moved()
    actions.drawn[3, 1] = -5
    actions.redraw(1, torch.Generator().manual_seed(1))
    ((rows, count),) = asked
    assert rows.tolist() == [actions._replay.frame_index.rows_of_frames()[3]]
    assert count == 1
    assert int(actions.drawn[3, 1]) == 1


def test_ages_survive_a_checkpoint_and_are_unknown_in_one_from_before_they_were_kept(actions):
    actions.policy_moved()
    saved = {key: value.clone() for key, value in actions.state_dict().items()}
    assert len(saved[CHUNKS]) == len(saved["drawn"]) == actions.num_known
    actions.policy_moved()
    actions.load_state_dict(saved)
    assert actions.mean_age == 1.0
    actions.load_state_dict({CHUNKS: saved[CHUNKS]})
    assert actions.mean_age is None


def test_a_negative_number_of_redraws_is_refused():
    with pytest.raises(UserError, match=r"critic\.redraws.*-1"):
        FinetuneVLAConfig(critic=VLACriticConfig(redraws=-1))


def test_rows_of_frames_are_the_frames_in_order(actions):
    index = actions._replay.frame_index
    assert np.array_equal(index.frames(index.rows_of_frames()), np.arange(actions.num_known))


def test_frames_with_large_prefixes_are_drawn_a_few_at_a_time(tmp_path, monkeypatch):
    """As many as their prefixes, one for each chunk, have room."""
    policy, replay = PackedPolicy(), frame_replay(tmp_path / "replay")
    cache = FeatureCache(replay, policy.packed, fingerprint="1")
    cache.update()
    seen = cache.at(replay.frame_index.rows_of_frames()[:1])
    size = sum(entry.nbytes for entry in seen.values() if isinstance(entry, torch.Tensor))
    made = NextActions(policy, FlowActor(policy), replay, cache, chunks_per_frame=SLOTS)
    parts = []
    draw = made._first_chunks
    monkeypatch.setattr(
        made, "_first_chunks", lambda rows, noise: parts.append(len(rows)) or draw(rows, noise)
    )
    monkeypatch.setattr(next_actions, "ROOM", 4 * SLOTS * size + 1)
    count = made.fill(torch.Generator().manual_seed(0))
    assert parts == [4] * (count // 4) + [count % 4] * (count % 4 > 0)
    assert len(parts) > 1
    replay.close()
