"""Replays recorded updates of the authors' code with this library and compares every number.

    python benchmarks/replay_golden.py tests/golden/golden_trqam.npz
    python benchmarks/replay_golden.py tests/golden/golden_fql.npz --kernels=plain

The file holds weights, batches, noise and outputs of consecutive updates (format: docs/golden.md).
The command prints the worst relative error of every quantity and exits with 1 when one is out of
tolerance: ``|ours - theirs| <= atol + rtol |theirs|``. What it prints is
``|ours - theirs| / (|theirs| + atol / rtol)``, which is within tolerance when at most rtol. It
exits with 2 when the file cannot be replayed: unreadable, of another method, or incomplete.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from goldens import baselines
from goldens.baselines import BASELINES
from goldens.golden_file import GoldenFile
from goldens.weights import Networks, load_initial, named_weights
from torch import Tensor
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.kernel_choice import DEFAULT_KERNELS, Kernels, chosen_kernels
from vla_trqam.methods.parts.edit import EDIT
from vla_trqam.methods.parts.entropy import TEMPERATURE, entropy_target
from vla_trqam.methods.qam import qam_config
from vla_trqam.methods.qam_e import DRAWS, QAME, QAMEConfig
from vla_trqam.methods.registry import make_method
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig, UpdateNoise, UpdateResult
from vla_trqam.policy import FlowPolicy
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

RTOL, ATOL = 2e-4, 2e-5

LOSSES = ("info/actor/adj_loss", "info/actor/flow_loss", "info/critic/critic_loss")
REQUIRED_OUTPUTS = {
    "qam": (*LOSSES, "info/grad/norm"),
    "trqam": (
        *(f"out/{name}" for name in ("xs", "adjoints", "next_actions", "lambda_raw", "kl_ema")),
        *(*LOSSES, "info/grad/norm", "info/actor/path_kl"),
    ),
}


@dataclass
class Comparison:
    """The worst error of every quantity seen so far."""

    rtol: float
    atol: float
    worst: dict[str, float] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)

    def add(self, name: str, ours: Tensor | float, theirs: np.ndarray) -> None:
        """Compares one quantity."""
        mine = torch.as_tensor(ours, dtype=torch.float64).detach()
        other = torch.as_tensor(np.asarray(theirs, dtype=np.float64))
        if mine.numel() != other.numel():
            raise UserError(f"{name}: ours has {mine.numel()} numbers, the file {other.numel()}")
        other = other.reshape(mine.shape)
        error = (mine - other).abs() / (other.abs() + self.atol / self.rtol)
        # NaN compares false with everything: make it the worst error there is.
        value = float(error.nan_to_num(nan=float("inf")).max())
        self.worst[name] = max(self.worst.get(name, 0.0), value)

    @property
    def failures(self) -> list[str]:
        """The quantities out of tolerance."""
        return [name for name, error in self.worst.items() if not error <= self.rtol]


def _method_config(golden: GoldenFile) -> TRQAMConfig:
    get = golden.setting
    common: dict[str, Any] = {
        "scheme": "shifted_euler",
        "shared_optimizer": True,
        "train_base": True,
        "actor_lr": get("lr"),
        "critic_lr": get("lr"),
        "base_ema_rate": get("tau"),
        "max_grad_norm": 1.0 if get("clip_grad") else float("inf"),
    }
    if golden.edits:
        return QAMEConfig(
            inverse_temperature=get("inv_temp"),
            edit_scale=get("edit_scale"),
            target_entropy=get("edit_target_entropy"),
            edit_hidden_dims=tuple(get("actor_hidden_dims")),
            **common,
        )
    if golden.agent == "qam":
        return qam_config(TRQAMConfig(**common), get("inv_temp"))
    scale = get("lam_scale")
    return TRQAMConfig(
        kl_budget=get("kl_budget"),
        kl_clip=get("kl_clip_coef"),
        kl_ema_rate=get("kl_ema_coef"),
        lam_init=scale * min(max(1.0, get("lambda_min")), get("lambda_max")),
        lam_min=scale * get("lambda_min"),
        lam_max=scale * get("lambda_max"),
        dual_step_size=scale * get("eta_lambda"),
        **common,
    )


def _policy_and_critic(golden: GoldenFile) -> tuple[MLPFlowPolicy, Critic]:
    """Of the file's sizes, with random weights."""
    get = golden.setting
    if golden.has_setting("ob_dims") and len(get("ob_dims")) > 1:
        golden.refuse(f"ob_dims is {get('ob_dims')}; only vectors are replayed")
    observation_dim = golden["u0/batch/observations"].shape[-1]
    policy = MLPFlowPolicy(
        MLPFlowConfig(
            observation_dim=observation_dim,
            action_dim=get("action_dim"),
            chunk_length=get("horizon_length"),
            hidden_dims=tuple(get("actor_hidden_dims")),
            layer_norm=get("actor_layer_norm"),
            num_flow_steps=get("flow_steps"),
        )
    )
    ensemble = CriticEnsemble(
        observation_dim,
        get("action_dim") * get("horizon_length"),
        get("value_hidden_dims"),
        get("num_qs"),
        layer_norm=get("value_layer_norm"),
    )
    clip = True if golden.agent in BASELINES else get("clip_adj")
    critic = Critic(ensemble, pessimism=get("rho"), target_rate=get("tau"), clip_actions=clip)
    return policy, critic


