"""A slow second implementation of the recorded updates.

It shares nothing with the library: weights are a dictionary under the file's own keys, every loop
is a plain loop (over critics, flow steps and arrays), gradients come from autograd, and everything
is float64. `test_reference_update.py` holds it against the files of the authors' code; the library
then replays files that `golden_files.py` writes with it at other sizes.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Weights = dict[str, Tensor]

NETWORKS = {
    "base": "modules_target_actor_slow/mlp",
    "behaviour": "modules_actor_slow/mlp",
    "tuned": "modules_actor_fast/mlp",
    "critic": "modules_critic/value_net",
    "target": "modules_target_critic/value_net",
}
TRAINED = ("behaviour", "tuned", "critic")
EDIT, EDIT_ALPHA = "modules_edit_actor", "modules_edit_alpha"
"""Of files of QAM-E alone."""


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-6) * scale + bias


def mlp(weights: Weights, network: str, inputs: Tensor, member: int | None = None) -> Tensor:
    """One network, or one member of an ensemble."""

    def get(name: str) -> Tensor:
        value = weights[f"{network}/{name}"]
        return value if member is None else value[member]

    depth = len([k for k in weights if k.startswith(f"{network}/Dense_") and k.endswith("kernel")])
    x = inputs
    for i in range(depth):
        x = x @ get(f"Dense_{i}/kernel") + get(f"Dense_{i}/bias")
        if i < depth - 1:
            x = F.gelu(x, approximate="tanh")
            if f"{network}/LayerNorm_{i}/scale" in weights:
                x = layer_norm(x, get(f"LayerNorm_{i}/scale"), get(f"LayerNorm_{i}/bias"))
    return x


@dataclass
class Learner:
    """Everything that an update changes.

    Attributes:
        config: the file's settings.
        weights: every network's arrays, float64, by the file's keys without `init/`.
        lam_raw: the multiplier before `lam_scale`.
        kl_ema: the running KL.
    """

    config: dict[str, Any]
    weights: Weights
    lam_raw: float = 1.0
    kl_ema: float = 0.0
    step: int = 0
    first: Weights = field(default_factory=dict)
    second: Weights = field(default_factory=dict)

    def velocity(self, name: str, observation: Tensor, x: Tensor, time: float | Tensor) -> Tensor:
        column = torch.as_tensor(time, dtype=x.dtype).expand(len(x), 1)
        return mlp(self.weights, NETWORKS[name], torch.cat([observation, x, column], dim=1))

    def q_values(self, name: str, observation: Tensor, action: Tensor) -> Tensor:
        inputs = torch.cat([observation, action], dim=1)
        members = range(self.config["num_qs"])
        values = [mlp(self.weights, NETWORKS[name], inputs, e)[:, 0] for e in members]
        return torch.stack(values)

    def ode_action(self, observation: Tensor, noise: Tensor) -> Tensor:
        x, steps = noise, self.config["flow_steps"]
        for i in range(steps):
            x = x + self.velocity("tuned", observation, x, i / steps) / steps
        return x.clamp(-1, 1)

    def edited(self, observation: Tensor, flow: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """QAM-E's action and the log-density of its edit, row by row and number by number."""
        actions, densities = [], []
        for s, a, eps in zip(observation, flow, noise, strict=True):
            h, i = torch.cat([s, a]), 0
            while f"{EDIT}/MLP_0/Dense_{i}/kernel" in self.weights:
                layer = f"{EDIT}/MLP_0/Dense_{i}"
                h = h @ self.weights[f"{layer}/kernel"] + self.weights[f"{layer}/bias"]
                h, i = F.gelu(h, approximate="tanh"), i + 1
            mean, log_std = (
                h @ self.weights[f"{EDIT}/OutputDense{head}/kernel"]
                + self.weights[f"{EDIT}/OutputDense{head}/bias"]
                for head in ("Mean", "LogStd")
            )
            total, numbers = torch.zeros((), dtype=s.dtype), []
            for m, log_s, e in zip(mean, log_std.clamp(-20, 2), eps, strict=True):
                u = m + torch.exp(log_s) * e
                normal = -0.5 * e**2 - log_s - 0.5 * math.log(2 * math.pi)
                # 1 - tanh(u)^2 = 4 / (e^u + e^-u)^2
                total = total + normal - torch.log(4 / (torch.exp(u) + torch.exp(-u)) ** 2)
                numbers.append(torch.tanh(u))
            moved = a + self.config["edit_scale"] * torch.stack(numbers)
            actions.append(moved.clamp(-1, 1))
            densities.append(total)
        return torch.stack(actions), torch.stack(densities)

    def is_trqam(self) -> bool:
        return self.config["agent_name"] == "trqam"


