import math

import pytest
import torch
from toy_learners import make_batch, make_cloning, make_off_policy, make_policy

from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.engine.folder.state import (
    load_module_tensors,
    load_optimizer_tensors,
    module_tensors,
    optimizer_tensors,
)
from vla_trqam.errors import UserError
from vla_trqam.methods.bc import BehaviourCloning, BehaviourCloningConfig
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid


def updated(learner, count, first=0):
    for number in range(first, first + count):
        learner.update(make_batch(number), torch.Generator().manual_seed(number))
    return learner


def transplant(learner, fresh):
    """What a checkpoint does, without the files."""
    load_module_tensors(fresh, {k: v.clone() for k, v in module_tensors(learner).items()})
    moments = {k: v.clone() for k, v in optimizer_tensors(learner.optimizer).items()}
    load_optimizer_tensors(fresh.optimizer, moments)
    fresh.load_scalars(learner.scalars())
    return fresh


@pytest.mark.parametrize("make", [make_cloning, make_off_policy])
def test_two_updates_after_a_round_trip_equal_two_updates_without_to_the_bit(make):
    learner = updated(make(seed=0), 3)
    fresh = transplant(learner, make(seed=1))
    updated(learner, 2, first=3)
    updated(fresh, 2, first=3)
    expected = module_tensors(learner) | optimizer_tensors(learner.optimizer)
    found = module_tensors(fresh) | optimizer_tensors(fresh.optimizer)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert fresh.scalars() == learner.scalars()


def test_a_training_base_survives_the_round_trip():
    learner = updated(make_off_policy(seed=0, train_base=True), 2)
    fresh = transplant(learner, make_off_policy(seed=1, train_base=True))
    updated(learner, 1, first=2)
    updated(fresh, 1, first=2)
    expected, found = module_tensors(learner), module_tensors(fresh)
    assert any(key.startswith("policy.behaviour.") for key in expected)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_weights_that_are_no_modules_are_refused():
    learner = make_cloning()
    tensors = module_tensors(learner) | {"stranger.weight": torch.zeros(2)}
    with pytest.raises(UserError, match=r"stranger\.weight"):
        load_module_tensors(learner, tensors)


def test_moments_of_other_parameters_are_refused():
    optimizer = updated(make_cloning(), 1).optimizer
    with pytest.raises(UserError, match=r"99\.exp_avg"):
        load_optimizer_tensors(optimizer, {"99.exp_avg": torch.zeros(3)})
    with pytest.raises(UserError, match="shape"):
        load_optimizer_tensors(optimizer, {"0.exp_avg": torch.zeros(3)})


