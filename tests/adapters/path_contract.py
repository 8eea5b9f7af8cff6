"""The part of the contract that asks for both fields along the path of an update."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.methods.trqam import TRQAM, SchemeName, TRQAMConfig, UpdateNoise
from vla_trqam.policy import FlowPolicy, PathFields
from vla_trqam.sde import Trajectory, sample_ode, sample_path_and_next_action
from vla_trqam.time_grid import Posterior, Scheme, ShiftedEuler, TimeGrid, full_tau

BATCH = 3
BOTH_CHAINS = pytest.mark.parametrize("scheme", [Posterior(), ShiftedEuler()])
BOTH_NAMES = pytest.mark.parametrize("scheme", ["posterior", "shifted_euler"])


class PathContract(ABC):
    """Its tolerances are for float32 and a policy may widen them.

    Attributes:
        rtol, atol: between two ways to compute the same numbers in the policy's own precision.
        exact: the precision in which finite differences are taken.
        difference_step, difference_rtol, difference_atol: their step, and how close they come.
        keeps_own_tape: whether activations are kept where autograd does not see them.
    """

    rtol, atol = 1e-4, 1e-5
    exact = torch.float64
    difference_step, difference_rtol, difference_atol = 1e-5, 1e-6, 1e-8
    keeps_own_tape = False

    @abstractmethod
    def make_policy(self) -> FlowPolicy:
        """A fresh policy, the same at every call, whose tuned field is its base."""

    @abstractmethod
    def observation(self, batch_size: int, seed: int) -> Any:
        """What :meth:`FlowPolicy.encode` takes."""

    @abstractmethod
    def evaluations(self, policy: FlowPolicy) -> AbstractContextManager[Counter[str]]:
        """Counts what an update asks of each field, "tuned" and "base": batches of states.

        The policy's tuned field has left its base.
        """

    def in_precision(self, policy: FlowPolicy, observation: Any) -> tuple[FlowPolicy, Any]:
        """Policy and observation in :attr:`exact`."""
        return policy.to(self.exact), observation.to(self.exact)

    @pytest.fixture
    def policy(self) -> FlowPolicy:
        return self.make_policy()

    @pytest.fixture
    def moved(self) -> FlowPolicy:
        """A policy whose tuned field has left its base."""
        policy = self.make_policy()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                step = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(0.1 * step)
        return policy

    # Derivatives in x.

    @BOTH_CHAINS
    def test_the_base_pullback_is_the_finite_difference(
        self, moved: FlowPolicy, scheme: Scheme
    ) -> None:
        policy, observation = self.in_precision(moved, self.observation(BATCH, 0))
        path, fields = self._path(policy, observation, scheme)
        context = policy.encode(observation)
        generator = torch.Generator().manual_seed(5)
        asked = self._asked(path.grid)
        for step in (min(asked), max(asked)):
            x = path.states[step]
            cotangent, direction = (
                torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2)
            )
            tau, size = full_tau(asked[step], x), self.difference_step
            with torch.no_grad():
                up = policy.base_velocity(x + size * direction, tau, context)
                down = policy.base_velocity(x - size * direction, tau, context)
            expected = ((up - down) / (2 * size) * cotangent).flatten(1).sum(1)
            pullback = (fields.base_pullback(step, cotangent) * direction).flatten(1).sum(1)
            torch.testing.assert_close(
                pullback, expected, rtol=self.difference_rtol, atol=self.difference_atol
            )

    # The shared evaluations along a path.

    @BOTH_CHAINS
    def test_shared_evaluations_are_the_plain_ones(self, moved: FlowPolicy, scheme: Scheme) -> None:
        observation = self.observation(BATCH, 0)
        path, fields = self._path(moved, observation, scheme)
        plain_path, plain = self._path(moved, observation, scheme, plain=True)
        self._assert_close(path.x, plain_path.x)
        self._assert_close(fields.tuned(), plain.tuned())
        self._assert_close(fields.base(), plain.base())
        cotangent = torch.randn(path.x_1.shape, generator=torch.Generator().manual_seed(1))
        for step in self._asked(path.grid):
            pulled, expected = (f.base_pullback(step, cotangent) for f in (fields, plain))
            self._assert_close(pulled, expected)
        assert fields.tuned().requires_grad
        assert not fields.base().requires_grad

    def test_one_evaluation_gives_the_bases_value_and_its_jacobian(self, moved: FlowPolicy) -> None:
        """In the posterior chain, where the adjoint asks at the path's own times."""
        observation = self.observation(BATCH, 0)
        with self.evaluations(moved) as counts:
            path, fields = self._path(moved, observation, Posterior())
            cotangent = torch.randn(path.x_1.shape, generator=torch.Generator().manual_seed(3))
            asked = self._asked(path.grid)
            pulled = {step: fields.base_pullback(step, cotangent) for step in asked}
        steps = moved.num_flow_steps
        assert counts["base"] == steps
        context = moved.encode(observation)
        for step, x in enumerate(path.states):
            point = x.clone().requires_grad_(True)
            value = moved.base_velocity(point, full_tau(step / steps, x), context)
            self._assert_close(fields.base()[step], value.detach())
            if step in asked:
                (expected,) = torch.autograd.grad(value, point, cotangent)
                self._assert_close(pulled[step], expected)
        assert list(asked) == list(range(1, steps))

    @BOTH_CHAINS
    def test_the_gradient_over_a_recorded_path_is_autograds(
        self, moved: FlowPolicy, scheme: Scheme
    ) -> None:
        observation = self.observation(BATCH, 0)
        _, fields = self._path(moved, observation, scheme)
        _, plain = self._path(moved, observation, scheme, plain=True)
        weight = torch.randn(fields.tuned().shape, generator=torch.Generator().manual_seed(2))
        parameters = list(moved.trainable_parameters())
        ours = torch.autograd.grad((fields.tuned() * weight).sum(), parameters)
        autograds = torch.autograd.grad((plain.tuned() * weight).sum(), parameters)
        self._assert_gradients_close(ours, autograds)

    # Updates.

    @BOTH_NAMES
    @pytest.mark.parametrize("keep", [True, False])
    def test_the_kl_of_the_first_update_is_exactly_zero(
        self, policy: FlowPolicy, scheme: SchemeName, keep: bool
    ) -> None:
        method = self._method(policy, scheme=scheme, keep_activations=keep)
        first = method.update_with(*self._data(policy, 0))
        assert first.kl_estimate == 0.0
        assert first.output.kl_per_step.tolist() == [0.0] * policy.num_flow_steps
        second = method.update_with(*self._data(policy, 1))
        assert second.kl_estimate > 0.0

    @pytest.mark.parametrize(
        ("settings", "bases"),
        [
            ({"scheme": "posterior"}, 1),
            ({"scheme": "posterior", "adjoint": "scalar"}, 1),
            ({"scheme": "shifted_euler"}, 2),
            ({"scheme": "shifted_euler", "adjoint": "scalar"}, 1),
        ],
        ids=str,
    )
    def test_an_update_asks_the_tuned_field_twice_a_step_and_the_base_no_more_than_it_must(
        self, moved: FlowPolicy, settings: dict[str, Any], bases: int
    ) -> None:
        """The tuned one on the path and for the next action; the base again where its Jacobian is
        wanted at another time than the path's."""
        method = self._method(moved, **settings)
        with self.evaluations(moved) as counts:
            method.update_with(*self._data(moved, 0))
        steps = moved.num_flow_steps
        assert dict(counts) == {"base": bases * steps, "tuned": 2 * steps}

    @BOTH_NAMES
    def test_without_kept_activations_values_and_gradients_are_the_same_up_to_rounding(
        self, moved: FlowPolicy, scheme: SchemeName
    ) -> None:
        parameters, found = list(moved.trainable_parameters()), []
        for keep in (True, False):
            method = self._method(moved, scheme=scheme, keep_activations=keep)
            output = method.loss(*self._data(moved, 0), 2.0)
            found.append((output, torch.autograd.grad(output.loss, parameters)))
        (kept, gradients), (again, others) = found
        for name in ("adjoint", "kl_per_step", "next_action", "adjoint_loss", "td_loss"):
            self._assert_close(getattr(again, name), getattr(kept, name))
        self._assert_close(again.trajectory.x, kept.trajectory.x)
        self._assert_gradients_close(others, gradients)

    def test_without_kept_activations_little_is_kept_of_a_path(self, moved: FlowPolicy) -> None:
        """Kept, it is the activations of K evaluations of the tuned field and K - 1 of the base."""
        observation = self.observation(BATCH, 0)
        kept = self._saved_bytes(moved, observation, plain=self.keeps_own_tape)
        again = self._saved_bytes(moved, observation, keep=False)
        assert again < kept / 4

    @BOTH_NAMES
    def test_the_scalar_adjoint_asks_for_no_jacobian(
        self, moved: FlowPolicy, scheme: SchemeName, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make = moved.path_fields

        def without_pullback(*args: Any, **settings: Any) -> PathFields:
            fields = make(*args, **settings)
            monkeypatch.setattr(fields, "base_pullback", None)
            return fields

        monkeypatch.setattr(moved, "path_fields", without_pullback)
        output = (
            self._method(moved, scheme=scheme, adjoint="scalar")
            .update_with(*self._data(moved, 0))
            .output
        )
        steps, ahead = moved.num_flow_steps, scheme == "posterior"
        times = [(i + ahead) / steps for i in range(steps)]
        terminal = output.terminal_adjoint
        self._assert_close(output.adjoint, torch.stack([tau * terminal for tau in times]))
        with pytest.raises(TypeError, match="not callable"):
            self._method(moved, scheme=scheme).update_with(*self._data(moved, 0))

    # What the tests share.

    def _assert_close(self, ours: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(ours, theirs, rtol=self.rtol, atol=self.atol)

    def _assert_gradients_close(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
        for mine, other in zip(ours, theirs, strict=True):
            scale = float(other.abs().max())
            torch.testing.assert_close(mine, other, rtol=self.rtol, atol=self.atol * (1 + scale))

    def _asked(self, grid: TimeGrid) -> dict[int, float]:
        """The steps whose Jacobian the adjoint asks for, and at which times."""
        times = {i: step.adjoint_tau for i, step in enumerate(grid.steps)}
        return {i: tau for i, tau in times.items() if tau is not None}

    def _saved_bytes(self, policy: FlowPolicy, observation: Any, **settings: bool) -> int:
        """What a sampled path keeps for gradients, beside the weights."""
        weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            _, fields = self._path(policy, observation, Posterior(), **settings)
            fields.tuned()
        return sum(saved.values())

    def _noise(self, policy: FlowPolicy, count: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, BATCH, *policy.chunk_shape, generator=generator)

    def _point(self, policy: FlowPolicy) -> tuple[Tensor, Tensor, Any]:
        context = policy.encode(self.observation(BATCH, 0))
        return self._noise(policy, 1)[0], torch.full((BATCH,), 0.3), context

    def _path(
        self,
        policy: FlowPolicy,
        observation: Any,
        scheme: Scheme,
        *,
        plain: bool = False,
        keep: bool = True,
    ) -> tuple[Trajectory, PathFields]:
        """A path by the adapter's shared evaluations, or by the plain ones."""
        context = policy.encode(observation)
        following = policy.encode(self._like(observation, self.observation(BATCH, 1)))
        make = partial(PathFields, policy) if plain else policy.path_fields
        fields = make(context, following, keep_activations=keep)
        noise = self._noise(policy, policy.num_flow_steps + 2).to(policy.features(context))
        grid = TimeGrid(policy.num_flow_steps, scheme)
        path, _ = sample_path_and_next_action(fields, noise[0], noise[2:], noise[1], grid)
        return path, fields

    def _like(self, observation: Any, other: Any) -> Any:
        """`other` in the precision of `observation`, where both are tensors."""
        return other.to(observation) if isinstance(observation, Tensor) else other

    def _ode_actions(self, policy: FlowPolicy, observation: Any, noise: Tensor) -> Tensor:
        context, grid = policy.encode(observation), TimeGrid(policy.num_flow_steps)
        with torch.no_grad():
            return sample_ode(lambda x, tau: policy.velocity(x, tau, context), noise, grid)

    def _method(self, policy: FlowPolicy, **changes: Any) -> TRQAM:
        return TRQAM(policy, self._critic(policy), TRQAMConfig(**changes))

    def _critic(self, policy: FlowPolicy) -> Critic:
        torch.manual_seed(0)
        real = policy.chunk_shape[0] * int(policy.action_mask.sum())
        return Critic(CriticEnsemble(policy.feature_dim, real, (16,), 2))

    def _data(self, policy: FlowPolicy, seed: int) -> tuple[TransitionBatch, UpdateNoise]:
        horizon = policy.chunk_shape[0]
        generator = torch.Generator().manual_seed(seed)
        batch = TransitionBatch(
            observation=self.observation(BATCH, seed),
            action=self._noise(policy, 1, seed)[0].clamp(-1, 1),
            chunk_return=torch.randn(BATCH, generator=generator),
            next_observation=self.observation(BATCH, seed + 50),
            discount=torch.full((BATCH,), 0.99),
            terminated=torch.zeros(BATCH, dtype=torch.bool),
            truncated=torch.zeros(BATCH, dtype=torch.bool),
            valid=torch.ones(BATCH, horizon, dtype=torch.bool),
        )
        return batch, UpdateNoise.draw(batch.action, policy.num_flow_steps, generator)
