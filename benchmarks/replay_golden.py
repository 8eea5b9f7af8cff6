"""Replays recorded updates of the authors' code with this library and compares every number.

    python benchmarks/replay_golden.py tests/golden/golden_trqam.npz

The file holds weights, batches, noise and outputs of consecutive updates (format: docs/golden.md).
The command prints the worst relative error of every quantity and exits with 1 when one is out of
tolerance: ``|ours - theirs| <= atol + rtol |theirs|``. What it prints is
``|ours - theirs| / (|theirs| + atol / rtol)``, which is within tolerance when at most rtol.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy, VelocityMLP

from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.transitions import TransitionBatch
from vla_trqam.errors import UserError
from vla_trqam.methods.qam import qam_config
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig, UpdateNoise, UpdateResult
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

RTOL, ATOL = 2e-4, 2e-5

Golden = Mapping[str, np.ndarray]


@dataclass
class Comparison:
    """The worst error of every quantity seen so far."""

    rtol: float
    atol: float
    worst: dict[str, float] = field(default_factory=dict)

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


def load_golden(path: Path) -> tuple[Golden, dict]:
    """Reads the file and its settings; refuses what this command does not replay."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            data = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a golden npz file: {error}") from None
    if "config.json" not in data:
        raise UserError(f"{path} has no config.json entry; it is not a golden file")
    config = json.loads(bytes(data["config.json"]).decode())
    if config["agent_name"] not in ("trqam", "qam"):
        raise UserError(f"{path} records {config['agent_name']!r}; only trqam and qam are replayed")
    required = {"best_of_n": 1, "use_target_grad": True, "target_actor": True}
    for key, value in required.items():
        if config[key] != value:
            raise UserError(f"{path}: {key} is {config[key]}; only {value} is replayed")
    return data, config


def _method_config(config: dict) -> TRQAMConfig:
    common = {
        "shared_optimizer": True,
        "train_base": True,
        "actor_lr": config["lr"],
        "critic_lr": config["lr"],
        "base_ema_rate": config["tau"],
        "max_grad_norm": 1.0 if config["clip_grad"] else float("inf"),
    }
    if config["agent_name"] == "qam":
        return qam_config(TRQAMConfig(**common), config["inv_temp"])
    scale = config["lam_scale"]
    return TRQAMConfig(
        kl_budget=config["kl_budget"],
        kl_clip=config["kl_clip_coef"],
        kl_ema_rate=config["kl_ema_coef"],
        lam_init=scale,
        lam_min=scale * config["lambda_min"],
        lam_max=scale * config["lambda_max"],
        dual_step_size=scale * config["eta_lambda"],
        **common,
    )


def build(data: Golden, config: dict) -> TRQAM:
    """The method with the file's initial weights."""
    policy = MLPFlowPolicy(
        MLPFlowConfig(
            observation_dim=config["ob_dims"][0],
            action_dim=config["action_dim"],
            chunk_length=config["horizon_length"],
            hidden_dims=tuple(config["actor_hidden_dims"]),
            layer_norm=config["actor_layer_norm"],
            num_flow_steps=config["flow_steps"],
        )
    )
    ensemble = CriticEnsemble(
        config["ob_dims"][0],
        config["action_dim"] * config["horizon_length"],
        config["value_hidden_dims"],
        config["num_qs"],
        layer_norm=config["value_layer_norm"],
    )
    critic = Critic(
        ensemble,
        pessimism=config["rho"],
        target_rate=config["tau"],
        clip_actions=config["clip_adj"],
    )
    method = TRQAM(policy, critic, _method_config(config))
    with torch.no_grad():
        for name, module in _networks(method).items():
            for key, weight in _named_weights(name, module):
                weight.copy_(torch.from_numpy(data[f"init/{key}"]))
    if "u0/in/lambda_raw" in data:
        method.trust_region.lam = float(data["u0/in/lambda_raw"]) * config["lam_scale"]
        method.trust_region.kl_ema = float(data["u0/in/kl_ema"])
    return method


