import timeit
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_trqam.data.episode import Episode
from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import ChunkSampler, MixedSampler, RewardSpec
from vla_trqam.errors import UserError

from .raw_episodes import make_episode

GAMMA = 0.9


def sampler_of(buffer: Replay, short_chunks: str = "drop", **changes: Any) -> ChunkSampler:
    arguments: dict[str, Any] = {
        "chunk_length": 5,
        "discount": GAMMA,
        "short_chunks": short_chunks,
        "reward": RewardSpec("success_minus_one"),
        **changes,
    }
    return buffer.sampler(**arguments)


def empty_replay(folder: Path, **columns: tuple[str, tuple[int, ...]]) -> Replay:
    return Replay.create(
        folder / "replay", observation_dim=19, action_dim=7, capacity=1000, columns=columns
    )


def naive_chunks(
    episodes: list[Episode], chunk_length: int, short_chunks: str, flow_length: int | None = None
) -> list[dict]:
    """Every admissible chunk, the slow and obvious way."""
    chunks, size = [], flow_length or chunk_length
    for episode in episodes:
        length = len(episode.actions)
        for start in range(length):
            n = min(chunk_length, length - start)
            if n < chunk_length and not (short_chunks == "pad" and episode.terminated):
                continue
            at_end = start + n == length
            actions = [episode.actions[min(start + i, length - 1)] for i in range(size)]
            total = 0.0
            for i in range(n):
                total += GAMMA**i * (episode.rewards[start + i] - 1)
            chunks.append(
                {
                    "observation": episode.observations[start],
                    "action": np.stack(actions),
                    "chunk_return": total,
                    "next_observation": episode.observations[start + n],
                    "discount": GAMMA**n,
                    "terminated": at_end and episode.terminated,
                    "truncated": at_end and not episode.terminated,
                    "valid": np.array([start + i < length for i in range(size)]),
                }
            )
    return chunks


@pytest.mark.parametrize("short_chunks", ["drop", "pad"])
@pytest.mark.parametrize(("chunk_length", "flow_length"), [(1, None), (3, None), (5, 5), (2, 6)])
def test_every_chunk_equals_the_naive_reading_of_the_episodes(
    buffer: Replay,
    episodes: list[Episode],
    short_chunks: str,
    chunk_length: int,
    flow_length: int | None,
) -> None:
    expected = naive_chunks(episodes, chunk_length, short_chunks, flow_length)
    sampler = sampler_of(buffer, short_chunks, chunk_length=chunk_length, flow_length=flow_length)
    assert sampler.num_starts == len(expected)
    batch = sampler.gather(np.arange(len(expected)))
    assert batch.columns == {}
    for name in expected[0]:
        tensor = getattr(batch, name)
        values = np.stack([chunk[name] for chunk in expected])
        assert tensor.shape == values.shape, name
        assert tensor.dtype == (torch.bool if values.dtype == bool else torch.float32), name
        np.testing.assert_allclose(tensor.numpy(), values, rtol=1e-6, err_msg=name)


def failing(length: int, cut: bool = False) -> Episode:
    """Ended by the simulator without success: something broke."""
    made = make_episode(1, length, terminated=False, truncated=True)
    return replace(made, terminated=not cut, truncated=cut)


@pytest.mark.parametrize("short_chunks", ["drop", "pad"])
def test_after_a_failure_that_ends_an_episode_every_step_would_cost_one(
    new_buffer: Callable[..., Replay], short_chunks: str
) -> None:
    """As if it went on for ten thousand steps, none of which succeeds."""
    buffer = new_buffer()
    buffer.add(failing(8), source="rollouts")
    buffer.add(failing(8, cut=True), source="rollouts")
    sampler = sampler_of(buffer, short_chunks, chunk_length=3)
    batch = sampler.gather(np.arange(sampler.num_starts))
    whole = -sum(GAMMA**i for i in range(10_000))
    ended = batch.terminated.numpy()
    assert ended.sum() == (3 if short_chunks == "pad" else 1)
    np.testing.assert_allclose(batch.chunk_return.numpy()[ended], whole, rtol=1e-6)
    steps = -sum(GAMMA**i for i in range(3))
    np.testing.assert_allclose(batch.chunk_return.numpy()[~ended], steps, rtol=1e-6)
    returns = buffer.returns_to_go(GAMMA, RewardSpec("success_minus_one"))
    np.testing.assert_allclose(returns[:8], whole, rtol=1e-9)
    assert np.isnan(returns[8:]).all()


