"""What every adapter promises, as one suite: subclass it, say how to make the policy, run it.

    class TestMyPolicy(FlowPolicyContract):
        def make_policy(self) -> FlowPolicy: ...
        def observation(self, batch_size: int, seed: int) -> Any: ...
        def evaluations(self, policy): ...
        def host_actions(self, policy, observation, noise): ...
        def host_behaviour_loss(self, policy, observation, action, noise, tau): ...
        def load(self, directory): ...

Everything is asked through :class:`~vla_trqam.policy.FlowPolicy` alone, so the same tests hold an
MLP, a policy with LoRA and a policy inside another library to the same promises.
"""

import copy
import hashlib
from abc import abstractmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from path_contract import BATCH, PathContract
from torch import Tensor

from vla_trqam.errors import UserError
from vla_trqam.losses import flow_matching_loss, flow_matching_target
from vla_trqam.policy import FlowPolicy
from vla_trqam.time_grid import full_tau

__all__ = ["BATCH", "FlowPolicyContract"]


class FlowPolicyContract(PathContract):
    """The suite, that of a path's fields included.

    Attributes:
        trains_base: whether the base can keep training by behaviour cloning.
        reload_is_exact: whether a saved policy acts the same to the bit, or up to the tolerances.
    """

    trains_base = False
    reload_is_exact = True

    @abstractmethod
    def host_actions(self, policy: FlowPolicy, observation: Any, noise: Tensor) -> Tensor:
        """The host's own sampler, noise (B, H, A) -> (B, H, a), real dimensions, normalised."""

    @abstractmethod
    def host_behaviour_loss(
        self, policy: FlowPolicy, observation: Any, action: Tensor, noise: Tensor, tau: Tensor
    ) -> Tensor:
        """The host's own training loss, a scalar."""

    def behaviour_loss(
        self, policy: FlowPolicy, observation: Any, action: Tensor, noise: Tensor, tau: Tensor
    ) -> Tensor:
        """The adapter's; the core's own where the adapter has none."""
        x_tau, target = flow_matching_target(action, noise, tau)
        valid = torch.ones(action.shape[:2], dtype=torch.bool)
        velocity = policy.velocity(x_tau, tau, policy.encode(observation))
        return flow_matching_loss(velocity, target, valid)

    @abstractmethod
    def load(self, directory: Path) -> FlowPolicy:
        """The saved policy, read by what users read it with."""

    # The two fields.

    def test_tuned_and_base_are_equal_to_the_bit_at_the_start(self, policy: FlowPolicy) -> None:
        x, tau, context = self._point(policy)
        with torch.no_grad():
            tuned, base = policy.velocity(x, tau, context), policy.base_velocity(x, tau, context)
        assert tuned.shape == x.shape
        assert torch.equal(tuned, base)
        assert float(tuned.abs().max()) > 0

    def test_moving_the_trained_parameters_moves_the_tuned_field_only(
        self, policy: FlowPolicy, moved: FlowPolicy
    ) -> None:
        x, tau, context = self._point(policy)
        moved_context = moved.encode(self.observation(BATCH, 0))
        with torch.no_grad():
            before = policy.base_velocity(x, tau, context)
            assert torch.equal(moved.base_velocity(x, tau, moved_context), before)
            assert not torch.equal(moved.velocity(x, tau, moved_context), before)

    def test_every_sample_has_its_own_time_and_observation(self, moved: FlowPolicy) -> None:
        x, _, context = self._point(moved)
        tau = torch.linspace(0.1, 0.8, BATCH)
        with torch.no_grad():
            for field in (moved.velocity, moved.base_velocity):
                together = field(x, tau, context)
                for b in range(BATCH):
                    alone = field(x, full_tau(float(tau[b]), x), context)
                    self._assert_close(together[b], alone[b])
                    assert not torch.allclose(together[b - 1], alone[b - 1], rtol=1e-6, atol=0)

    def test_gradients_reach_the_trained_parameters_and_never_the_base(
        self, moved: FlowPolicy
    ) -> None:
        x, tau, context = self._point(moved)
        moved.velocity(x, tau, context).square().sum().backward()
        trained = list(moved.trainable_parameters())
        assert trained
        assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in trained)
        rest = [p for p in moved.parameters() if all(p is not q for q in trained)]
        assert all(p.grad is None for p in rest)
        moved.zero_grad(set_to_none=True)
        point = x.clone().requires_grad_(True)
        moved.base_velocity(point, tau, context).square().sum().backward()
        assert point.grad is not None
        assert all(p.grad is None for p in moved.parameters())

    def test_features_and_mask_have_the_promised_shape(self, policy: FlowPolicy) -> None:
        features = policy.features(policy.encode(self.observation(BATCH, 0)))
        assert features.shape == (BATCH, policy.feature_dim)
        assert not features.requires_grad
        assert policy.action_mask.shape == (policy.chunk_shape[1],)
        assert policy.action_mask.dtype == torch.bool
        assert bool(policy.action_mask.any())

    # Padded dimensions.

    def test_value_and_executed_actions_depend_on_real_dimensions_only(
        self, moved: FlowPolicy
    ) -> None:
        chunk, other = 0.1 * self._noise(moved, 2)
        other[..., moved.action_mask] = chunk[..., moved.action_mask]
        assert moved.executed(chunk).shape == (*chunk.shape[:2], int(moved.action_mask.sum()))
        assert torch.equal(moved.executed(chunk), moved.executed(other))
        features = moved.features(moved.encode(self.observation(BATCH, 0)))
        gradient, value = self._critic(moved).action_gradient(features, chunk, moved.executed)
        _, same = self._critic(moved).action_gradient(features, other, moved.executed)
        assert torch.equal(value, same)
        assert float(gradient[..., ~moved.action_mask].abs().sum()) == 0.0
        assert bool((gradient[..., moved.action_mask] != 0).all())

    def test_executed_actions_keep_to_the_limits(self, policy: FlowPolicy) -> None:
        low, high = (
            torch.as_tensor(limit).expand(int(policy.action_mask.sum()))
            for limit in policy.action_limits
        )
        assert bool((low < high).all())
        far = 100.0 * self._noise(policy, 1)[0]
        expected = torch.where(policy.real_actions(far) > 0, high, low)
        assert torch.equal(policy.executed(far), expected)
        assert torch.equal(policy.executed(far, clip=False), policy.real_actions(far))

    # The host.

    def test_euler_on_the_velocity_is_the_hosts_own_sampler(self, moved: FlowPolicy) -> None:
        observation = self.observation(BATCH, 0)
        noise = self._noise(moved, 1)[0]
        actions = self._ode_actions(moved, observation, noise)
        with torch.no_grad():
            host = self.host_actions(moved, observation, noise)
        self._assert_close(moved.real_actions(actions), host)

    def test_the_behaviour_cloning_loss_is_the_hosts_training_loss(self, moved: FlowPolicy) -> None:
        observation = self.observation(BATCH, 0)
        action, noise = self._noise(moved, 2)
        tau = torch.linspace(0.05, 0.95, BATCH)
        loss = self.behaviour_loss(moved, observation, action, noise, tau)
        host = self.host_behaviour_loss(moved, observation, action, noise, tau)
        self._assert_close(loss, host)

    # Updates.

    def test_updates_never_change_the_base(self, policy: FlowPolicy) -> None:
        x, tau, context = self._point(policy)
        before, field = self._untrained_hash(policy), policy.base_velocity(x, tau, context).clone()
        trained = [p.detach().clone() for p in policy.trainable_parameters()]
        method = self._method(policy)
        for seed in range(2):
            method.update_with(*self._data(policy, seed))
        assert self._untrained_hash(policy) == before
        assert torch.equal(policy.base_velocity(x, tau, context), field)
        moved = list(policy.trainable_parameters())
        assert not any(torch.equal(a, b) for a, b in zip(trained, moved, strict=True))

    def test_training_the_base_works_or_is_refused(self, policy: FlowPolicy) -> None:
        x, tau, context = self._point(policy)
        before = policy.base_velocity(x, tau, context).clone()
        if not self.trains_base:
            with pytest.raises(UserError, match="train_base"):
                self._method(policy, train_base=True)
            return
        method = self._method(policy, train_base=True)
        for seed in range(2):
            result = method.update_with(*self._data(policy, seed))
        assert result.output.bc_loss is not None
        assert not torch.equal(policy.base_velocity(x, tau, context), before)

    # Checkpoints.

    def test_a_saved_policy_acts_as_it_did(self, moved: FlowPolicy, tmp_path: Path) -> None:
        observation, noise = self.observation(BATCH, 0), self._noise(moved, 1)[0]
        moved.save_pretrained(tmp_path / "policy")
        loaded = self.load(tmp_path / "policy")
        actions = self._ode_actions(moved, observation, noise)
        reloaded = self._ode_actions(loaded, observation, noise)
        self._assert_close(reloaded, actions)
        assert torch.equal(reloaded, actions) or not self.reload_is_exact
        x, tau, context = self._point(loaded)
        with torch.no_grad():
            base = loaded.base_velocity(x, tau, context)
            assert torch.equal(loaded.velocity(x, tau, context), base)

    def test_another_number_of_flow_steps_acts_here_and_where_it_is_loaded(
        self, moved: FlowPolicy, tmp_path: Path
    ) -> None:
        observation, noise = self.observation(BATCH, 0), self._noise(moved, 1)[0]
        own, before = moved.num_flow_steps, self._ode_actions(moved, observation, noise)
        moved.take_flow_steps(2)
        assert (moved.num_flow_steps, moved.own_flow_steps) == (2, own)
        actions = self._ode_actions(moved, observation, noise)
        assert not torch.allclose(actions, before, rtol=1e-3, atol=1e-3)
        moved.save_pretrained(tmp_path / "policy")
        loaded = self.load(tmp_path / "policy")
        assert (loaded.num_flow_steps, loaded.own_flow_steps) == (2, 2)
        with torch.no_grad():
            for policy in (moved, loaded):
                host = self.host_actions(policy, observation, noise)
                self._assert_close(moved.real_actions(actions), host)
        with pytest.raises(UserError, match="at least 1"):
            moved.take_flow_steps(0)

    # What the tests share.

    def _untrained_hash(self, policy: FlowPolicy) -> str:
        """Of every parameter and buffer that training must not move."""
        trained = {id(p) for p in policy.trainable_parameters()}
        digest = hashlib.sha256()
        for name, value in copy.copy(policy).state_dict(keep_vars=True).items():
            if id(value) not in trained:
                digest.update(name.encode())
                flat = value.detach().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
