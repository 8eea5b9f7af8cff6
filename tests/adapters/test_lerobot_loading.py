"""Checkpoints: what is read is what is there, what is written stock LeRobot reads."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import get_policy_class, make_policy, make_pre_post_processors
from lerobot_contract import (
    ACTION,
    CAMERAS,
    FAMILIES,
    FEATURES,
    STATE,
    checkpoint,
    host_chunk,
    observation,
    raw_observation,
    statistics,
)
from lerobot_contract import make_policy as fresh_policy
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from vla_trqam.adapters.checkpoint.weights import verify_policy
from vla_trqam.adapters.families.registry import REFUSED
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
from vla_trqam.adapters.loading import fetch, load_host, load_policy, read_config
from vla_trqam.adapters.lora import LoRASettings, check_kind
from vla_trqam.adapters.tiny import checkpoints as tiny

from vla_trqam.errors import UserError

pytestmark = pytest.mark.slow

LORA = LoRASettings(r=4)


def copied(kind: str, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint(kind), folder / kind))


def moved(kind: str, *, lora: bool) -> LeRobotFlowPolicy:
    policy = fresh_policy(kind, lora=lora)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def noise_of(policy: LeRobotFlowPolicy) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, *policy.chunk_shape, generator=generator)


def chunk(policy: LeRobotFlowPolicy, kind: str) -> Tensor:
    return host_chunk(policy.host, observation(kind, 2), noise_of(policy))


def environment() -> SimpleNamespace:
    """What stock ``lerobot-eval`` asks of an environment's config to load a policy."""
    image = PolicyFeature(type=FeatureType.VISUAL, shape=(32, 32, 3))
    features = {f"observation.images.{camera}": image for camera in CAMERAS}
    features["observation.state"] = PolicyFeature(type=FeatureType.STATE, shape=(STATE,))
    features["action"] = PolicyFeature(type=FeatureType.ACTION, shape=(ACTION,))
    return SimpleNamespace(features=features, features_map={key: key for key in features})


def stock(folder: Path) -> Any:
    """As stock ``lerobot-eval`` loads it."""
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    return make_policy(config, env_cfg=environment()).eval()


# What is written, stock LeRobot reads.


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("lora", "merged"), [(False, False), (True, False), (True, True)])
def test_stock_lerobot_loads_what_was_saved_and_acts_the_same(
    kind: str, lora: bool, merged: bool, tmp_path: Path
) -> None:
    policy = moved(kind, lora=lora)
    policy.save_pretrained(tmp_path, merged=merged)
    assert (tmp_path / "adapter_model.safetensors").exists() == (lora and not merged)
    host = stock(tmp_path)
    base = host.get_base_model() if lora and not merged else host
    expected = chunk(policy, kind)
    actions = host_chunk(base, observation(kind, 2), noise_of(policy))
    if merged:  # W + BA is rounded once
        torch.testing.assert_close(actions, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(actions, expected)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    before, after = make_pre_post_processors(config, pretrained_path=str(tmp_path))
    raw = raw_observation(2, 0)
    ours = observation(kind, 2)
    for key, value in before(dict(raw)).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, ours[key]), key
    assert policy.processors is not None
    assert torch.equal(after(expected.clone()), policy.processors.to_robot(expected.clone()))


