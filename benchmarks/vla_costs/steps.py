"""One training step of a LeRobot policy of either kind, and meters inside TRQAM's."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from vla_trqam.adapters.fields.evaluations import Evaluations
from vla_trqam.adapters.lerobot_policy import PACKED, LeRobotFlowPolicy

from vla_costs.meter import Parts
from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.methods.parts import adjoint_matching
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig, TRQAMLoss, UpdateNoise
from vla_trqam.precision import tensor_cores
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

PARTS = (
    "prefix",
    "chain and next action",
    "critic",
    "adjoint",
    "loss",
    "backward",
    "optimiser",
)
REST = "rest"
FIELDS = ("tuned", "base", "next action")


class Update:
    """One TRQAM update, its parts metered on request.

    Without memory (device ``meta``) it ends before the optimiser, which wants numbers.

    Args:
        policy: its tuned field is trained.
        batch: of the update.
        config: of the method.
        num_flow_steps: K, whatever the policy's own number is.
        one_prefix: as with ``critic.draw_next=false``: the next actions are given, and new ones are
            drawn at the batch's own observations, whose prefix is there.
    """

    def __init__(
        self,
        policy: LeRobotFlowPolicy,
        batch: Any,
        config: TRQAMConfig,
        num_flow_steps: int,
        *,
        one_prefix: bool = False,
    ) -> None:
        self._policy, self._batch, self._one_prefix = policy, batch, one_prefix
        length, _ = policy.chunk_shape
        chunk = length * int(policy.action_mask.sum())
        device = batch.action.device
        critic = Critic(CriticEnsemble(policy.feature_dim, chunk).to(device))
        self._loss, self._method = TRQAMLoss(policy, critic, config), None
        if device.type != "meta":
            self._method = TRQAM(policy, critic, config)
            self._loss = self._method.loss
        # Two chains of different lengths train one policy in turns.
        self._loss.grid = TimeGrid(num_flow_steps, config.chain)
        self._generator = torch.Generator(device="cpu" if device.type == "meta" else device)

    @property
    def rows(self) -> int:
        """Of its batch."""
        return len(self._batch)

    def __call__(self) -> None:
        """Noise and update."""
        if not self._one_prefix:
            self._update(self._batch)
            return
        policy, given = self._policy, self._batch
        seen = policy.packed(given.observation)
        features = seen[PACKED + "features"]
        self._update(
            replace(
                given,
                observation=seen,
                next_observation={PACKED + "features": features},
                next_action=policy.executed(given.action),
            )
        )
        self._draw(policy.encode(seen), given.action)

    def _update(self, batch: Any) -> None:
        steps, action = self._loss.grid.num_flow_steps, batch.action
        count = self._loss.config.loss_steps
        chosen = None if count is None else tuple(range(count))  # which ones costs the same
        if self._method is not None:
            noise = UpdateNoise.draw(action, steps, self._generator.manual_seed(0))
            self._method.update_with(batch, replace(noise, loss_steps=chosen))
            return
        path = action.expand(steps, *action.shape)
        noise = UpdateNoise(action, action, path, action, action, loss_steps=chosen)
        self._loss(batch, noise, 1.0).loss.backward()

    @torch.no_grad()
    def _draw(self, context: Any, like: Tensor) -> None:
        sample_ode(self._policy.sampled_field(context), torch.zeros_like(like), self._loss.grid)

    @contextmanager
    def metered(self, parts: Parts) -> Iterator[None]:
        """Inside, every update tells where its time (or work) goes."""
        loss = self._loss
        policy, critic = loss.policy, loss.critic
        prefix, chain, value, adjoint, error, backward, optimiser = PARTS
        calls: list[tuple[Any, str, str]] = [
            (policy, "encode", prefix),
            (policy, "path_fields", chain),
            (adjoint_matching, "sample_path_and_next_action", chain),
            (critic, "action_gradient", value),
            (critic, "next_value", value),
            (critic.online, "forward", value),
            (adjoint_matching, "lean_adjoint", adjoint),
            (adjoint_matching, "scalar_adjoint", adjoint),
            (adjoint_matching, "adjoint_matching_loss", error),
            (adjoint_matching, "path_kl_per_step", error),
            (Tensor, "backward", backward),
            (nn.utils, "clip_grad_norm_", optimiser),
            (critic, "update_target", optimiser),
        ]
        if self._method is not None:
            calls += [
                (self._method.optimizer, "step", optimiser),
                (self._method.optimizer, "zero_grad", optimiser),
            ]
        with ExitStack() as stack:
            for owner, name, part in calls:
                counted = parts.metered(part, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, counted))
            yield

    def evaluations(self) -> dict[str, int]:
        """What one update asks of the expert; see :func:`counting_evaluations`."""
        with counting_evaluations(self._policy) as count:
            self()
        return dict(count)


@contextmanager
def counting_evaluations(policy: LeRobotFlowPolicy) -> Iterator[Counter[str]]:
    """Counts the expert's evaluations inside an update, as the host is asked for them.

    Those of the base field, and those of the tuned one with gradient (on the path) and without (for
    the next action); and the evaluations that a gradient came back through: "back through tuned" to
    the trained weights, "back through base" to the state (a vector-Jacobian product).
    """
    count = Counter({name: 0 for name in (*FIELDS, *(f"back through {f}" for f in FIELDS[:2]))})
    make_base, base_is_on = policy.base.host, [False]

    @contextmanager
    def base_host() -> Iterator[Any]:
        with make_base() as host:
            base_is_on[0] = True
            try:
                yield host
            finally:
                base_is_on[0] = False

    def counted(evaluate: Callable[..., Tensor], points_of: Callable[[Tensor], int]) -> Any:
        def call(host: Any, x: Tensor, *arguments: Any) -> Tensor:
            tuned, base, following = FIELDS
            name = base if base_is_on[0] else tuned if torch.is_grad_enabled() else following
            count[name] += points_of(x)
            value = evaluate(host, x, *arguments)
            if value.requires_grad:
                value.register_hook(lambda _: count.update({f"back through {name}": points_of(x)}))
            return value

        return call

    family = policy.family
    with (
        mock.patch.object(policy.base, "host", base_host),
        mock.patch.object(family, "velocity", counted(family.velocity, lambda _: 1)),
        mock.patch.object(family, "velocities", counted(family.velocities, lambda x: x.shape[1])),
    ):
        yield count


class Sped:
    """The same update, its evaluations along the path made otherwise; the first call prepares it.

    Args:
        policy: of the update.
        update: which is made as it was by whoever else calls it.
        prepare: changes how a policy's fields are evaluated, at so many observations.
    """

    def __init__(
        self, policy: LeRobotFlowPolicy, update: Update, prepare: Callable[[Evaluations, int], None]
    ) -> None:
        self._policy, self._update = policy, update
        self._plain = policy.evaluations
        self._sped = copy.copy(policy.evaluations)
        prepare(self._sped, update.rows)

    def __call__(self) -> None:
        """One update."""
        self._policy.evaluations = self._sped
        try:
            self._update()
        finally:
            self._policy.evaluations = self._plain


class Cloning:
    """One behaviour cloning step, as ``lerobot-train --peft.method_type=LORA`` takes it."""

    def __init__(self, policy: LeRobotFlowPolicy, batch: dict[str, Tensor]) -> None:
        from accelerate import Accelerator
        from lerobot.scripts.lerobot_train import update_policy
        from lerobot.utils.logging_utils import AverageMeter, MetricsTracker

        config = policy.host.config
        preset = config.get_optimizer_preset()
        precision = {"bfloat16": "bf16", "float32": "no"}.get(getattr(config, "dtype", "float32"))
        accelerator = Accelerator(mixed_precision=precision, cpu=config.device == "cpu")
        optimizer = accelerator.prepare(preset.build(policy.host.get_optim_params()))
        names = ("loss", "grad_norm", "lr", "update_s", "gpu_mem_gb")
        meters = {name: AverageMeter(name) for name in names}
        tracker = MetricsTracker(len(batch["action"]), 1, 1, meters, accelerator=accelerator)
        self._policy, self._batch = policy, batch
        self._step = lambda: update_policy(
            tracker, policy.model, batch, optimizer, preset.grad_clip_norm, accelerator
        )

    def __call__(self) -> None:
        """In training mode, as the host does it; back in evaluation mode behind it."""
        with tensor_cores():  # as lerobot-train sets it
            self._step()
        self._policy.eval()


class CloningOnMeta:
    """The same forward and backward pass where numbers do not exist: LeRobot's logs want them."""

    def __init__(self, policy: LeRobotFlowPolicy, batch: dict[str, Tensor]) -> None:
        self._host, self._batch = policy.host, batch

    def __call__(self) -> None:
        """The host's model, which its policy's ``forward`` calls with the same tensors."""
        host, batch = self._host, self._batch
        inputs = [
            *host._preprocess_images(batch),
            batch["observation.language.tokens"],
            batch["observation.language.attention_mask"],
        ]
        if "state_proj" in dict(host.model.named_children()):
            inputs.append(host.prepare_state(batch))
        action = host.prepare_action(batch)
        time = action.new_empty(len(action))
        host.model.forward(*inputs, action, torch.empty_like(action), time).mean().backward()