def test_behaviour_cloning_learns_a_conditional_gaussian():
    """a | s ~ N(0.5 s, 0.1^2): the samples' regression on s and their spread are known."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    policy = make_policy(hidden=48, observation_dim=1, action_dim=1, chunk_length=1, flow_steps=10)
    steps = 600
    learner = BehaviourCloning(policy, BehaviourCloningConfig(lr=5e-3, ema_rate=0.02), steps)

    def batch(size):
        state = torch.empty(size, 1).uniform_(-1, 1, generator=generator)
        action = 0.5 * state + 0.1 * torch.randn(size, 1, generator=generator)
        return TransitionBatch(
            observation=state,
            action=action[:, None],
            chunk_return=torch.zeros(size),
            next_observation=state,
            discount=torch.ones(size),
            terminated=torch.zeros(size, dtype=torch.bool),
            truncated=torch.zeros(size, dtype=torch.bool),
            valid=torch.ones(size, 1, dtype=torch.bool),
        )

    for _ in range(steps):
        learner.update(batch(256), generator)
    learner.finish()
    state = torch.linspace(-0.9, 0.9, 2000)[:, None]
    noise = torch.randn(2000, 1, 1, generator=generator)
    with torch.no_grad():
        context = policy.encode(state)
        sample = sample_ode(lambda x, t: policy.velocity(x, t, context), noise, TimeGrid(10))
    residual = sample[:, 0] - 0.5 * state
    slope = float((sample[:, 0] * state).sum() / state.square().sum())
    assert slope == pytest.approx(0.5, abs=0.06)
    assert float(residual.std()) == pytest.approx(0.1, abs=0.06)


def test_the_finished_policy_is_the_average_of_the_weights():
    config = BehaviourCloningConfig(lr=1e-2, ema_rate=0.4)
    policy = make_policy()
    learner = BehaviourCloning(policy, config, num_steps=4)
    average = None
    for number in range(4):
        updated(learner, 1, first=number)
        now = [p.detach().clone().double() for p in policy.trainable_parameters()]
        rate = max(0.4, 1 / (number + 1))  # a young average is the mean of all so far
        average = (
            now
            if average is None
            else [(1 - rate) * a + rate * b for a, b in zip(average, now, strict=True)]
        )
    learner.finish()
    for found, expected in zip(policy.trainable_parameters(), average, strict=True):
        assert torch.allclose(found.double(), expected, atol=1e-6)


def test_the_step_size_falls_linearly_to_zero():
    learner = make_cloning(num_steps=4)
    seen = []
    for number in range(4):
        updated(learner, 1, first=number)
        seen.append(learner.optimizer.param_groups[0]["lr"] / learner.config.lr)
    assert seen == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"lr": math.nan}, {"ema_rate": 0.0}])
def test_behaviour_cloning_refuses_useless_settings(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        BehaviourCloningConfig(**settings)


def test_the_budget_is_logged_only_while_the_dual_moves():
    assert "kl_budget" in updated(make_off_policy(), 1).metrics()
    frozen = updated(make_off_policy(dual_step_size=0.0), 1).metrics()
    assert "kl_budget" not in frozen
    assert frozen["lam"] == 3.0


def test_a_trust_region_goes_on_in_its_own_scheme_alone():
    posterior, authors = make_off_policy(), make_off_policy(scheme="shifted_euler")
    state = {"lam": 1.5, "kl_ema": 0.25}
    assert posterior.scalars()["scheme"] == "posterior"
    posterior.load_scalars(state | {"scheme": "posterior"})
    assert posterior.trust_region.state_dict() == state
    authors.load_scalars(state)  # as it was saved before there was more than one
    assert authors.trust_region.state_dict() == state
    begun = make_off_policy()
    for theirs in (state, state | {"scheme": "shifted_euler"}):
        with pytest.raises(UserError, match="of the shifted_euler scheme and this run is of post"):
            begun.load_scalars(theirs)
    assert begun.trust_region.lam == begun.config.lam_init, "nothing was taken"


def test_a_trust_region_goes_on_in_its_own_unit_alone():
    saved, steps = make_off_policy().scalars(), make_policy().num_flow_steps
    assert saved["unit"] == f"nats per action of {steps} flow steps"
    make_off_policy().load_scalars(saved)
    per_chunk = make_off_policy(kl_per_action=False)
    with pytest.raises(
        UserError, match=r"of nats per action of .*, and this run's of nats per chu"
    ):
        per_chunk.load_scalars(saved)
    fewer = saved | {"unit": f"nats per action of {steps - 1} flow steps"}
    ten = saved | {"unit": f"nats per action of {steps} flow steps, an adjoint times 10"}
    for other in (fewer, ten):
        with pytest.raises(UserError, match="and this run's of nats per action"):
            make_off_policy().load_scalars(other)
    make_off_policy(dual_step_size=0.0).load_scalars(ten)  # nothing but the log's average


@pytest.mark.parametrize("lam", [0.0, 1e-3, 1e4])
def test_a_lambda_outside_its_bounds_is_refused(lam):
    begun = make_off_policy()
    with pytest.raises(UserError, match=f"lambda there is {lam:g}, and --method.lam_min=0.03"):
        begun.load_scalars(begun.scalars() | {"lam": lam, "kl_ema": 0.5})
    assert begun.trust_region.state_dict() == {"lam": begun.config.lam_init, "kl_ema": 0.0}