@pytest.mark.parametrize("kind", FAMILIES)
def test_saving_changes_nothing_in_memory(kind: str, tmp_path: Path) -> None:
    policy = moved(kind, lora=True)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    policy.save_pretrained(tmp_path / "merged", merged=True)
    policy.save_pretrained(tmp_path / "adapters")
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    assert policy.host.config.use_peft


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_adapter_goes_on_against_its_own_base_or_becomes_the_base(
    kind: str, tmp_path: Path
) -> None:
    policy = moved(kind, lora=True)
    policy.save_pretrained(tmp_path)
    x, tau = noise_of(policy), torch.tensor([0.3, 0.6])
    context = policy.encode(observation(kind, 2))
    tuned, base = policy.velocity(x, tau, context), policy.base_velocity(x, tau, context)

    going_on = load_policy(tmp_path, adapter="continue")
    context = going_on.encode(observation(kind, 2))
    assert torch.equal(going_on.velocity(x, tau, context), tuned)
    assert torch.equal(going_on.base_velocity(x, tau, context), base)
    going_on.save_pretrained(tmp_path / "again")

    merged = load_policy(tmp_path, lora=LORA)
    context = merged.encode(observation(kind, 2))
    assert torch.equal(merged.velocity(x, tau, context), merged.base_velocity(x, tau, context))
    torch.testing.assert_close(merged.velocity(x, tau, context), tuned, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="merged=True"):
        merged.save_pretrained(tmp_path / "adapters")
    merged.save_pretrained(tmp_path / "whole", merged=True)
    torch.testing.assert_close(
        host_chunk(stock(tmp_path / "whole"), observation(kind, 2), x),
        chunk(policy, kind),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("setting", "said"),
    [({"bias": "lora_only"}, "bias=lora_only"), ({"lora_bias": True}, "lora_b")],
)
def test_adapters_with_biases_become_the_base_and_are_not_trained_on(
    setting: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Trained biases of the base's layers would move the base; those of B are not in a merge."""
    from peft import get_peft_model

    plain = moved("tiny_pi0", lora=True)
    plain.save_pretrained(tmp_path / "adapters")
    config = plain.model.peft_config["default"]
    base = load_policy(checkpoint("tiny_pi0"), lora=None).host
    model = get_peft_model(base, dataclasses.replace(config, **setting, inference_mode=False))
    model.peft_config["default"].base_model_name_or_path = str(checkpoint("tiny_pi0"))
    model.save_pretrained(tmp_path / "adapters")
    with pytest.raises(UserError, match=f"trains biases too .*{said}.* --policy.adapter=merge"):
        load_policy(tmp_path / "adapters", adapter="continue")
    if "bias" in setting:
        assert load_policy(tmp_path / "adapters", lora=LORA).has_adapters


@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian"])
def test_adapters_that_take_the_base_apart_become_the_base_and_are_not_trained_on(
    start: str, tmp_path: Path
) -> None:
    from peft import get_peft_model

    config = moved("tiny_pi0", lora=True).model.peft_config["default"]
    base = load_policy(checkpoint("tiny_pi0"), lora=None).host
    before = {name: value.clone() for name, value in base.state_dict().items()}
    settings = dataclasses.replace(config, init_lora_weights=start, inference_mode=False)
    model = get_peft_model(base, settings)
    kept = model.get_base_model().state_dict()
    moves = any(
        not torch.equal(value, before[name.replace(".base_layer.", ".")])
        for name, value in kept.items()
        if ".base_layer." in name
    )
    assert moves == (start != "gaussian")
    config.init_lora_weights = start
    if moves:
        with pytest.raises(UserError, match=f"begun by init_lora_weights={start}, which changes"):
            check_kind(model, continued=True)
    else:
        check_kind(model, continued=True)
    check_kind(model, continued=False)


def test_a_map_of_cameras_that_was_saved_is_not_applied_beside_the_one_that_is_given(
    tmp_path: Path,
) -> None:
    """LeRobot's commands put the map of their flag in its place; two swaps would be none."""
    folder = copied("tiny_pi0", tmp_path)
    cameras = list(fresh_policy("tiny_pi0", lora=False).host.config.image_features)
    swapped = dict(zip(cameras, reversed(cameras), strict=True))

    def save(fields: dict[str, Any]) -> None:
        (step,) = [s for s in fields["steps"] if s["registry_name"].startswith("rename_obs")]
        step["config"] = {"rename_map": swapped}

    path = folder / "policy_preprocessor.json"
    fields = json.loads(path.read_text())
    save(fields)
    path.write_text(json.dumps(fields))
    policies = [load_policy(each, lora=None) for each in (checkpoint("tiny_pi0"), folder)]
    seen = raw_observation(2, 0)
    one, other = (policy.processors.observe(seen) for policy in policies)
    for camera in cameras:
        assert not torch.equal(one[camera], one[swapped[camera]])
        assert torch.equal(one[camera], other[camera])


def test_from_pretrained_is_load_policy() -> None:
    policy = LeRobotFlowPolicy.from_pretrained(checkpoint("tiny_pi0"))
    assert policy.has_adapters
    assert not policy.training
    assert not policy.train().host.training


def test_a_hub_repository_is_fetched_and_remembered_by_name_and_commit(tmp_path: Path) -> None:
    target = "vla_trqam.adapters.loading.snapshot_download"
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = shutil.copytree(checkpoint("tiny_pi0"), tmp_path / "snapshots" / commit)
    with (
        mock.patch("huggingface_hub.HfApi.model_info") as asked,
        mock.patch(target, return_value=str(snapshot)) as download,
    ):
        policy = load_policy("someone/policy", revision="v2", lora=LORA)
    asked.assert_called_once_with("someone/policy", revision="v2")
    assert download.call_args.args == ("someone/policy",)
    assert download.call_args.kwargs["revision"] == "v2"
    policy.save_pretrained(tmp_path / "saved")
    adapter = json.loads((tmp_path / "saved/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "someone/policy"
    assert adapter["revision"] == commit


# What is read is what is there.


def edit_json(path: Path, **changes: Any) -> None:
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


BIAS = "model.action_out_proj.bias"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "no type": (lambda f: edit_json(f / "config.json", type=...), 'has no "type"'),
    "unknown type": (lambda f: edit_json(f / "config.json", type="pi9"), "no policy type 'pi9'"),
    "an unknown field": (lambda f: edit_json(f / "config.json", colour=3), "not a valid config"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "weights cut off": (lambda f: cut(f / "model.safetensors"), "not a readable safetensors"),
    "other widths": (
        lambda f: edit_json(f / "config.json", expert_mlp_dim=96),
        "gemma_expert.model.layers.0.mlp.down_proj.weight has shape (64, 128), the config says",
    ),
    "a weight is missing": (
        lambda f: edit_weights(f / "model.safetensors", lambda w: w.pop(BIAS)),
        f"missing [{BIAS}]",
    ),
    "a weight too many": (
        lambda f: edit_weights(
            f / "model.safetensors", lambda w: w.update({"model.extra": torch.zeros(1)})
        ),
        "unknown [model.extra]",
    ),
    "a weight is not finite": (
        lambda f: edit_weights(f / "model.safetensors", lambda w: w[BIAS].fill_(torch.nan)),
        f"not finite, in [{BIAS}]",
    ),
    "no preprocessor": (
        lambda f: (f / "policy_preprocessor.json").unlink(),
        "policy_preprocessor.json",
    ),
    "no statistics": (
        lambda f: next(f.glob("policy_preprocessor_step*")).unlink(),
        "safetensors' is not there",
    ),
    "two observations": (lambda f: edit_json(f / "config.json", n_obs_steps=2), "n_obs_steps is 2"),
    "real-time chunking": (
        lambda f: edit_json(f / "config.json", rtc_config={"enabled": True}),
        "rtc_config",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    breaking, message = BROKEN[name]
    folder = copied("tiny_pi0", tmp_path)
    breaking(folder)
    with pytest.raises(UserError) as error:
        load_policy(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_policy_with_other_values_than_its_file_is_refused(tmp_path: Path) -> None:
    """What LeRobot's loader of pi0 returns after it swallowed an error."""
    folder = copied("tiny_pi0", tmp_path)
    config = PreTrainedConfig.from_pretrained(folder)
    random = get_policy_class(config.type)(config)
    with pytest.raises(UserError, match="other values"):
        verify_policy(random, folder / "model.safetensors")


@pytest.mark.parametrize(("kind", "said"), [("smolvla_bfloat16", True), ("smolvla", False)])
def test_what_a_merge_into_half_precision_loses_is_said(
    kind: str, said: bool, tmp_path: Path
) -> None:
    policy = fresh_policy(kind, lora=True)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():  # what adapters change is a hundredth of the weights
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(1e-3 * torch.randn(parameter.shape, generator=generator))
    policy.save_pretrained(tmp_path)
    notes: list[str] = []
    merged = load_policy(tmp_path, lora=None, say=notes.append).host
    (note,) = [n for n in notes if "is lost" in n] or [""]
    assert bool(note) == said
    lost = change = 0.0
    for name, layer in policy.host.named_modules():
        if isinstance(layer, LoraLayer):
            delta = layer.get_delta_weight("default")
            exact = layer.base_layer.weight.float() + delta
            lost += float((merged.get_submodule(name).weight.float() - exact).square().sum())
            change += float(delta.square().sum())
    if said:
        assert f", in which {(lost / change) ** 0.5:.0%} of what" in note
    assert ((lost / change) ** 0.5 > 0.01) == said


def test_an_expert_in_half_precision_is_trained_in_float32_where_the_host_can(
    tmp_path: Path,
) -> None:
    notes: list[str] = []
    half, single = checkpoint("smolvla_bfloat16"), checkpoint("smolvla")
    policy = load_policy(half, lora=None, in_float32=True, say=notes.append)
    (note,) = notes
    assert "are trained in float32" in note
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    assert {p.dtype for p in policy.base.parameters()} == {torch.float32}
    vlm = policy.host.model.vlm_with_expert.vlm
    assert {p.dtype for p in vlm.parameters()} == {torch.bfloat16}
    with torch.no_grad():  # a step for which bfloat16 has no room
        for parameter in policy.trainable_parameters():
            parameter.mul_(1 + 1e-4)
    policy.save_pretrained(tmp_path)
    host = stock(tmp_path)
    expected = {k: v.to(host.state_dict()[k].dtype) for k, v in policy.host.state_dict().items()}
    assert all(torch.equal(v, expected[k]) for k, v in host.state_dict().items())
    load_policy(single, lora=None, in_float32=True, say=notes.append)
    as_it_is = load_policy(half, lora=None, say=notes.append)
    assert notes == [note]
    assert torch.bfloat16 in {p.dtype for p in as_it_is.trainable_parameters()}


@pytest.mark.parametrize("kind", FAMILIES)
def test_nothing_is_drawn_for_weights_that_the_file_has(kind: str) -> None:
    """Of billions it would take minutes; that they are the file's is compared each time."""
    found = fetch(checkpoint(kind))
    config = read_config(found)
    before = torch.get_rng_state()
    load_host(found, config)
    assert torch.equal(torch.get_rng_state(), before)
    get_policy_class(config.type)(config)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_weight_that_is_not_finite_is_seen(value: float, tmp_path: Path) -> None:
    folder = copied("tiny_pi0", tmp_path)

    def spoil(weights: dict[str, Tensor]) -> None:
        weights[sorted(weights)[0]].view(-1)[1] = value

    edit_weights(folder / "model.safetensors", spoil)
    with pytest.raises(UserError, match="not finite"):
        load_policy(folder)


@pytest.mark.parametrize("kind", ["smolvla", "multi_task_dit"])
def test_weights_of_the_other_families_are_verified_too(kind: str, tmp_path: Path) -> None:
    folder = copied(kind, tmp_path)
    edit_weights(folder / "model.safetensors", lambda w: w.pop(sorted(w)[0]))
    with pytest.raises(UserError, match="missing"):
        load_policy(folder)


def test_weights_in_the_names_of_older_ports_are_known(tmp_path: Path) -> None:
    folder = copied("tiny_pi0", tmp_path)
    path = folder / "model.safetensors"
    weights = {k.removeprefix("model."): v for k, v in load_file(path).items()}
    for leaf in ("weight", "bias"):
        weights[f"time_mlp_in.{leaf}"] = weights.pop(f"action_time_mlp_in.{leaf}")
    save_file(weights, path, metadata={"format": "pt"})
    policy = load_policy(folder, lora=None)
    assert torch.equal(
        chunk(policy, "tiny_pi0"), chunk(fresh_policy("tiny_pi0", lora=False), "tiny_pi0")
    )


def test_a_broken_adapter_is_refused(tmp_path: Path) -> None:
    moved("tiny_pi0", lora=True).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    edit_weights(path, lambda w: w.pop(sorted(w)[0]))
    with pytest.raises(UserError, match="missing"):
        load_policy(tmp_path)
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match="gone is not a folder"):
        load_policy(tmp_path)


@pytest.mark.parametrize("policy_type", sorted(REFUSED))
def test_policies_without_a_usable_field_are_refused_with_the_reason(
    policy_type: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"type": policy_type}))
    with pytest.raises(UserError) as error:
        load_policy(tmp_path)
    assert REFUSED[policy_type] in str(error.value)
    assert "smolvla" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("multi_task_dit", {"objective": "diffusion"}, "objective is 'diffusion'"),
        ("multi_task_dit", {"sigma_min": 0.1}, "sigma_min is 0.1"),
        ("multi_task_dit", {"integration_method": "rk4"}, "integration_method is 'rk4'"),
        ("smolvla", {"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha"),
        ("smolvla", {"use_cache": False}, "use_cache"),
        ("smolvla", {"vlm_model_name": "/nowhere"}, "LeRobot cannot load"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(
    kind: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = copied(kind, tmp_path)
    edit_json(folder / "config.json", **change)
    with pytest.raises(UserError) as error:
        load_policy(folder)
    assert message in str(error.value)


def test_a_setting_can_be_overridden_as_on_lerobots_command_line(tmp_path: Path) -> None:
    folder = copied("tiny_pi0", tmp_path)
    edit_json(folder / "config.json", compile_model=True)
    overrides = ["--compile_model=false", "--num_inference_steps=7"]
    assert load_policy(folder, overrides=overrides).num_flow_steps == 7
    with pytest.raises(UserError, match="no_such_field"):
        load_policy(folder, overrides=["--no_such_field=1"])


@pytest.mark.parametrize("path", ["/nowhere/policy", "./nowhere", "no/such/name", "no such name"])
def test_a_path_that_leads_nowhere_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"nowhere|no/such|no such"):
        load_policy(path)


@pytest.mark.parametrize(
    ("revision", "offline", "asked"), [(None, False, 1), ("a" * 40, False, 0), (None, True, 0)]
)
def test_an_older_copy_is_not_taken_where_the_hub_does_not_answer(
    revision: str | None, offline: bool, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub would, without a word. A commit has no older copy."""
    cached, calls = str(checkpoint("tiny_pi0")), []

    def fails(*_: object, **__: object) -> None:
        calls.append(1)
        raise ConnectionError("401 Client Error")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fails)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("vla_trqam.adapters.loading.snapshot_download", lambda *_, **__: cached)
    if asked:
        with pytest.raises(UserError, match="Hub did not give it: ConnectionError: 401 Client"):
            fetch("someone/policy", revision)
    else:
        assert str(fetch("someone/policy", revision).folder) == cached
    assert len(calls) == asked


def test_new_adapters_are_those_of_the_seed_whatever_was_merged_before(tmp_path: Path) -> None:
    """A run that begins anew finds its merged base, and nothing to merge."""
    moved("tiny_pi0", lora=True).save_pretrained(tmp_path / "adapters")
    first = load_policy(tmp_path / "adapters", lora=LORA, seed=3)
    first.save_base(tmp_path / "base")
    again = load_policy(tmp_path / "base", lora=LORA, seed=3)
    other = load_policy(tmp_path / "base", lora=LORA, seed=4)
    ours, same, others = (
        torch.cat([p.flatten() for p in each.trainable_parameters()])
        for each in (first, again, other)
    )
    assert torch.equal(ours, same)
    assert not torch.equal(ours, others)


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    target = "vla_trqam.adapters.loading.snapshot_download"
    with (
        mock.patch(target, side_effect=ConnectionError("no route\nto host")),
        pytest.raises(UserError, match=r"Hub did not give it: ConnectionError: no route$"),
    ):
        load_policy("someone/policy")


def test_statistics_that_lerobot_would_silently_do_without_are_missed(tmp_path: Path) -> None:
    stats = statistics()
    del stats["observation.state"]
    del stats["action"]["std"]
    stats["action"]["mean"][1] = torch.nan
    tiny.write_checkpoint(tiny.tiny_pi0_config(FEATURES), stats, tmp_path)
    with pytest.raises(UserError) as error:
        load_policy(tmp_path)
    for problem in (
        "preprocessor has no mean and no std of observation.state",
        "preprocessor has no std of action",
        "postprocessor has no std of action",
        "postprocessor has a mean of action that is not finite",
    ):
        assert problem in str(error.value)