def grid(steps: int, i: int) -> tuple[float, float, float]:
    """h, t and g^2 of step i."""
    h, t = 1.0 / steps, i / steps
    return h, t, 2.0 * (1.0 - t + h) / (t + h)


def critic_loss(learner: Learner, batch: Weights, noise: Weights) -> tuple[Tensor, Weights]:
    config, last = learner.config, batch["next_observations"][:, -1]
    with torch.no_grad():
        next_action = learner.ode_action(last, noise["next_action"])
        if "next_edit" in noise:
            next_action, _ = learner.edited(last, next_action, noise["next_edit"])
        next_q = learner.q_values("target", last, next_action)
        spread = torch.sqrt(((next_q - next_q.mean(0)) ** 2).mean(0))
        discount = config["discount"] ** config["horizon_length"]
        target = batch["rewards"][:, -1] + discount * batch["masks"][:, -1] * (
            next_q.mean(0) - config["rho"] * spread
        )
    q = learner.q_values("critic", batch["observations"], batch["actions"].flatten(1))
    loss = ((q - target) ** 2 * batch["valid"][:, -1]).mean()
    out = {"q_mean": q.mean(), "q_max": q.max(), "q_min": q.min(), "next_actions": next_action}
    return loss, out


def forward_path(learner: Learner, observation: Tensor, x_0: Tensor, noise: Tensor) -> list[Tensor]:
    steps, xs = learner.config["flow_steps"], [x_0]
    with torch.no_grad():
        for i in range(steps):
            h, t, g_squared = grid(steps, i)
            x = xs[-1]
            if i < steps - 1:
                drift = 2 * learner.velocity("tuned", observation, x, t) - x / (t + h)
                xs.append(x + h * drift + (h * g_squared) ** 0.5 * noise[i])
            else:
                xs.append(x + h * learner.velocity("base", observation, x, t))
    return xs


def terminal_adjoint(learner: Learner, observation: Tensor, x_1: Tensor) -> Tensor:
    config = learner.config
    point = x_1.clone().requires_grad_(True)
    inside = point.clamp(-1, 1) if config["clip_adj"] else point
    value = learner.q_values("target", observation, inside).mean(0).sum()
    return -config.get("inv_temp", 1.0) * torch.autograd.grad(value, point)[0]


def backward_path(
    learner: Learner, observation: Tensor, xs: list[Tensor], last: Tensor
) -> list[Tensor]:
    steps, a = learner.config["flow_steps"], last
    adjoints: list[Tensor] = []
    for i in reversed(range(steps)):
        h, t, _ = grid(steps, i)
        point = xs[i].clone().requires_grad_(True)
        drift = 2 * learner.velocity("base", observation, point, t + h) - point / (t + h)
        a = a + h * torch.autograd.grad(drift, point, a)[0]
        adjoints.insert(0, a)
    return adjoints


