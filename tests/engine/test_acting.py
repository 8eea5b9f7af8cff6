import numpy as np
import torch
from toy_learners import make_policy

from vla_trqam.engine.acting import chunk_policy
from vla_trqam.methods.base import FlowActor

OBSERVATIONS = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
SEEDS, CHUNKS = np.array([7, 8, 7]), np.array([0, 0, 1])


def policy():
    torch.manual_seed(0)
    return make_policy()


def act_of(noise_seed):
    flow = policy()
    return chunk_policy(flow, FlowActor(flow), noise_seed)


def test_a_chunk_is_eulers_solution_from_the_noise_of_its_key():
    flow = policy()
    found = chunk_policy(flow, FlowActor(flow), 2)(OBSERVATIONS[:1], SEEDS[:1], CHUNKS[:1])
    x = np.random.default_rng((2, 7, 0)).standard_normal((1, 2, 2), dtype=np.float32)
    x = torch.from_numpy(x)
    with torch.no_grad():
        context = flow.encode(torch.from_numpy(OBSERVATIONS[:1]))
        for step in range(3):
            x = x + flow.velocity(x, torch.full((1,), step / 3), context) / 3
    assert np.allclose(found, x.numpy(), atol=1e-6)


def test_noise_is_a_function_of_purpose_seed_and_chunk_alone():
    act = act_of(1)
    same = np.repeat(OBSERVATIONS[:1], 3, axis=0)
    chunks = act(same, SEEDS, CHUNKS)
    assert len({chunk.tobytes() for chunk in chunks}) == 3
    for index in range(3):
        alone = act(same[:1], SEEDS[index : index + 1], CHUNKS[index : index + 1])
        assert np.allclose(alone[0], chunks[index], atol=1e-6)
    other_purpose = act_of(2)(same, SEEDS, CHUNKS)
    assert not np.allclose(other_purpose, chunks)


def test_acting_neither_uses_nor_moves_torchs_generator():
    act = act_of(1)
    torch.manual_seed(5)
    first = act(OBSERVATIONS, SEEDS, CHUNKS)
    state = torch.get_rng_state()
    torch.manual_seed(6)
    assert np.array_equal(act(OBSERVATIONS, SEEDS, CHUNKS), first)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_tuned_field_acts_not_the_base():
    flow = policy()
    before = chunk_policy(flow, FlowActor(flow), 1)(OBSERVATIONS, SEEDS, CHUNKS)
    with torch.no_grad():
        next(flow.base.parameters()).add_(1.0)
    assert np.array_equal(
        chunk_policy(flow, FlowActor(flow), 1)(OBSERVATIONS, SEEDS, CHUNKS), before
    )
    with torch.no_grad():
        next(flow.tuned.parameters()).add_(1.0)
    assert not np.array_equal(
        chunk_policy(flow, FlowActor(flow), 1)(OBSERVATIONS, SEEDS, CHUNKS), before
    )