def build(golden: GoldenFile) -> TRQAM:
    """The method with the file's initial weights."""
    method = make_method(*_policy_and_critic(golden), _method_config(golden))
    assert isinstance(method, TRQAM)
    load_initial(golden, _networks(method))
    if golden.agent == "trqam":
        lam_raw, kl_ema = float(golden["u0/in/lambda_raw"]), float(golden["u0/in/kl_ema"])
        lam = lam_raw * golden.setting("lam_scale")
        method.trust_region.load_state_dict({"lam": lam, "kl_ema": kl_ema})
    return method


def _networks(method: TRQAM) -> Networks:
    policy = method.policy
    assert isinstance(policy, MLPFlowPolicy)
    assert policy.behaviour is not None
    theirs = {EDIT: "modules_edit_actor", TEMPERATURE: "modules_edit_alpha"}
    return {theirs[name]: network for name, network in method.loss.own.items()} | {
        "modules_actor_fast/mlp": policy.tuned,
        "modules_actor_slow/mlp": policy.behaviour,
        "modules_target_actor_slow/mlp": policy.base,
        "modules_critic/value_net": method.critic.online,
        "modules_target_critic/value_net": method.critic.target,
    }


def read_batch(golden: GoldenFile, policy: FlowPolicy, update: int) -> TransitionBatch:
    """The recorded batch in this library's words."""
    get, prefix = golden.setting, f"u{update}/batch"
    steps, dim = policy.chunk_shape
    width = policy.feature_dim
    size = len(golden[f"{prefix}/observations"])
    per_step = {
        name: golden.tensor(f"{prefix}/{name}", (size, steps))[:, -1]
        for name in ("rewards", "masks", "valid")
    }
    for name in ("masks", "valid"):
        if not bool(((per_step[name] == 0) | (per_step[name] == 1)).all()):
            raise UserError(f"{golden.path}: {prefix}/{name} holds more than zeros and ones")
    valid, ended = per_step["valid"] == 1, per_step["masks"] == 0
    return TransitionBatch(
        observation=golden.tensor(f"{prefix}/observations", (size, width)),
        action=golden.tensor(f"{prefix}/actions", (size, steps, dim)),
        chunk_return=per_step["rewards"],
        next_observation=golden.tensor(f"{prefix}/next_observations", (size, steps, width))[:, -1],
        discount=torch.full((size,), get("discount") ** get("horizon_length")),
        # Their `valid` wins over `masks`; ours counts a terminated chunk whatever its length.
        terminated=ended & valid,
        truncated=torch.zeros_like(ended),
        # The last step's `valid` is the whole chunk's.
        valid=valid.unsqueeze(1).expand(-1, steps),
    )


def read_noise(golden: GoldenFile, update: int, steps: int, shape: torch.Size) -> UpdateNoise:
    """The recorded noise: named in TRQAM's files, in drawing order in QAM's."""
    prefix, more = f"u{update}", dict[str, Tensor]()
    if golden.agent == "trqam":
        names = ("next_action", "bc_x0", "bc_t", "sde_x0")
        keys = [f"{prefix}/noise/{name}" for name in names]
        increments = golden.tensor(f"{prefix}/noise/sde_steps", (steps, *shape))
    else:
        keys = golden.keys(f"{prefix}/draw/")
        expected = 4 + steps + (len(DRAWS) if golden.edits else 0)
        if len(keys) != expected:
            raise UserError(f"{golden.path}: {len(keys)} {prefix}/draw entries, not {expected}")
        if golden.edits:
            next_edit, flow, edit = keys.pop(1), keys.pop(-2), keys.pop(-1)
            more = dict(
                zip(DRAWS, _edit_draws(golden, (next_edit, flow, edit), shape), strict=True)
            )
        increments = torch.stack([golden.tensor(key, shape) for key in keys[4:]])
    return UpdateNoise(
        next_action=golden.tensor(keys[0], shape),
        bc_x_0=golden.tensor(keys[1], shape),
        bc_tau=golden.tensor(keys[2], shape[:1]),
        sde_x_0=golden.tensor(keys[3], shape),
        sde_steps=increments,
        more=more,
    )