def test_other_rewards_end_with_a_failure(new_buffer: Callable[..., Replay]) -> None:
    buffer = new_buffer()
    buffer.add(failing(8), source="first")
    buffer.add(failing(8), source="second")
    for reward in (RewardSpec("sparse"), RewardSpec("column")):
        sampler = sampler_of(buffer, chunk_length=3, reward=reward, discount=1.0)
        assert not sampler.gather(np.arange(sampler.num_starts)).chunk_return.any()
        assert not buffer.returns_to_go(1.0, reward).any()
    own = RewardSpec("success_minus_one", {"second": "column"})
    sampler = sampler_of(buffer, chunk_length=3, reward=own)
    batch = sampler.gather(np.arange(sampler.num_starts))
    found = batch.chunk_return.numpy()[batch.terminated.numpy()]
    np.testing.assert_allclose(found, [-1 / (1 - GAMMA), 0], rtol=1e-6)


def test_a_failure_for_ever_wants_a_discount(new_buffer: Callable[..., Replay]) -> None:
    buffer = new_buffer()
    sampler_of(buffer, discount=1.0)
    buffer.add(failing(8), source="rollouts")
    with pytest.raises(UserError, match="at -1 a step for ever: that wants a discount below 1"):
        sampler_of(buffer, discount=1.0)


def test_sampled_rows_are_chunks_of_the_replay(buffer: Replay, episodes: list[Episode]) -> None:
    expected = {chunk["observation"].tobytes(): chunk for chunk in naive_chunks(episodes, 5, "pad")}
    batch = sampler_of(buffer, "pad").sample(200, np.random.default_rng(0))
    for row in range(200):
        chunk = expected[batch.observation[row].numpy().tobytes()]
        assert np.array_equal(batch.action[row].numpy(), chunk["action"])
        assert np.array_equal(batch.next_observation[row].numpy(), chunk["next_observation"])
        assert bool(batch.terminated[row]) == chunk["terminated"]


@pytest.mark.parametrize("short_chunks", ["drop", "pad"])
def test_chunks_with_a_column_count_several_times(
    tmp_path: Path, episodes: list[Episode], short_chunks: str
) -> None:
    """Those with a true step among their own, in episodes of before and of later too."""
    replay = empty_replay(tmp_path, intervention=("bool", ()))
    rng = np.random.default_rng(0)
    taken = [rng.random(len(episode.actions)) < 0.15 for episode in episodes]
    wanted: list[float] = []
    sampler = sampler_of(replay, short_chunks, repeats={"intervention": 3})
    for episode, column in zip(episodes, taken, strict=True):
        replay.add(replace(episode, columns={"intervention": column}), source="dataset")
        length = len(column)
        for start in range(length):
            n = min(5, length - start)
            if n == 5 or (short_chunks == "pad" and episode.terminated):
                tells = column[start : start + n].any()
                wanted += (3 if tells else 1) * [float(episode.observations[start, 0])]
        assert sampler.num_starts == len(wanted)
    drawn = sampler.gather(np.arange(sampler.num_starts))
    assert drawn.observation[:, 0].tolist() == wanted
    assert sampler_of(replay, short_chunks).num_starts < len(wanted)
    plain = sampler_of(replay, short_chunks)
    every = plain.gather(np.arange(plain.num_starts)).observation[:, 0]
    assert torch.equal(sampler.gather(sampler.distinct).observation[:, 0], every)


def test_a_step_of_which_two_columns_tell_counts_once(
    episodes: list[Episode], tmp_path: Path
) -> None:
    """One of them has two numbers a step, such as one for each arm."""
    replay = empty_replay(tmp_path, intervention=("bool", (2,)), is_intervention=("bool", ()))
    rng, wanted = np.random.default_rng(0), []
    for episode in episodes:
        length = len(episode.actions)
        arms, all_of_it = rng.random((length, 2)) < 0.1, rng.random(length) < 0.1
        columns = {"intervention": arms, "is_intervention": all_of_it}
        replay.add(replace(episode, columns=columns), source="dataset")
        for start in range(length - 4):
            few, many = (c[start : start + 5].any() for c in (arms, all_of_it))
            times = 4 if many else 3 if few else 1
            wanted += times * [float(episode.observations[start, 0])]
    weights = {"intervention": 3, "is_intervention": 4}
    sampler = sampler_of(replay, "drop", repeats=weights)
    drawn = sampler.gather(np.arange(sampler.num_starts))
    assert drawn.observation[:, 0].tolist() == wanted


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_every_start_is_equally_likely(buffer: Replay, kind: str) -> None:
    generator = np.random.default_rng(0) if kind == "numpy" else torch.Generator().manual_seed(0)
    sampler = sampler_of(buffer, "pad")
    draws, num_starts = 40_000, sampler.num_starts
    first = sampler.sample(draws, generator).observation[:, 0].numpy()
    _, counts = np.unique(first, return_counts=True)
    assert len(counts) == num_starts
    expected = draws / num_starts
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = num_starts - 1
    assert abs(chi_square - degrees) < 4 * np.sqrt(2 * degrees)