def actor_losses(learner: Learner, batch: Weights, noise: Weights) -> tuple[Tensor, Tensor, dict]:
    """Flow matching, adjoint matching, and what else is recorded."""
    config, observation = learner.config, batch["observations"]
    steps, action = config["flow_steps"], batch["actions"].flatten(1)
    t, x_0 = noise["bc_t"], noise["bc_x0"]
    predicted = learner.velocity("behaviour", observation, (1 - t) * x_0 + t * action, t)
    error = ((predicted - (action - x_0)) ** 2).mean(1)
    flow = (error * batch["valid"][:, -1]).mean()

    xs = forward_path(learner, observation, noise["sde_x0"], noise["sde_steps"])
    last = terminal_adjoint(learner, observation, xs[-1])
    adjoints = backward_path(learner, observation, xs, last)
    lam = config["lam_scale"] * learner.lam_raw if learner.is_trqam() else 1.0
    adjoint_loss, kl = torch.zeros((), dtype=torch.float64), 0.0
    for i in range(steps):
        h, t_i, g_squared = grid(steps, i)
        gap = learner.velocity("tuned", observation, xs[i], t_i)
        gap = gap - learner.velocity("base", observation, xs[i], t_i).detach()
        sigma = (g_squared / lam) ** 0.5
        residual = 2 * gap / sigma + sigma * adjoints[i]
        adjoint_loss = adjoint_loss + (residual**2).sum(1).mean()
        kl += float(2 * h / g_squared * (gap.detach() ** 2).sum(1).mean())
    magnitude = last.abs()
    out = {
        "xs": torch.stack(xs[:-1]),
        "adjoints": torch.stack(adjoints),
        "ts": torch.tensor([i / steps for i in range(steps)])[:, None, None].expand(
            -1, len(action), 1
        ),
        "path_kl": kl / config["horizon_length"],
        "adj_mean": magnitude.mean(),
        "adj_max": magnitude.max(),
        "adj_std": ((magnitude - magnitude.mean()) ** 2).mean().sqrt(),
    }
    return flow, adjoint_loss, out


def edit_losses(learner: Learner, batch: Weights, noise: Weights) -> tuple[Tensor, dict]:
    """QAM-E's edit and its temperature; the critic's weights are fixed, the flow's chunk too."""
    observation = batch["observations"]
    with torch.no_grad():
        flow = learner.ode_action(observation, noise["edit_flow"])
    action, log_p = learner.edited(observation, flow, noise["edit"])
    fixed = Learner(learner.config, {k: v.detach() for k, v in learner.weights.items()})
    fixed.weights |= {k: v for k, v in learner.weights.items() if k.startswith(EDIT)}
    q = fixed.q_values("critic", observation, action).mean(0)
    alpha = torch.exp(learner.weights[f"{EDIT_ALPHA}/log_value"])
    entropy = -log_p.detach().mean()
    q_loss, entropy_loss = -q.mean(), (alpha.detach() * log_p).mean()
    alpha_loss = alpha * (entropy - learner.config["edit_target_entropy"])
    out = {
        "edit_alpha": alpha,
        "edit_alpha_loss": alpha_loss,
        "edit_entropy": entropy,
        "edit_entropy_loss": entropy_loss,
        "edit_q_loss": q_loss,
    }
    return q_loss + entropy_loss + alpha_loss, out


def dual_update(learner: Learner, kl: float) -> dict[str, float]:
    config = learner.config
    limit = config["kl_clip_coef"] * config["kl_budget"]
    rate = config["kl_ema_coef"]
    learner.kl_ema = (1 - rate) * learner.kl_ema + rate * min(kl, limit)
    moved = learner.lam_raw + config["eta_lambda"] * (learner.kl_ema - config["kl_budget"])
    learner.lam_raw = min(max(moved, config["lambda_min"]), config["lambda_max"])
    lam = config["lam_scale"] * learner.lam_raw
    return {
        "dual/lambda": lam,
        "dual/sigma_scale": lam**-0.5,
        "dual/kl_estimate": kl,
        "dual/kl_estimate_clipped": min(kl, limit),
        "dual/kl_clipped": float(kl > limit),
        "dual/kl_ema": learner.kl_ema,
        "dual/kl_budget": config["kl_budget"],
    }


def adam_step(learner: Learner, gradients: Weights) -> None:
    """One Adam over every array after one clip of the global norm."""
    config = learner.config
    norm = sum(float((g**2).sum()) for g in gradients.values()) ** 0.5
    factor = min(1.0, 1.0 / norm) if config["clip_grad"] else 1.0
    learner.step += 1
    for key, gradient in gradients.items():
        g = gradient * factor
        zero = torch.zeros_like(g)
        learner.first[key] = 0.9 * learner.first.get(key, zero) + 0.1 * g
        learner.second[key] = 0.999 * learner.second.get(key, zero) + 0.001 * g**2
        mean = learner.first[key] / (1 - 0.9**learner.step)
        deviation = torch.sqrt(learner.second[key] / (1 - 0.999**learner.step))
        learner.weights[key] = learner.weights[key] - config["lr"] * mean / (deviation + 1e-8)