def _edit_draws(golden: GoldenFile, keys: Sequence[str], shape: torch.Size) -> list[Tensor]:
    """Of the next edit, the flow's chunk and its edit; the edits' second axis is the batch."""
    turned = (shape[1:].numel(), shape[0])
    next_edit, flow, edit = keys
    return [
        golden.tensor(next_edit, turned).t().reshape(shape),
        golden.tensor(flow, shape),
        golden.tensor(edit, turned).t().reshape(shape),
    ]


def compare_update(
    comparison: Comparison, method: TRQAM, result: UpdateResult, golden: GoldenFile, update: int
) -> None:
    """Compares one update's outputs and the dual state after it."""
    ours = _outputs(method, result)
    if golden.agent == "trqam":
        ours |= _dual_outputs(method, result, golden.setting("lam_scale"))
    for name, value in ours.items():
        key = f"u{update}/{name}"
        if key in golden or name in REQUIRED_OUTPUTS[golden.agent]:
            comparison.add(name, value, golden[key])


def _outputs(method: TRQAM, result: UpdateResult) -> dict[str, Tensor | float]:
    out = result.output
    assert out.bc_loss is not None
    assert out.next_action is not None
    steps, batch = out.adjoint.shape[:2]
    times = torch.tensor([method.loss.grid.tau(i) for i in range(steps)])
    size = out.terminal_adjoint.abs()
    return {
        "out/xs": out.trajectory.states,
        "out/adjoints": out.adjoint,
        "out/ts": times.view(-1, 1, 1).expand(-1, batch, 1),
        "out/next_actions": out.next_action,
        "info/actor/adj_loss": out.adjoint_loss,
        "info/actor/fast_loss": out.adjoint_loss,
        "info/actor/flow_loss": out.bc_loss,
        "info/actor/path_kl": result.kl_estimate,
        "info/actor/adj_mean": size.mean(),
        "info/actor/adj_max": size.max(),
        "info/actor/adj_std": size.std(correction=0),
        "info/critic/critic_loss": out.td_loss,
        "info/critic/q_mean": out.q.mean(),
        "info/critic/q_max": out.q.max(),
        "info/critic/q_min": out.q.min(),
        **_edit_outputs(method, out.more),
        **_gradient_outputs(method, result),
    }


def _edit_outputs(method: TRQAM, logged: Mapping[str, Tensor]) -> dict[str, Tensor | float]:
    if not isinstance(method, QAME):
        return {}
    alpha, entropy = logged["temperature"], logged["entropy"]
    target = entropy_target(method.config.target_entropy, method.policy.executed_size)
    return {
        "info/actor/edit_alpha": alpha,
        "info/actor/edit_alpha_loss": alpha * (entropy - target),
        "info/actor/edit_entropy": entropy,
        "info/actor/edit_entropy_loss": -alpha * entropy,
        "info/actor/edit_q_loss": -logged["actor_q"],
    }


def _gradient_outputs(method: TRQAM, result: UpdateResult) -> dict[str, Tensor | float]:
    """Their ``grad/norm`` is the sum over arrays of each array's norm, all before clipping."""
    parameters = [p for group in method.optimizer.param_groups for p in group["params"]]
    unclip = max(1.0, float(result.grad_norms[0]) / method.config.max_grad_norm)
    return {
        "info/grad/norm": unclip * sum(float(p.grad.norm()) for p in parameters),
        "info/grad/max": unclip * max(float(p.grad.max()) for p in parameters),
        "info/grad/min": unclip * min(float(p.grad.min()) for p in parameters),
    }


def _dual_outputs(method: TRQAM, result: UpdateResult, scale: float) -> dict[str, Tensor | float]:
    """Lambda and the KL after the update; in their files lambda is ``scale`` times ``raw``."""
    region, config = method.trust_region, method.config
    assert config.kl_clip is not None
    limit = config.kl_clip * config.kl_budget
    return {
        "out/lambda_raw": region.lam / scale,
        "out/kl_ema": region.kl_ema,
        "info/dual/lambda": region.lam,
        "info/dual/sigma_scale": region.lam**-0.5,
        "info/dual/kl_estimate": result.kl_estimate,
        "info/dual/kl_estimate_clipped": min(result.kl_estimate, limit),
        "info/dual/kl_clipped": float(result.kl_estimate > limit),
        "info/dual/kl_ema": region.kl_ema,
        "info/dual/kl_budget": config.kl_budget,
    }


