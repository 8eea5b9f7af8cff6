from dataclasses import replace

import numpy as np
import pytest
import torch

from vla_trqam.data.transitions import TransitionBatch, chunk_return


def test_chunk_return_equals_the_naive_loop() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(50, 6))
    num_steps = rng.integers(0, 7, 50)
    expected = []
    for row, n in zip(rewards, num_steps, strict=True):
        total = 0.0
        for i in range(n):
            total += 0.97**i * row[i]
        expected.append(total)
    actual = chunk_return(torch.from_numpy(rewards), 0.97, torch.from_numpy(num_steps))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_chunk_return_ignores_what_lies_beyond_the_steps_taken() -> None:
    rewards = torch.tensor([[1.0, 1.0, float("nan"), float("inf")]])
    assert chunk_return(rewards, 0.5, torch.tensor([2])).tolist() == [1.5]


def test_batch_moves_and_concatenates_field_by_field() -> None:
    batch = TransitionBatch(
        observation=torch.randn(3, 4),
        action=torch.randn(3, 2, 1),
        chunk_return=torch.randn(3),
        next_observation=torch.randn(3, 4),
        discount=torch.rand(3),
        terminated=torch.tensor([True, False, False]),
        truncated=torch.tensor([False, True, False]),
        valid=torch.ones(3, 2, dtype=torch.bool),
        next_action=torch.randn(3, 1, 1),
    )
    assert len(batch) == 3
    assert batch.chunk_length == 2
    assert batch.to("meta").action.device.type == "meta"
    both = TransitionBatch.concatenate(batch, batch)
    assert len(both) == 6
    assert both.columns == {}
    for name, tensor in vars(both).items():
        if name == "columns":
            continue
        first = getattr(batch, name)
        assert torch.equal(tensor[:3], first), name
        assert torch.equal(tensor[3:], first), name


def test_next_actions_are_of_all_rows_or_of_none() -> None:
    batch = image_batch()
    assert batch.to("meta").next_action is None
    assert TransitionBatch.concatenate(batch, batch).next_action is None
    with pytest.raises(ValueError, match="next actions of one of two batches"):
        TransitionBatch.concatenate(batch, replace(batch, next_action=torch.zeros(2, 1, 1)))


def image_batch(**changes: object) -> TransitionBatch:
    observation = {"observation.state": torch.randn(2, 3), "task": ["lift", "put"]} | changes
    return TransitionBatch(
        observation=observation,
        action=torch.randn(2, 2, 1),
        chunk_return=torch.randn(2),
        next_observation=observation,
        discount=torch.rand(2),
        terminated=torch.tensor([True, False]),
        truncated=torch.tensor([False, True]),
        valid=torch.ones(2, 2, dtype=torch.bool),
    )


def test_dictionary_observations_move_and_concatenate_with_their_texts() -> None:
    batch = image_batch()
    assert len(batch) == 2
    moved = batch.to("meta")
    assert moved.next_observation["observation.state"].device.type == "meta"
    assert moved.observation["task"] == ["lift", "put"]
    both = TransitionBatch.concatenate(batch, batch)
    state = batch.observation["observation.state"]
    assert torch.equal(both.observation["observation.state"], torch.cat((state, state)))
    assert both.observation["task"] == ["lift", "put", "lift", "put"]


def test_dictionary_observations_of_other_keys_do_not_join() -> None:
    with pytest.raises(ValueError, match=r"observation.state.*camera.*do not join"):
        TransitionBatch.concatenate(image_batch(), image_batch(camera=torch.randn(2, 1)))