def test_same_generator_state_gives_the_same_batch(buffer: Replay) -> None:
    sampler = sampler_of(buffer)
    first, second = (sampler.sample(32, np.random.default_rng(7)) for _ in range(2))
    tensors = {name: value for name, value in vars(first).items() if torch.is_tensor(value)}
    assert all(torch.equal(getattr(second, name), value) for name, value in tensors.items())


def test_sampler_sees_episodes_added_later(
    new_buffer: Callable[..., Replay], episodes: list[Episode]
) -> None:
    growing = new_buffer()
    sampler = sampler_of(growing, "pad")
    assert sampler.num_starts == 0
    with pytest.raises(UserError, match="no episode with a chunk of 5 steps"):
        sampler.sample(1, np.random.default_rng(0))
    for number, episode in enumerate(episodes):
        growing.add(episode, source="demonstrations")
        assert sampler.num_starts == len(naive_chunks(episodes[: number + 1], 5, "pad"))
    fresh = sampler_of(growing, "pad")
    every = np.arange(fresh.num_starts)
    assert torch.equal(sampler.gather(every).action, fresh.gather(every).action)


def test_sampler_forgets_episodes_cut_from_the_replay(
    buffer: Replay, episodes: list[Episode]
) -> None:
    sampler = sampler_of(buffer)
    buffer.truncate_to(2)
    replacement = [
        make_episode(500 + i, 8, terminated=True, truncated=False) for i in range(len(episodes) - 2)
    ]
    for episode in replacement:
        buffer.add(episode, source="demonstrations")
    expected = naive_chunks([*episodes[:2], *replacement], 5, "drop")
    assert sampler.num_starts == len(expected)
    actual = sampler.gather(np.arange(len(expected))).observation.numpy()
    assert np.array_equal(actual, np.stack([chunk["observation"] for chunk in expected]))


def test_sources_restrict_what_is_drawn(
    new_buffer: Callable[..., Replay], episodes: list[Episode]
) -> None:
    mixed = new_buffer()
    for number, episode in enumerate(episodes):
        mixed.add(episode, source="online" if number % 2 else "demonstrations")
    sampler = sampler_of(mixed, sources=("online",))
    expected = naive_chunks(episodes[1::2], 5, "drop")
    actual = sampler.gather(np.arange(sampler.num_starts)).observation.numpy()
    assert np.array_equal(actual, np.stack([chunk["observation"] for chunk in expected]))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("success_minus_one", [-1, -1, 0]), ("sparse", [0, 0, 1]), ("column", [0, 0, 1])],
)
def test_reward_is_made_from_the_stored_success(kind: str, expected: list[float]) -> None:
    stored = np.array([0, 0, 1], np.float32)
    spec = RewardSpec(kind)  # type: ignore[arg-type]
    assert spec.apply(stored).tolist() == expected
    assert kind in spec.describe()


def test_dense_reward_is_refused_where_a_success_reward_is_wanted() -> None:
    dense = np.array([0.25, 1.0], np.float32)
    assert RewardSpec("column").apply(dense).tolist() == dense.tolist()
    with pytest.raises(UserError, match=r"reward 0\.25.*'column'"):
        RewardSpec("sparse").apply(dense)
    with pytest.raises(UserError, match="success_minus_one, sparse, column"):
        RewardSpec("shaped")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_length": 0}, "chunk length is 0"),
        ({"discount": 1.5}, r"discount is 1\.5"),
        ({"discount": 0.0}, r"discount is 0\.0"),
        ({"short_chunks": "keep"}, "'drop' or 'pad'"),
    ],
)
def test_sampler_refuses_arguments_out_of_range(
    buffer: Replay, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sampler_of(buffer, **changes)


@pytest.fixture
def offline_and_online(
    new_buffer: Callable[..., Replay],
) -> tuple[Replay, Replay]:
    """Marked by the sign of the first observation entry: offline negative, online positive."""
    buffers = new_buffer("offline"), new_buffer("online")
    for sign, buffer, length in zip((-1, 1), buffers, (304, 104), strict=True):
        episode = make_episode(0, length, terminated=False, truncated=True)
        episode.observations[:, 0] = sign
        buffer.add(episode, source="demonstrations")
    return buffers


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.25, 16), (0.5, 32), (1.0, 64)])
def test_mixture_has_exactly_the_given_share_of_online_rows(
    offline_and_online: tuple[Replay, Replay], fraction: float, expected: int
) -> None:
    offline, online = map(sampler_of, offline_and_online)
    batch = MixedSampler(offline, online, online_fraction=fraction).sample(
        64, np.random.default_rng(0)
    )
    assert len(batch) == 64
    assert int((batch.observation[:, 0] > 0).sum()) == expected