def compare_weights(
    comparison: Comparison, networks: Networks, golden: GoldenFile, prefix: str
) -> None:
    """Compares every network's weights."""
    for name, module in networks.items():
        for key, weight in named_weights(name, module):
            comparison.add(f"{prefix}/{name}", weight, golden[f"{prefix}/{key}"])


def compare_evaluation(comparison: Comparison, method: TRQAM, golden: GoldenFile) -> None:
    """Compares the final policy's ODE actions."""
    policy = method.policy
    size = len(golden["eval/obs"])
    context = policy.encode(golden.tensor("eval/obs", (size, policy.feature_dim)))
    x_0 = golden.tensor("eval/noise", (size, *policy.chunk_shape))
    with torch.no_grad():
        actions = sample_ode(
            lambda x, tau: policy.velocity(x, tau, context), x_0, TimeGrid(policy.num_flow_steps)
        )
    comparison.add("eval/actions", actions.clamp(-1.0, 1.0), golden["eval/actions"])


def replay(path: Path, rtol: float = RTOL, atol: float = ATOL) -> Comparison:
    """Runs every recorded update and compares everything the file holds."""
    golden = GoldenFile(path)
    comparison = Comparison(rtol, atol)
    work = _replay_baseline if golden.agent in BASELINES else _replay_adjoint_matching
    work(golden, comparison)
    comparison.not_compared = golden.unasked_groups()
    return comparison


def _replay_baseline(golden: GoldenFile, comparison: Comparison) -> None:
    num_updates = golden.num_updates
    method = baselines.make(golden, *_policy_and_critic(golden))
    networks = baselines.networks_of(golden, method)
    load_initial(golden, networks)
    for update in range(num_updates):
        batch = read_batch(golden, method.policy, update)
        ours = baselines.replay_update(golden, method, update, batch)
        for name, value in ours.items():
            key = f"u{update}/{name}"
            if key in golden or name in BASELINES[golden.agent].required:
                comparison.add(name, value, golden[key])
    compare_weights(comparison, networks, golden, "final")


def _replay_adjoint_matching(golden: GoldenFile, comparison: Comparison) -> None:
    num_updates = golden.num_updates
    method = build(golden)
    networks = _networks(method)
    for update in range(num_updates):
        batch = read_batch(golden, method.policy, update)
        noise = read_noise(golden, update, method.policy.num_flow_steps, batch.action.shape)
        if golden.agent == "trqam":
            lam_raw = method.trust_region.lam / golden.setting("lam_scale")
            comparison.add("in/lambda_raw", lam_raw, golden[f"u{update}/in/lambda_raw"])
            comparison.add("in/kl_ema", method.trust_region.kl_ema, golden[f"u{update}/in/kl_ema"])
        result = method.update_with(batch, noise)
        compare_update(comparison, method, result, golden, update)
        if golden.keys(f"u{update}/out/modules_"):
            compare_weights(comparison, networks, golden, f"u{update}/out")
    compare_weights(comparison, networks, golden, "final")
    if golden.keys("eval/"):
        compare_evaluation(comparison, method, golden)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status: 0 within tolerance, 1 out of it, 2 not a file to replay."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--rtol", type=float, default=RTOL)
    parser.add_argument("--atol", type=float, default=ATOL)
    parser.add_argument(
        "--kernels", choices=get_args(Kernels), default=DEFAULT_KERNELS, help="what computes"
    )
    flags = parser.parse_args(arguments)
    if not (flags.rtol > 0 and flags.atol >= 0):
        parser.error(
            f"--rtol {flags.rtol} --atol {flags.atol}: rtol must be positive, atol not negative"
        )
    try:
        with chosen_kernels(flags.kernels):
            comparison = replay(flags.file, flags.rtol, flags.atol)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, worst in comparison.worst.items():
        print(f"{name:<42} {worst:.2e}{'' if worst <= flags.rtol else '   OUT OF TOLERANCE'}")
    if comparison.not_compared:
        print(f"in the file, but no part of the update: {', '.join(comparison.not_compared)}")
    print("all within tolerance" if not comparison.failures else f"failed: {comparison.failures}")
    return 1 if comparison.failures else 0


if __name__ == "__main__":
    sys.exit(main())
