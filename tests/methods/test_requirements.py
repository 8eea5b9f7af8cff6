"""What a method asks is asked of settings and configs, before data or weights are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy
from vla_trqam.recipes import finetune_ogbench, finetune_robomimic

from vla_trqam.config.settings import OnlineConfig, RunSettings, refuse_idle_knobs
from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.config.vla_settings import FinetuneVLAConfig
from vla_trqam.errors import UserError
from vla_trqam.methods.base import MethodConfig
from vla_trqam.methods.best_of_n import BestOfNConfig
from vla_trqam.methods.cgql import CGQLConfig, CGQLLConfig
from vla_trqam.methods.dsrl import DSRLConfig
from vla_trqam.methods.external_kl import ExternalKLConfig
from vla_trqam.methods.fql import FQLConfig
from vla_trqam.methods.ifql import IFQLConfig
from vla_trqam.methods.qam import QAMConfig
from vla_trqam.methods.qam_e import QAMEConfig
from vla_trqam.methods.registry import METHODS, name_of
from vla_trqam.methods.residual import ResidualConfig
from vla_trqam.methods.sac_flow import SACFlowConfig
from vla_trqam.methods.sqam import SQAMConfig
from vla_trqam.methods.trqam import TRQAMConfig


def vla(**settings: Any) -> FinetuneVLAConfig:
    return FinetuneVLAConfig(online=OnlineConfig(steps=0), **settings)


TRAINING_BASE = [
    TRQAMConfig(train_base=True),
    QAMConfig(train_base=True),
    FQLConfig(train_base=True),
    IFQLConfig(train_base=True),
    DSRLConfig(train_base=True),
    SQAMConfig(train_base=True),
    QAMEConfig(train_base=True),
    ExternalKLConfig(train_base=True),
    ResidualConfig(train_base=True),
    CGQLConfig(train_base=True),
    CGQLLConfig(train_base=True),
]


@pytest.mark.parametrize("method", TRAINING_BASE, ids=name_of)
def test_a_base_that_must_train_is_refused_by_settings_whose_policies_have_a_frozen_one(
    method: MethodConfig,
) -> None:
    said = rf"^--method\.train_base=true: the base .* is frozen, and {name_of(method)} would"
    with pytest.raises(UserError, match=said):
        vla(method=method)
    assert FinetuneRobomimicConfig(method=method).method is method


def test_every_method_serves_with_its_own_defaults() -> None:
    for entry in METHODS.values():
        if not entry.requirements.own_field:
            vla(method=entry.config())
        FinetuneRobomimicConfig(method=entry.config())


def test_a_method_that_acts_by_its_own_field_is_refused_where_a_pretrained_one_is_to_be_tuned() -> (
    None
):
    said = (
        r"^--method\.type=sac_flow acts by a velocity network of its own architecture, which cannot"
        r" take over the weights of a pretrained policy of this recipe; it runs on policies of "
        r"states, in finetune_robomimic\.py and finetune_ogbench\.py$"
    )
    with pytest.raises(UserError, match=said):
        vla(method=SACFlowConfig())


BAD_KNOBS: list[tuple[type[MethodConfig], dict[str, Any], str]] = [
    (CGQLConfig, {"inverse_temperature": 0.0}, "inverse_temperature is 0.0; it must be positive"),
    (CGQLConfig, {"guidance": -1.0}, "guidance is -1.0; it must be finite and not negative"),
    (CGQLLConfig, {"noisy_weight": 0.0}, "noisy_weight is 0.0; it must be positive and finite"),
    (CGQLLConfig, {"noisy_loss": "l1"}, "noisy_loss is l1; it must be linex or mse"),
    (SACFlowConfig, {"step_noise": 0.0}, "step_noise is 0.0; it must be positive and finite"),
    (SACFlowConfig, {"num_steps": 0}, "num_steps is 0; it must be at least 1"),
    (SACFlowConfig, {"bc_weight": -1.0}, "bc_weight is -1.0; it must be finite, not negative"),
    (SACFlowConfig, {"target_entropy": float("inf")}, "target_entropy is inf; it must be finite"),
    (DSRLConfig, {"target_entropy": float("nan")}, "target_entropy is nan; it must be finite"),
    (ResidualConfig, {"target_entropy": float("inf")}, "target_entropy is inf; it must be finite"),
    (QAMConfig, {"inverse_temperature": float("inf")}, "inverse_temperature is inf; QAM's beta"),
    (TRQAMConfig, {"lam_max": float("inf")}, "lam_min, lam_init, lam_max are 0.03, 3.0, inf;"),
    (TRQAMConfig, {"dual_step_size": float("inf")}, "dual_step_size is inf; it must be finite"),
]


@pytest.mark.parametrize(("config", "knob", "said"), BAD_KNOBS)
def test_a_knob_beyond_its_range_is_refused(
    config: type[MethodConfig], knob: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        config(**knob)


@pytest.mark.parametrize(
    ("method", "flag"),
    [
        (FQLConfig(), "--critic.adjoint_pessimism"),
        (DSRLConfig(), "--critic.clip_actions"),
        (ResidualConfig(), "--critic.clip_actions"),
        (FQLConfig(), "--critic.gradient_noise"),
        (IFQLConfig(), "--critic.redraws"),
        (IFQLConfig(), "--critic.next_actions"),
        (ResidualConfig(), "--policy.cuda_graphs"),
        (IFQLConfig(), "--policy.compile"),
    ],
)
@pytest.mark.parametrize("settings", [vla, FinetuneRobomimicConfig])
def test_a_flag_that_the_method_does_not_read_is_refused(
    settings: Callable[..., RunSettings], method: MethodConfig, flag: str
) -> None:
    said = f"^--method.type={name_of(method)} has no use for {flag}: leave it out$"
    with pytest.raises(UserError, match=said):
        refuse_idle_knobs(settings(method=method), {flag, "--seed"})
    refuse_idle_knobs(settings(), {flag, "--seed"})
    refuse_idle_knobs(settings(method=method), {"--critic.pessimism", "--seed"})


def test_a_judge_of_the_least_head_has_no_use_for_pessimism() -> None:
    with pytest.raises(UserError, match=r"best_of_n has no use for --critic\.pessimism: leave"):
        refuse_idle_knobs(vla(method=BestOfNConfig()), {"--critic.pessimism"})


@pytest.mark.parametrize("recipe", [finetune_robomimic, finetune_ogbench])
def test_a_policy_of_too_few_flow_steps_is_refused_before_the_data_is_opened(
    recipe: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def open_task(config: object) -> None:
        raise AssertionError("the data was opened")

    monkeypatch.setattr(recipe, "open_task", open_task)
    MLPFlowPolicy(MLPFlowConfig(3, 2, 5, (8,), num_flow_steps=1)).save_pretrained(tmp_path / "p")
    (tmp_path / "p/model.safetensors").unlink()
    flags = [f"--policy.path={tmp_path / 'p'}", "--method.scheme=posterior"]
    flags += ["--dataset.path=absent", f"--output_dir={tmp_path / 'run'}", "--num_threads=1"]
    assert recipe.main(flags) == 2  # type: ignore[attr-defined]
    said = capsys.readouterr().err
    assert "the policy's own number of flow steps, 1, is too few for the posterior" in said
    assert not (tmp_path / "run").exists()