def _networks(method: TRQAM) -> dict[str, nn.Module]:
    policy = method.policy
    assert isinstance(policy, MLPFlowPolicy)
    assert policy.behaviour is not None
    return {
        "modules_actor_fast/mlp": policy.tuned,
        "modules_actor_slow/mlp": policy.behaviour,
        "modules_target_actor_slow/mlp": policy.base,
        "modules_critic/value_net": method.critic.online,
        "modules_target_critic/value_net": method.critic.target,
    }


def _named_weights(prefix: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    """Every weight under the file's key and in its layout (kernels are (in, out))."""
    assert isinstance(module, VelocityMLP | CriticEnsemble)
    pairs: list[tuple[str, Tensor]] = []
    for i, layer in enumerate(module.layers):
        kernel = layer.weight.t() if isinstance(layer, nn.Linear) else layer.weight
        pairs += [(f"{prefix}/Dense_{i}/kernel", kernel), (f"{prefix}/Dense_{i}/bias", layer.bias)]
    for i, norm in enumerate(module.norms):
        scale = norm.weight if isinstance(norm, nn.LayerNorm) else norm.scale
        pairs += [
            (f"{prefix}/LayerNorm_{i}/scale", scale),
            (f"{prefix}/LayerNorm_{i}/bias", norm.bias),
        ]
    return pairs


BATCH_KEYS = ("observations", "actions", "next_observations", "rewards", "masks", "valid")


def read_batch(data: Golden, update: int, discount: float) -> TransitionBatch:
    """The recorded batch in this library's words."""
    get = {k: torch.from_numpy(data[f"u{update}/batch/{k}"]) for k in BATCH_KEYS}
    valid = get["valid"][:, -1:] > 0
    actions = get["actions"]
    steps = actions.shape[1]
    ended = get["masks"][:, -1] == 0
    return TransitionBatch(
        observation=get["observations"],
        action=actions,
        chunk_return=get["rewards"][:, -1],
        next_observation=get["next_observations"][:, -1],
        discount=torch.full(ended.shape, discount),
        # Their `valid` wins over `masks`; ours counts a terminated chunk whatever its length.
        terminated=ended & valid[:, 0],
        truncated=torch.zeros_like(ended),
        valid=valid.expand(-1, steps),
    )


def read_noise(data: Golden, update: int, config: dict, shape: torch.Size) -> UpdateNoise:
    """The recorded noise: named in TRQAM's files, in drawing order in QAM's."""
    prefix = f"u{update}"
    if f"{prefix}/noise/sde_x0" in data:
        names = ("next_action", "sde_x0", "sde_steps", "bc_x0", "bc_t")
        arrays = [data[f"{prefix}/noise/{name}"] for name in names]
    else:
        draws = [data[k] for k in sorted(k for k in data if k.startswith(f"{prefix}/draw/"))]
        arrays = [draws[0], draws[3], np.stack(draws[4:]), draws[1], draws[2]]
    tensors = [torch.from_numpy(a) for a in arrays]
    steps = config["flow_steps"]
    return UpdateNoise(
        next_action=tensors[0].reshape(shape),
        sde_x_0=tensors[1].reshape(shape),
        sde_steps=tensors[2].reshape(steps, *shape),
        bc_x_0=tensors[3].reshape(shape),
        bc_tau=tensors[4].reshape(shape[0]),
    )


def compare_update(
    comparison: Comparison, method: TRQAM, result: UpdateResult, data: Golden, update: int
) -> None:
    """Compares one update's outputs and the dual state after it."""
    out, scale = result.output, method.config.lam_init
    ours: dict[str, Tensor | float] = {
        "out/xs": out.trajectory.states,
        "out/adjoints": out.adjoint,
        "out/ts": torch.tensor([method.loss.grid.tau(i) for i in range(len(out.adjoint))])
        .view(-1, 1, 1)
        .expand(-1, len(out.target), 1),
        "out/next_actions": out.next_action,
        "out/kl_ema": method.trust_region.kl_ema,
        "out/lambda_raw": method.trust_region.lam / scale,
        "info/actor/adj_loss": out.adjoint_loss,
        "info/actor/flow_loss": out.bc_loss if out.bc_loss is not None else float("nan"),
        "info/actor/path_kl": result.kl_estimate,
        "info/critic/critic_loss": out.td_loss,
        "info/critic/q_mean": out.q.mean(),
        "info/critic/q_max": out.q.max(),
        "info/critic/q_min": out.q.min(),
        "info/actor/adj_mean": out.terminal_adjoint.abs().mean(),
        "info/actor/adj_max": out.terminal_adjoint.abs().max(),
        "info/actor/adj_std": out.terminal_adjoint.abs().std(correction=0),
        "info/grad/norm": _sum_of_gradient_norms(method, result),
        "info/dual/kl_estimate": result.kl_estimate,
        "info/dual/kl_ema": method.trust_region.kl_ema,
        "info/dual/lambda": method.trust_region.lam,
    }
    for name, value in ours.items():
        if f"u{update}/{name}" in data:
            comparison.add(name, value, data[f"u{update}/{name}"])


def _sum_of_gradient_norms(method: TRQAM, result: UpdateResult) -> float:
    """Their ``grad/norm``: the sum over arrays of each array's norm, before clipping."""
    groups = method.optimizer.param_groups
    clipped = sum(float(p.grad.norm()) for group in groups for p in group["params"])
    return clipped * max(1.0, float(result.grad_norms[0]) / method.config.max_grad_norm)


def compare_weights(comparison: Comparison, method: TRQAM, data: Golden, prefix: str) -> None:
    """Compares the weights stored under a prefix, where there are any."""
    for name, module in _networks(method).items():
        for key, weight in _named_weights(name, module):
            if f"{prefix}/{key}" in data:
                comparison.add(f"{prefix}/{name}", weight, data[f"{prefix}/{key}"])


def compare_evaluation(comparison: Comparison, method: TRQAM, data: Golden) -> None:
    """Compares the final policy's ODE actions."""
    policy = method.policy
    context = policy.encode(torch.from_numpy(data["eval/obs"]))
    x_0 = torch.from_numpy(data["eval/noise"]).reshape(-1, *policy.chunk_shape)
    with torch.no_grad():
        actions = sample_ode(
            lambda x, tau: policy.velocity(x, tau, context), x_0, TimeGrid(policy.num_flow_steps)
        )
    comparison.add("eval/actions", actions.clamp(-1.0, 1.0), data["eval/actions"])


def replay(path: Path, rtol: float = RTOL, atol: float = ATOL) -> Comparison:
    """Runs every recorded update and compares everything the file holds."""
    data, config = load_golden(path)
    method = build(data, config)
    comparison = Comparison(rtol, atol)
    discount = config["discount"] ** config["horizon_length"]
    num_updates = len({k.split("/")[0] for k in data if k[0] == "u" and k[1].isdigit()})
    if num_updates == 0:
        raise UserError(f"{path} holds no updates (no u0/... entries); there is nothing to compare")
    for update in range(num_updates):
        batch = read_batch(data, update, discount)
        noise = read_noise(data, update, config, batch.action.shape)
        result = method.update(batch, noise)
        compare_update(comparison, method, result, data, update)
        compare_weights(comparison, method, data, f"u{update}/out")
    compare_weights(comparison, method, data, "final")
    if "eval/actions" in data:
        compare_evaluation(comparison, method, data)
    return comparison


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--rtol", type=float, default=RTOL)
    parser.add_argument("--atol", type=float, default=ATOL)
    arguments = parser.parse_args()
    try:
        comparison = replay(arguments.file, arguments.rtol, arguments.atol)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, error in comparison.worst.items():
        print(f"{name:<42} {error:.2e}{'' if error <= arguments.rtol else '   OUT OF TOLERANCE'}")
    print("all within tolerance" if not comparison.failures else f"failed: {comparison.failures}")
    return 1 if comparison.failures else 0


if __name__ == "__main__":
    sys.exit(main())
