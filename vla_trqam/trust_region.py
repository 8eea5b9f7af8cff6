"""The trust region: the path-space KL and the dual descent that keeps it to its budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from vla_trqam.errors import DivergenceError, UserError
from vla_trqam.time_grid import TimeGrid

DualSteps = Literal["additive", "relative"]


def path_kl_per_step(control_gap: Tensor, grid: TimeGrid) -> Tensor:
    r"""Each flow step's share of the path-space KL, in nats per chunk, (K,), without gradient.

    Two Gaussian steps of the same noise whose fields differ: ``B_i^2 / (2 V_i) E_b || v_tuned -
    v_base ||^2``, exact for the sampled chain where it takes the step with noise (Girsanov as K
    grows). It does not depend on lambda.

    Args:
        control_gap: ``v_tuned - v_base`` along the path, (K, B, H, A).
        grid: the chain's steps.
    """
    return _kl_terms(control_gap.detach(), grid)


def kl_penalty(control_gap: Tensor, grid: TimeGrid, weights: Tensor | None = None) -> Tensor:
    """:func:`path_kl` as a term of a loss: the gradient flows through ``control_gap``.

    Every step's term may have a weight, (K,).
    """
    terms = _kl_terms(control_gap, grid)
    return terms.sum() if weights is None else (terms * weights).sum()


def _kl_terms(control_gap: Tensor, grid: TimeGrid) -> Tensor:
    squared = control_gap.flatten(2).square().sum(dim=2).mean(dim=1)
    gains = squared.new_tensor([step.gain * step.noisy for step in grid.steps])
    return squared * gains / squared.new_tensor([step.noise_scale_squared for step in grid.steps])


def path_kl(control_gap: Tensor, grid: TimeGrid) -> Tensor:
    """The path-space KL ``D(P_tuned || P_base)`` in nats per chunk, a scalar."""
    return path_kl_per_step(control_gap, grid).sum()


@dataclass(frozen=True)
class TrustRegionConfig:
    """Knobs of the dual descent.

    Attributes:
        kl_budget: ``eps_KL``; nats per chunk, or per action when ``kl_per_action``, of the chain:
            with another scheme or number of flow steps they are other nats (docs/method.md).
        kl_per_action: divide the path KL by n, the actions executed of the chunk, as the authors'
            code, which executes all, does.
        lam_init: lambda before the first update.
        lam_min: the lower bound of lambda.
        lam_max: the upper bound of lambda.
        dual_step_size: ``eta_lambda``; 0 freezes lambda at ``lam_init``.
        dual_steps: "additive", the authors' ``lam + eta (D_bar - eps_KL)``, whose steps are a large
            part of a small lambda, so that KL and lambda swing at wide budgets; or "relative",
            ``lam exp(eta (D_bar / eps_KL - 1))``, ours, as quick at every budget.
        kl_ema_rate: ``rho`` of ``D_bar <- (1 - rho) D_bar + rho D_hat``, started at 0.
        kl_clip: the estimate is clipped at ``kl_clip * kl_budget`` before the EMA; None leaves it.
    """

    kl_budget: float = 1.0
    kl_per_action: bool = True
    lam_init: float = 3.0
    lam_min: float = 0.03
    lam_max: float = 300.0
    dual_step_size: float = 0.03
    dual_steps: DualSteps = "additive"
    kl_ema_rate: float = 0.1
    kl_clip: float | None = 2.0

    def __post_init__(self) -> None:
        if not 0.0 < self.kl_budget < math.inf:
            raise UserError(
                f"kl_budget is {self.kl_budget}; the KL budget must be a positive, finite number "
                "of nats"
            )
        if not 0.0 < self.lam_min <= self.lam_init <= self.lam_max < math.inf:
            raise UserError(
                f"lam_min, lam_init, lam_max are {self.lam_min}, {self.lam_init}, {self.lam_max}; "
                "they must satisfy 0 < lam_min <= lam_init <= lam_max, and be finite"
            )
        if not 0.0 <= self.dual_step_size < math.inf:
            raise UserError(
                f"dual_step_size is {self.dual_step_size}; it must be finite and not negative"
            )
        if self.dual_steps not in get_args(DualSteps):
            known = " or ".join(map(repr, get_args(DualSteps)))
            raise UserError(f"dual_steps is {self.dual_steps!r}; it must be {known}")
        if not 0.0 < self.kl_ema_rate <= 1.0:
            raise UserError(f"kl_ema_rate is {self.kl_ema_rate}; it must be in (0, 1]")
        if self.kl_clip is not None and not self.kl_clip > 1.0:
            raise UserError(
                f"kl_clip is {self.kl_clip}; it must exceed 1 (times the budget), or be null for "
                "no clip: an estimate clipped at the budget can never raise lambda"
            )

    def kl_divisor(self, executed_length: int) -> int:
        """What a path KL in nats per chunk is divided by to be in the budget's unit."""
        return executed_length if self.kl_per_action else 1


class TrustRegion:
    """Lambda by dual descent: ``lam <- clip(lam + eta (D_bar - eps_KL), lam_min, lam_max)``.

    The relative steps are the same descent on ``log lam``, in units of the budget.
    """

    def __init__(self, config: TrustRegionConfig, executed_length: int) -> None:
        self.config = config
        self.lam = config.lam_init
        self.kl_ema = 0.0
        self._divisor = config.kl_divisor(executed_length)

    def in_budget_units(self, kl: float) -> float:
        """A path KL (nats per chunk) in the budget's unit."""
        return kl / self._divisor

    def update(self, kl_estimate: float) -> None:
        """One dual step with this batch's estimate ``D_hat``, in the budget's unit.

        Raises:
            DivergenceError: the estimate is not finite. NaN would stay in lambda; infinity, clipped
                like a large KL, would lower lambda as long as the average is below the budget.
        """
        config = self.config
        if not math.isfinite(kl_estimate):
            raise DivergenceError(
                f"training has diverged: the path KL is {kl_estimate} at lambda {self.lam:.3g}"
            )
        limit = float("inf") if config.kl_clip is None else config.kl_clip * config.kl_budget
        clipped = min(kl_estimate, limit)
        self.kl_ema += config.kl_ema_rate * (clipped - self.kl_ema)
        self.lam = min(max(self._moved(), config.lam_min), config.lam_max)

    def _moved(self) -> float:
        config, step = self.config, self.config.dual_step_size
        if config.dual_steps == "relative":
            most = math.log(config.lam_max / self.lam)  # of an unclipped KL exp may have no number
            return self.lam * math.exp(min(step * (self.kl_ema / config.kl_budget - 1.0), most))
        return self.lam + step * (self.kl_ema - config.kl_budget)

    def state_dict(self) -> dict[str, float]:
        """Everything that moves; Python floats, so that JSON keeps every bit."""
        return {"lam": self.lam, "kl_ema": self.kl_ema}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores :meth:`state_dict`; a lambda that no dual moves is a setting, not a state.

        Raises:
            UserError: lambda is not within the bounds.
        """
        lam, config = float(state["lam"]), self.config
        if config.dual_step_size > 0.0:
            if not config.lam_min <= lam <= config.lam_max:
                raise UserError(
                    f"lambda there is {lam:g}, and --method.lam_min={config.lam_min:g} and "
                    f"--method.lam_max={config.lam_max:g} do not hold it"
                )
            self.lam = lam
        self.kl_ema = float(state["kl_ema"])
