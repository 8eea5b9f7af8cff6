"""The methods by name. A new one is its file and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vla_trqam.critic import Critic
from vla_trqam.errors import UserError
from vla_trqam.methods.base import MethodConfig, Offers, OffPolicyMethod, Requirements
from vla_trqam.methods.best_of_n import BestOfNConfig, BestOfNMethod
from vla_trqam.methods.cgql import CGQL, CGQLConfig, CGQLLConfig
from vla_trqam.methods.dsrl import DSRL, DSRLConfig
from vla_trqam.methods.external_kl import ExternalKL, ExternalKLConfig
from vla_trqam.methods.fql import FQL, FQLConfig
from vla_trqam.methods.ifql import IFQL, IFQLConfig
from vla_trqam.methods.qam import QAMConfig
from vla_trqam.methods.qam_e import QAME, QAMEConfig
from vla_trqam.methods.residual import Residual, ResidualConfig
from vla_trqam.methods.reward_matching import RewardMatching, RewardMatchingConfig
from vla_trqam.methods.sac_flow import SACFlow, SACFlowConfig
from vla_trqam.methods.sqam import SQAM, SQAMConfig
from vla_trqam.methods.trqam import TRQAM
from vla_trqam.methods.trqam_config import TRQAMConfig
from vla_trqam.policy import FlowPolicy

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Entry:
    """A method that can be chosen.

    Attributes:
        config: the dataclass of its knobs.
        make: ``(policy, critic, config, accelerator) -> method``.
        requirements: what it asks of a policy and a run.
    """

    config: type[MethodConfig]
    make: Callable[..., OffPolicyMethod]
    requirements: Requirements


def _entry(config: type[MethodConfig], method: Any) -> Entry:
    return Entry(config, method, method.requirements)


METHODS = {
    "trqam": _entry(TRQAMConfig, TRQAM),
    "qam": _entry(QAMConfig, TRQAM),
    "qam_e": _entry(QAMEConfig, QAME),
    "external_kl": _entry(ExternalKLConfig, ExternalKL),
    "sqam": _entry(SQAMConfig, SQAM),
    "reward_matching": _entry(RewardMatchingConfig, RewardMatching),
    "residual": _entry(ResidualConfig, Residual),
    "fql": _entry(FQLConfig, FQL),
    "ifql": _entry(IFQLConfig, IFQL),
    "dsrl": _entry(DSRLConfig, DSRL),
    "best_of_n": _entry(BestOfNConfig, BestOfNMethod),
    "cgql": _entry(CGQLConfig, CGQL),
    "cgql_l": _entry(CGQLLConfig, CGQL),
    "sac_flow": _entry(SACFlowConfig, SACFlow),
}


def name_of(config: MethodConfig) -> str:
    """The method whose knobs these are."""
    return next(name for name, entry in METHODS.items() if entry.config is type(config))


def requirements_of(config: MethodConfig) -> Requirements:
    """What the method with these knobs asks of a policy and a run."""
    return METHODS[name_of(config)].requirements


def check_served(config: MethodConfig, offers: Offers) -> None:
    """Refuses policies with which a method cannot do what its knobs want, before one is loaded.

    Raises:
        UserError: why they cannot serve.
    """
    if config.trains_the_base and not offers.training_base:
        raise UserError(
            f"--method.train_base=true: the base of a policy of this recipe is frozen, and "
            f"{name_of(config)} would train it; leave it at false"
        )
    if config.reads_interventions and not offers.interventions:
        raise UserError(
            "--method.clone_interventions needs data that tells which actions a person took, as "
            "LeRobotDatasets may; that of this recipe does not: leave it at 0"
        )
    if requirements_of(config).own_field and not offers.own_field:
        raise UserError(
            f"--method.type={name_of(config)} acts by a velocity network of its own architecture, "
            "which cannot take over the weights of a pretrained policy of this recipe; it runs on "
            "policies of states, in finetune_robomimic.py and finetune_ogbench.py"
        )


def check_pushed(name: str, what: str) -> None:
    """Refuses to push a policy that does not act as it was tuned.

    Args:
        name: the method's.
        what: the flag or the run that would push it.

    Raises:
        UserError: the method's own networks act.
    """
    if name in METHODS and not METHODS[name].requirements.host_acts:
        raise UserError(
            f"{what} would push a policy that acts as its base does: what {name} learns is "
            "networks beside it, which no library loads with a policy"
        )


def idle_knobs(config: MethodConfig) -> set[str]:
    """The flags of critic and policy that this method leaves without effect."""
    wants, idle = requirements_of(config), set[str]()
    if not wants.paths:
        idle |= {"--policy.compile", "--policy.cuda_graphs"}
    if not wants.adjoint:
        idle |= {"--critic.adjoint_pessimism", "--critic.clip_actions", "--critic.gradient_noise"}
    if not wants.next_actions:
        idle |= {"--critic.redraws", "--critic.next_actions"}
    return idle | set(wants.idle)


def make_method(
    policy: FlowPolicy,
    critic: Critic,
    config: MethodConfig,
    accelerator: Accelerator | None = None,
    *,
    shard: bool = False,
) -> OffPolicyMethod:
    """The method with these knobs; ``shard``: each process keeps a part of what is trained.

    Raises:
        UserError: it cannot be made with these knobs, or not in parts.
    """
    make = METHODS[name_of(config)].make
    if not shard:
        return make(policy, critic, config, accelerator)
    check_shard(config)
    return make(policy, critic, config, accelerator, shard=True)


def check_shard(config: MethodConfig) -> None:
    """Refuses methods and knobs with which the trained weights cannot be kept in parts.

    Raises:
        UserError: why not.
    """
    if not requirements_of(config).can_shard:
        can = ", ".join(name for name, entry in METHODS.items() if entry.requirements.can_shard)
        raise UserError(
            f"{name_of(config)} trains no weights of the policy's, or networks beside it, which "
            f"every process keeps whole; in parts there are {can}"
        )
    config.check_shard()