@pytest.mark.parametrize("short_chunks", ["pad", "drop"])
def test_the_steps_that_chunks_reach_and_the_rows_where_they_begin(
    new_buffer: Callable[..., Replay], short_chunks: str
) -> None:
    buffer = new_buffer("both")
    for seed, (length, terminated) in enumerate(((9, True), (7, False), (2, False))):
        buffer.add(
            make_episode(seed, length, terminated=terminated, truncated=not terminated),
            source="demonstrations",
        )
    sampler = sampler_of(buffer, short_chunks=short_chunks)
    chunks = sampler.gather(np.arange(sampler.num_starts))
    first = torch.from_numpy(buffer.observations[sampler.start_rows])
    assert torch.equal(first, chunks.observation)
    reached, episodes = np.zeros(len(buffer.rewards), dtype=bool), buffer.episodes()
    for row in sampler.start_rows:
        number = np.searchsorted(episodes.first_observation, row, side="right") - 1
        step = episodes.first_step[number] + row - episodes.first_observation[number]
        end = episodes.first_step[number] + episodes.num_steps[number]
        reached[step : min(step + sampler.chunk_length, end)] = True
    assert sampler.reached_steps.tolist() == reached.tolist()


def test_mixture_without_fraction_is_uniform_over_the_union(
    offline_and_online: tuple[Replay, Replay],
) -> None:
    offline, online = map(sampler_of, offline_and_online)  # 300 and 100 starts
    mixed = MixedSampler(offline, online, online_fraction=None)
    assert mixed.num_starts == 400
    batch = mixed.sample(20_000, np.random.default_rng(0))
    share = (batch.observation[:, 0] > 0).float().mean().item()
    assert share == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 20_000))


def test_mixture_without_fraction_works_before_the_first_online_episode(
    offline_and_online: tuple[Replay, Replay], new_buffer: Callable[..., Replay]
) -> None:
    offline, empty = sampler_of(offline_and_online[0]), sampler_of(new_buffer("empty"))
    rng = np.random.default_rng(0)
    assert len(MixedSampler(offline, empty, online_fraction=None).sample(8, rng)) == 8
    with pytest.raises(UserError, match="no episode with a chunk"):
        MixedSampler(offline, empty, online_fraction=0.5).sample(8, rng)
    with pytest.raises(UserError, match="Neither"):
        MixedSampler(empty, empty, online_fraction=None).sample(8, rng)
    patient = MixedSampler(offline, empty, online_fraction=0.5, waits=True)
    assert len(patient.sample(8, rng)) == 8


def test_mixture_refuses_bad_fraction_and_differing_chunks(buffer: Replay) -> None:
    sampler = sampler_of(buffer)
    with pytest.raises(UserError, match=r"fraction is 1\.5"):
        MixedSampler(sampler, sampler, online_fraction=1.5)
    with pytest.raises(UserError, match="5 steps of 5 actions and the online ones 3 of 3"):
        MixedSampler(sampler, sampler_of(buffer, chunk_length=3), online_fraction=0.5)


def test_a_batch_of_128_is_drawn_within_150_microseconds(
    new_buffer: Callable[..., Replay],
) -> None:
    large = new_buffer(capacity=20_000)
    for seed in range(200):
        large.add(
            make_episode(seed, 100, terminated=True, truncated=False), source="demonstrations"
        )
    sampler = sampler_of(large, "pad")
    rng = np.random.default_rng(0)
    # The best of many short stretches: other processes on the machine must not fail this.
    seconds = min(timeit.repeat(lambda: sampler.sample(128, rng), number=20, repeat=50)) / 20
    assert seconds < 150e-6
