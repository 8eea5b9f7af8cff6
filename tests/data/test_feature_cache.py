from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vla_trqam.data import feature_cache
from vla_trqam.data.feature_cache import ComputedFeatures, FeatureCache
from vla_trqam.data.frame_files import CacheHeader
from vla_trqam.data.frames import FrameObservation
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.errors import UserError

from .raw_frames import ACTION_DIM, CAMERAS, STATE_DIM, frame_episode


class Counter:
    """Features that tell the frames apart, and how many were asked for."""

    def __init__(self) -> None:
        self.frames = 0

    def __call__(self, observation: FrameObservation) -> dict[str, Tensor]:
        image = observation["observation.images.front"]
        state = observation["observation.state"]
        assert isinstance(image, Tensor)
        assert isinstance(state, Tensor)
        self.frames += len(image)
        if image.dtype == torch.uint8:  # as a cache hands them over
            image = image.float() / 255
        return {
            "mean": image.flatten(1).mean(1, keepdim=True).expand(-1, 5),
            "state": state.bfloat16()[:, None],
        }


@pytest.fixture
def replay(tmp_path: Path) -> Replay:
    replay = Replay.create(
        tmp_path / "replay",
        observation_dim=STATE_DIM,
        action_dim=ACTION_DIM,
        cameras=CAMERAS,
        capacity=200,
    )
    for seed in range(3):
        episode = frame_episode(seed, 9, terminated=seed == 0, every=seed + 1)
        replay.add(episode, source="demonstrations")
    return replay


def sample(replay: Replay, observer: Any) -> Any:
    sampler = replay.sampler(
        chunk_length=3,
        discount=0.9,
        short_chunks="drop",
        reward=RewardSpec("sparse"),
        observer=observer,
    )
    return sampler.gather(np.arange(sampler.num_starts))


def test_cached_rows_are_the_features_of_the_batchs_observations(replay: Replay) -> None:
    compute = Counter()
    cache = FeatureCache(replay, compute, fingerprint="a")
    cache.update(batch_size=4)
    cached, raw = sample(replay, cache), sample(replay, None)
    for key in ("observation", "next_observation"):
        expected = Counter()(getattr(raw, key))
        assert getattr(cached, key).keys() == expected.keys()
        for name, value in expected.items():
            assert getattr(cached, key)[name].dtype == value.dtype
            torch.testing.assert_close(getattr(cached, key)[name], value, rtol=0, atol=0)
    assert torch.equal(cached.action, raw.action)


def test_features_that_are_computed_when_wanted_are_those_that_a_cache_keeps(
    replay: Replay,
) -> None:
    """Where an episode terminated too: no picture of one state beside the numbers of another."""
    cache = FeatureCache(replay, Counter(), fingerprint="1")
    cache.update()
    rows = np.arange(len(replay.observations))
    assert not replay.frame_index.known(rows).all()
    kept, computed = cache.at(rows), ComputedFeatures(replay, Counter()).at(rows)
    for name in ("mean", "state"):
        assert torch.equal(computed[name], kept[name]), name


def test_each_frame_is_computed_once_even_over_a_restart(replay: Replay) -> None:
    compute = Counter()
    cache = FeatureCache(replay, compute, fingerprint="a")
    assert cache.update() == replay.num_frames == compute.frames
    assert cache.update() == 0
    replay.add(frame_episode(9, 4, terminated=True), source="online")
    assert cache.update() == 5
    replay.close()
    again = FeatureCache(Replay.open(replay.path), compute, fingerprint="a")
    assert again.update() == 0
    assert compute.frames == replay.num_frames


def test_another_fingerprint_computes_all_again(replay: Replay) -> None:
    FeatureCache(replay, Counter(), fingerprint="a").update()
    compute = Counter()
    FeatureCache(replay, compute, fingerprint="b").update()
    assert compute.frames == replay.num_frames


def test_rows_under_way_are_not_another_fingerprints(
    replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between two batches, after which the former features are asked for again."""
    FeatureCache(replay, Counter(), fingerprint="a").update()
    other = FeatureCache(replay, Counter(), fingerprint="b")
    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "_save", lambda *_: None)  # as if it were killed before
        other.update(batch_size=4)
    compute = Counter()
    again = FeatureCache(replay, compute, fingerprint="a")
    again.update()
    assert compute.frames == replay.num_frames


def test_what_counts_lies_on_the_disk_itself_where_that_is_asked(
    replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    monkeypatch.setattr(feature_cache, "SAVED_EVERY", 0.0)
    write, flush = CacheHeader.write, FeatureCache.flush

    def written(self: CacheHeader, folder: Path) -> None:
        done.append(("header", self.num_frames))
        write(self, folder)

    def flushed(self: FeatureCache) -> None:
        done.append(("rows", self.num_frames))
        flush(self)

    monkeypatch.setattr(CacheHeader, "write", written)
    monkeypatch.setattr(FeatureCache, "flush", flushed)
    FeatureCache(replay, Counter(), fingerprint="a").update(batch_size=10, safe=True)
    frames = replay.num_frames
    steps = [10, 20, frames, frames] if frames > 20 else [10, frames, frames]
    assert done == [("header", 0), *((what, n) for n in steps for what in ("rows", "header"))]
    done.clear()
    FeatureCache(replay, Counter(), fingerprint="b").update()
    assert {what for what, _ in done} == {"header"}


def test_frames_that_were_replaced_are_computed_again(replay: Replay) -> None:
    cache = FeatureCache(replay, Counter(), fingerprint="a")
    cache.update()
    replay.truncate_to(1)
    replay.add(frame_episode(50, 30, terminated=False), source="online")
    with pytest.raises(UserError, match="update the cache"):
        sample(replay, cache)
    cache.update()
    cached, raw = sample(replay, cache), sample(replay, None)
    assert torch.equal(cached.observation["mean"], Counter()(raw.observation)["mean"])


def test_sampling_before_the_update_is_refused(replay: Replay) -> None:
    cache = FeatureCache(replay, Counter(), fingerprint="a")
    with pytest.raises(UserError, match="update the cache after adding episodes"):
        sample(replay, cache)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (torch.zeros(1, 2), r"feature f has shape \(1, 2\) for"),
        (torch.zeros(32, 2, dtype=torch.float64)[:22], r"is torch.float64; a cache keeps float32"),
    ],
)
def test_features_that_cannot_be_kept_are_refused(
    replay: Replay, feature: Tensor, message: str
) -> None:
    cache = FeatureCache(replay, lambda _: {"f": feature[: replay.num_frames]}, fingerprint="a")
    with pytest.raises(UserError, match=message):
        cache.update(batch_size=replay.num_frames)


def test_features_of_another_shape_under_the_same_fingerprint_are_refused(
    replay: Replay,
) -> None:
    FeatureCache(replay, Counter(), fingerprint="a").update()
    replay.add(frame_episode(9, 4, terminated=True), source="online")
    other = FeatureCache(replay, lambda o: {"f": torch.zeros(5, 1)}, fingerprint="a")
    with pytest.raises(UserError, match="another fingerprint"):
        other.update()
