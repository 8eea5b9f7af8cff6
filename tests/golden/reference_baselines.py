"""A slow second implementation of the updates of FQL, IFQL, DSRL and CGQL.

It shares nothing with the library: weights are a dictionary under the golden files' keys, losses
are sums over rows, heads and numbers in plain loops, gradients come from autograd, all in float64.
`test_reference_baselines.py` holds it against the files of the authors' code and then the library
against it where these files show nothing: chunks cut short, other sizes, scales and knobs.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from reference_update import Learner, Weights, adam_step, mlp
from torch import Tensor

CRITIC, TARGET = "modules_critic/value_net", "modules_target_critic/value_net"
FIELD = {
    "fql": "modules_actor_bc_flow/mlp",
    "ifql": "modules_actor_flow/mlp",
    "dsrl": "modules_actor_bc_flow/mlp",
    "cgql": "modules_actor/mlp",
}
ONE_STEP, VALUE = "modules_actor_onestep_flow/mlp", "modules_value/value_net"
SLOW_FIELD, NOISE_CRITIC = "modules_target_actor_bc_flow/mlp", "modules_z_critic/value_net"
NOISE_ACTOR, TEMPERATURE = "modules_actor", "modules_alpha"
TIMED_CRITIC, TIMED_TARGET = "modules_critic/mlp", "modules_target_critic/mlp"
GUIDED_FIELD = "modules_target_actor/mlp"
TRAINED = {
    "fql": (FIELD["fql"], ONE_STEP, CRITIC),
    "ifql": (FIELD["ifql"], VALUE, CRITIC),
    "dsrl": (FIELD["dsrl"], NOISE_CRITIC, NOISE_ACTOR, TEMPERATURE, CRITIC),
    "cgql": (FIELD["cgql"], TIMED_CRITIC),
}
FOLLOWING = {"fql": {TARGET: CRITIC}, "ifql": {TARGET: CRITIC}}
FOLLOWING["dsrl"] = {TARGET: CRITIC, SLOW_FIELD: FIELD["dsrl"]}
FOLLOWING["cgql"] = {TIMED_TARGET: TIMED_CRITIC, GUIDED_FIELD: FIELD["cgql"]}


@dataclass
class Row:
    """One chunk of the data.

    Attributes:
        observation, action, next_observation: s, a (flattened step by step), s'.
        chunk_return: R.
        discount: gamma^n.
        terminated: nothing comes after s'.
        valid: of every step of the chunk.
        td_weight: of its TD error.
    """

    observation: Tensor
    action: Tensor
    next_observation: Tensor
    chunk_return: float
    discount: float
    terminated: bool
    valid: list[bool]
    td_weight: float


@dataclass
class Reference:
    """A method's weights, settings and moments.

    Attributes:
        agent: fql, ifql, dsrl or cgql.
        config: the file's settings; ``train_base`` and ``normalize_q_loss`` may stand there too.
        weights: every network's arrays, float64, by the file's keys without `init/`.
    """

    agent: str
    config: dict[str, Any]
    weights: Weights
    adam: Learner = field(init=False)

    def __post_init__(self) -> None:
        self.adam = Learner(self.config | {"clip_grad": False}, self.weights)

    @property
    def trains_base(self) -> bool:
        return self.config.get("train_base", True)

    def velocity(self, network: str, s: Tensor, x: Tensor, time: float) -> Tensor:
        inputs = torch.cat([s, x, torch.tensor([time], dtype=x.dtype)])
        return mlp(self.weights, network, inputs)

    def flow(self, network: str, s: Tensor, x: Tensor) -> Tensor:
        """Euler's method from noise to a clipped action, without gradient."""
        steps = self.config["flow_steps"]
        with torch.no_grad():
            for i in range(steps):
                x = x + self.velocity(network, s, x, i / steps) / steps
        return x.clamp(-1, 1)

    def q(
        self, network: str, s: Tensor, a: Tensor, *, fixed: bool = False, time: float = 1.0
    ) -> list[Tensor]:
        """Every head's value; fixed weights pass a gradient to the action alone.

        CGQL's heads see the time too.
        """
        timed = self.agent == "cgql"
        network = network.replace("value_net", "mlp") if timed else network
        known = {k: v for k, v in self.weights.items() if k.startswith(f"{network}/")}
        if fixed:
            known = {k: v.detach() for k, v in known.items()}
        inputs = torch.cat([s, a, torch.tensor([time] * timed, dtype=s.dtype)])
        return [mlp(known, network, inputs, e)[0] for e in range(self.config["num_qs"])]

    def slow_value(self, s: Tensor, a: Tensor) -> float:
        """Mean - rho std of the target heads, by the population's deviation."""
        with torch.no_grad():
            heads = [float(q) for q in self.q(TARGET, s, a)]
        mean = sum(heads) / len(heads)
        variance = sum((q - mean) ** 2 for q in heads) / len(heads)
        return mean - self.config["rho"] * math.sqrt(variance)

    def guided(self, s: Tensor, x: Tensor) -> Tensor:
        """CGQL's steps from noise to a clipped action, without gradient."""
        steps, beta = self.config["flow_steps"], self.config["inv_temp"]
        network = GUIDED_FIELD
        if f"{network}/Dense_0/kernel" not in self.weights:
            network = FIELD["cgql"]  # a base that was never trained
        for i in range(steps):
            t = i / steps
            with torch.no_grad():
                v = self.velocity(network, s, x, t)
            if i > 0:
                point = x.clone().requires_grad_(True)
                asked = 1.0 if self.config["mode"] == "simple" else t
                heads = self.q(CRITIC, s, point, fixed=True, time=asked)
                (slope,) = torch.autograd.grad(sum(heads) / len(heads), point)
                v = v + self.config["guidance_coef"] * ((1 - t) * beta * slope + x) / t
            x = x + v / steps
        return x.clamp(-1, 1)

    def one_step(self, s: Tensor, z: Tensor) -> Tensor:
        return mlp(self.weights, ONE_STEP, torch.cat([s, z]))

    def chosen_noise(self, s: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """z in the box (-1, 1) and its log-density, number by number."""
        h, i = s, 0
        while f"{NOISE_ACTOR}/MLP_0/Dense_{i}/kernel" in self.weights:
            name = f"{NOISE_ACTOR}/MLP_0/Dense_{i}"
            h = F.gelu(
                h @ self.weights[f"{name}/kernel"] + self.weights[f"{name}/bias"],
                approximate="tanh",
            )
            i += 1
        mean, log_std = (
            h @ self.weights[f"{NOISE_ACTOR}/OutputDense{name}/kernel"]
            + self.weights[f"{NOISE_ACTOR}/OutputDense{name}/bias"]
            for name in ("Mean", "LogStd")
        )
        log_std = log_std.clamp(-20, 2)
        log_p = torch.zeros((), dtype=s.dtype)
        numbers = []
        for m, log_s, eps in zip(mean, log_std, drawn, strict=True):
            u = m + torch.exp(log_s) * eps
            normal = -0.5 * ((u - m) / torch.exp(log_s)) ** 2 - log_s - 0.5 * math.log(2 * math.pi)
            # 1 - tanh(u)^2 = 4 / (e^u + e^-u)^2
            log_p = log_p + normal - torch.log(4 / (torch.exp(u) + torch.exp(-u)) ** 2)
            numbers.append(torch.tanh(u))
        return torch.stack(numbers), log_p

    def acts(self, s: Tensor, drawn: Tensor) -> Tensor:
        """What is executed, from as much noise as it takes."""
        if self.agent == "fql":
            return self.one_step(s, drawn[0]).clamp(-1, 1)
        if self.agent == "dsrl":
            z, _ = self.chosen_noise(s, drawn[0])
            return self.flow(SLOW_FIELD, s, self.config["noise_scale"] * z)
        if self.agent == "cgql":
            return self.guided(s, drawn[0])
        proposals = [self.flow(FIELD["ifql"], s, x) for x in drawn]
        worst = [min(float(q) for q in self.q(CRITIC, s, a)) for a in proposals]
        return proposals[worst.index(max(worst))]


def td_loss(ours: Reference, rows: list[Row], next_values: list[float]) -> Tensor:
    """Mean over rows and heads."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, value in zip(rows, next_values, strict=True):
        y = row.chunk_return + (0.0 if row.terminated else row.discount * value)
        for q in ours.q(CRITIC, row.observation, row.action):
            total, count = total + row.td_weight * (q - y) ** 2, count + 1
    return total / count


def cloning_loss(ours: Reference, rows: list[Row], draws: Weights) -> Tensor:
    """Mean over rows and numbers, of which those of steps not taken are 0."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, x_0, time in zip(rows, draws["bc_x_0"], draws["bc_tau"], strict=True):
        t = float(time)
        x = (1 - t) * x_0 + t * row.action
        error = ours.velocity(FIELD[ours.agent], row.observation, x, t) - (row.action - x_0)
        width = len(row.action) // len(row.valid)
        for number, e in enumerate(error):
            total, count = total + row.valid[number // width] * e**2, count + 1
    return total / count


def fql_losses(ours: Reference, rows: list[Row], draws: Weights) -> Weights:
    next_values, distances, values, sizes = [], [], [], []
    for row, z_next, z in zip(rows, draws["next"], draws["distill"], strict=True):
        with torch.no_grad():
            a_next = ours.one_step(row.next_observation, z_next).clamp(-1, 1)
        next_values.append(ours.slow_value(row.next_observation, a_next))
        flow = ours.flow(FIELD["fql"], row.observation, z)
        action = ours.one_step(row.observation, z)
        distances += [(a - b) ** 2 for a, b in zip(action, flow, strict=True)]
        heads = ours.q(CRITIC, row.observation, action.clamp(-1, 1), fixed=True)
        values += heads
        sizes.append(abs(float(sum(q.detach() for q in heads)) / len(heads)))
    distill, value = sum(distances) / len(distances), sum(values) / len(values)
    scale = sum(sizes) / len(sizes) if ours.config.get("normalize_q_loss", False) else 1.0
    found = {"td": td_loss(ours, rows, next_values), "distill": distill, "value": value}
    return found | {"total": found["td"] + ours.config["alpha"] * distill - value / scale}


def ifql_losses(ours: Reference, rows: list[Row], draws: Weights) -> Weights:
    next_values, expectile, vs = [], torch.zeros((), dtype=torch.float64), []
    for row in rows:
        with torch.no_grad():
            next_values.append(float(mlp(ours.weights, VALUE, row.next_observation)[0]))
        q = ours.slow_value(row.observation, row.action)
        v = mlp(ours.weights, VALUE, row.observation)[0]
        kappa = ours.config["kappa"]
        weight = kappa if q >= float(v.detach()) else 1 - kappa
        expectile = expectile + weight * (q - v) ** 2 / len(rows)
        vs.append(v)
    td = td_loss(ours, rows, next_values)
    targets = [
        row.chunk_return + (0.0 if row.terminated else row.discount * value)
        for row, value in zip(rows, next_values, strict=True)
    ]
    logged = {"v": torch.stack(vs), "targets": torch.tensor(targets, dtype=torch.float64)}
    return {"td": td, "value": expectile, "total": td + expectile} | logged


def dsrl_losses(ours: Reference, rows: list[Row], draws: Weights) -> Weights:
    scale, slow = ours.config["noise_scale"], SLOW_FIELD
    if slow + "/Dense_0/kernel" not in ours.weights:
        slow = FIELD["dsrl"]  # a base that was never trained
    next_values, differences, costs, entropies, values = [], [], [], [], []
    alpha = torch.exp(ours.weights[f"{TEMPERATURE}/log_value"])
    for i, row in enumerate(rows):
        with torch.no_grad():
            z_next, _ = ours.chosen_noise(row.next_observation, draws["next"][i])
        a_next = ours.flow(slow, row.next_observation, scale * z_next)
        next_values.append(ours.slow_value(row.next_observation, a_next))
        w = draws["distill"][i]
        known = ours.q(CRITIC, row.observation, ours.flow(slow, row.observation, w), fixed=True)
        found = ours.q(NOISE_CRITIC, row.observation, w)
        differences += [(a - b.detach()) ** 2 for a, b in zip(found, known, strict=True)]
        z, log_p = ours.chosen_noise(row.observation, draws["actor"][i])
        heads = ours.q(NOISE_CRITIC, row.observation, scale * z, fixed=True)
        values.append(sum(heads) / len(heads))
        costs.append(alpha.detach() * log_p - values[-1])
        entropies.append(-log_p.detach())
    wanted = ours.config["target_entropy"]
    if wanted is None:
        wanted = -0.5 * len(rows[0].action)
    entropy = sum(entropies) / len(entropies)
    found = {
        "td": td_loss(ours, rows, next_values),
        "distill": sum(differences) / len(differences),
        "actor": sum(costs) / len(costs),
        "alpha_loss": alpha * (entropy - wanted),
    }
    logged = {"entropy": entropy, "alpha": alpha, "q": sum(values) / len(values)}
    return found | {"total": sum(found.values())} | logged


def cgql_losses(ours: Reference, rows: list[Row], draws: Weights) -> Weights:
    config, next_values, errors = ours.config, [], []
    beta, mode = config["inv_temp"], config["mode"]
    for i, row in enumerate(rows):
        a_next = ours.guided(row.next_observation, draws["next"][i])
        next_values.append(ours.slow_value(row.next_observation, a_next))
        if mode == "simple":
            continue
        t = float(draws["noisy_tau"][i])
        x = (1 - t) * draws["noisy_x_0"][i] + t * row.action
        with torch.no_grad():
            known = ours.q(TARGET, row.observation, row.action)
        for q, k in zip(ours.q(CRITIC, row.observation, x, time=t), known, strict=True):
            d = beta * (k - q)
            if mode == "mse":
                error = (q - k) ** 2
            else:
                error = d if float(d.detach()) > config["isd_clip"] else torch.exp(d) + beta * q
            errors.append(row.td_weight * error)
    found = {"td": td_loss(ours, rows, next_values)}
    if mode == "simple":
        return found | {"total": found["td"]}
    found["noisy"] = sum(errors) / len(errors)
    return found | {"total": found["td"] + config["noisy_coef"] * found["noisy"]}


LOSSES = {"fql": fql_losses, "ifql": ifql_losses, "dsrl": dsrl_losses, "cgql": cgql_losses}


def losses_and_gradients(
    ours: Reference, rows: list[Row], draws: Weights
) -> tuple[Weights, Weights]:
    """Every loss by name with their sum, and the sum's gradient to every trained array."""
    nets = TRAINED[ours.agent]
    if not ours.trains_base:
        nets = tuple(n for n in nets if n != FIELD[ours.agent])
    trained = [k for k in ours.weights if k.startswith(tuple(f"{n}/" for n in nets))]
    for key in trained:
        ours.weights[key] = ours.weights[key].detach().requires_grad_(True)
    found = LOSSES[ours.agent](ours, rows, draws)
    if ours.trains_base:
        found["cloning"] = cloning_loss(ours, rows, draws)
        found["total"] = found["total"] + found["cloning"]
    found |= {"online_q": online_values(ours, rows)}
    gradients = torch.autograd.grad(found["total"], [ours.weights[k] for k in trained])
    return {k: v.detach() for k, v in found.items()}, dict(zip(trained, gradients, strict=True))


def online_values(ours: Reference, rows: list[Row]) -> Tensor:
    with torch.no_grad():
        heads = [torch.stack(ours.q(CRITIC, row.observation, row.action)) for row in rows]
    return torch.stack(heads, dim=1)


def update(ours: Reference, rows: list[Row], draws: Weights) -> dict[str, Any]:
    """One update; returns what a golden file records of it, by its keys after `u<n>/info/`."""
    found, gradients = losses_and_gradients(ours, rows, draws)
    old = {k: v.detach() for k, v in ours.weights.items()}
    ours.weights = ours.adam.weights = dict(old)
    adam_step(ours.adam, gradients)
    rate = ours.config["tau"]
    for average, current in FOLLOWING[ours.agent].items():
        for key in [k for k in ours.weights if k.startswith(f"{average}/")]:
            source = old[key.replace(average, current)]
            ours.weights[key] = rate * source + (1 - rate) * ours.weights[key]
    return recorded(ours.agent, found) | {
        "grad/norm": sum(float(g.norm()) for g in gradients.values()),
        "grad/max": max(float(g.max()) for g in gradients.values()),
        "grad/min": min(float(g.min()) for g in gradients.values()),
    }


def recorded(agent: str, found: Weights) -> dict[str, Any]:
    """The losses under the file's names; derived and doubled ones left out."""
    if agent == "fql":
        names = {"actor/bc_flow_loss": "cloning", "actor/distill_loss": "distill"}
    elif agent == "ifql":
        names = {"actor/actor_loss": "cloning", "value/value_loss": "value"}
    elif agent == "cgql":
        names = {"actor/flow_loss": "cloning", "critic/noisy_critic_loss": "noisy"}
    else:
        names = {"critic/distill_loss": "distill", "actor/flow_loss": "cloning"}
        names |= {"actor/actor_loss": "actor", "actor/alpha_loss": "alpha_loss"}
        names |= {f"actor/{k}": k for k in ("alpha", "entropy", "q")}
    info: dict[str, Any] = {"critic/critic_loss": found["td"]}
    info |= {theirs: found[name] for theirs, name in names.items() if name in found}
    # What IFQL logs as q is the target.
    q = {"critic/q": found["targets"] if agent == "ifql" else found["online_q"]}
    if agent == "ifql":
        q["value/v"] = found["v"]
    for name, values in q.items():
        info |= {f"{name}_{end}": getattr(values, end)() for end in ("mean", "max", "min")}
    return info