def follow(learner: Learner, average: str, current: str, old: Weights) -> None:
    """Moves a target network towards the weights as they were before the step."""
    rate = learner.config["tau"]
    for key in list(learner.weights):
        if key.startswith(NETWORKS[average]):
            source = old[key.replace(NETWORKS[average], NETWORKS[current])]
            learner.weights[key] = rate * source + (1 - rate) * learner.weights[key]


def update(learner: Learner, batch: Weights, noise: Weights) -> dict[str, Any]:
    """One update; returns what a golden file records of it, by its keys after `u<n>/`."""
    nets = (*(NETWORKS[n] for n in TRAINED), EDIT, EDIT_ALPHA)
    trained = [k for k in learner.weights if k.startswith(nets)]
    for key in trained:
        learner.weights[key] = learner.weights[key].detach().requires_grad_(True)
    before = {"in/lambda_raw": learner.lam_raw, "in/kl_ema": learner.kl_ema}
    td, critic = critic_loss(learner, batch, noise)
    flow, adjoint, actor = actor_losses(learner, batch, noise)
    total = td + flow + adjoint
    if "edit" in noise:
        edit, found = edit_losses(learner, batch, noise)
        total, actor = total + edit, actor | found
    leaves = [learner.weights[k] for k in trained]
    gradients = dict(zip(trained, torch.autograd.grad(total, leaves), strict=True))
    old = {k: v.detach() for k, v in learner.weights.items()}
    learner.weights = dict(old)
    adam_step(learner, gradients)
    follow(learner, "target", "critic", old)
    follow(learner, "base", "behaviour", old)
    kl = actor.pop("path_kl")
    path = {f"out/{k}": actor.pop(k) for k in ("xs", "adjoints", "ts")}
    path["out/next_actions"] = critic.pop("next_actions")
    info: dict[str, Any] = {
        "critic/critic_loss": td,
        "actor/flow_loss": flow,
        "actor/adj_loss": adjoint,
        "actor/fast_loss": adjoint,
        "grad/norm": sum(float(g.norm()) for g in gradients.values()),
        "grad/max": max(float(g.max()) for g in gradients.values()),
        "grad/min": min(float(g.min()) for g in gradients.values()),
        **{f"critic/{k}": v for k, v in critic.items()},
        **{f"actor/{k}": v for k, v in actor.items()},
    }
    if not learner.is_trqam():
        return {f"info/{k}": v for k, v in info.items()}
    info |= dual_update(learner, kl) | {"actor/path_kl": kl}
    after = {"out/lambda_raw": learner.lam_raw, "out/kl_ema": learner.kl_ema}
    return before | path | after | {f"info/{k}": v for k, v in info.items()}


def read_learner(data: dict[str, np.ndarray]) -> Learner:
    """The state before update 0 of a golden file."""
    config = json.loads(bytes(data["config.json"]).decode())
    used = tuple(f"init/{name}" for name in (*NETWORKS.values(), EDIT, EDIT_ALPHA))
    weights = {k.removeprefix("init/"): as_double(data[k]) for k in data if k.startswith(used)}
    return Learner(config, weights)


def read_update(data: dict[str, np.ndarray], number: int) -> tuple[Weights, Weights]:
    """Batch and noise of one update."""
    prefix = f"u{number}/"
    fields = ("observations", "actions", "next_observations", "rewards", "masks", "valid")
    batch = {k: as_double(data[f"{prefix}batch/{k}"]) for k in fields}
    if f"{prefix}noise/sde_x0" in data:
        names = ("next_action", "bc_x0", "bc_t", "sde_x0", "sde_steps")
        return batch, {k: as_double(data[f"{prefix}noise/{k}"]) for k in names}
    draws = [as_double(data[k]) for k in sorted(data) if k.startswith(f"{prefix}draw/")]
    edits: Weights = {}
    if f"init/{EDIT_ALPHA}/log_value" in data:
        # The edits' numbers come first, the batch is their second axis.
        edits["next_edit"] = draws.pop(1)[:, :, 0].t()
        edits["edit"], edits["edit_flow"] = draws.pop().t(), draws.pop()
    return batch, edits | {
        "next_action": draws[0][:, 0],
        "bc_x0": draws[1],
        "bc_t": draws[2],
        "sde_x0": draws[3],
        "sde_steps": torch.stack(draws[4:]),
    }


def as_double(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float64))
