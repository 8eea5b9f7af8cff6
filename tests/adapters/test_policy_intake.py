"""What people bring: settings of long trainings, flat dimensions, other shapes, missing cameras."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import tokenizer_processor
from lerobot_contract import (
    ACTION,
    FAMILIES,
    STATE,
    checkpoint,
    host_chunk,
    observation,
    raw_observation,
)
from lerobot_contract import make_policy as fresh_policy
from policy_variants import copied, edit_json, edit_statistics, told, with_mode, without_spread
from torch import Tensor
from vla_trqam.adapters.dataset_check import dataset_problems
from vla_trqam.adapters.loading import load_policy
from vla_trqam.adapters.lora import LoRASettings

from vla_trqam.errors import UserError
from vla_trqam.policy import FlowPolicy
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

pytestmark = pytest.mark.slow

LORA = LoRASettings(r=4)
MODES = ("MEAN_STD", "MIN_MAX", "QUANTILES")


def noise_of(policy: FlowPolicy) -> Tensor:
    return torch.randn(2, *policy.chunk_shape, generator=torch.Generator().manual_seed(3))


def by_euler(policy: Any, observation: Any, noise: Tensor) -> Tensor:
    """Our field's actions, normalised: (B, H, a)."""
    context = policy.encode(observation)
    with torch.no_grad():
        chunk = sample_ode(
            lambda x, tau: policy.velocity(x, tau, context), noise, TimeGrid(policy.num_flow_steps)
        )
    return policy.real_actions(chunk)


# Settings of a long training.


@pytest.mark.parametrize(
    ("kind", "switches", "says"),
    [
        ("tiny_pi0", ("compile_model", "gradient_checkpointing"), "are true in its config; off"),
        ("tiny_pi05", ("compile_model", "gradient_checkpointing"), "are true in its config; off"),
        ("smolvla", ("compile_model",), "compile_model is true in its config; off"),
    ],
)
def test_compilation_and_checkpointing_are_off_before_the_host_is_built(
    kind: str, switches: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    folder = copied(kind, tmp_path)
    edit_json(folder / "config.json", lambda f: f.update(dict.fromkeys(switches, True)))
    policy, notes = told(folder, lora=LORA)
    assert says in notes
    assert notes.count("\n") == 0
    assert all(getattr(policy.host.config, name) is False for name in switches)
    # A compiled or checkpointed method would be the instance's own.
    assert "sample_actions" not in vars(policy.host.model)
    assert not getattr(policy.host.model, "gradient_checkpointing_enabled", False)
    seen, same = policy.processors.observe(raw_observation(2, 0)), fresh_policy(kind, lora=True)
    noise = noise_of(policy)
    assert torch.equal(by_euler(policy, seen, noise), by_euler(same, seen, noise))


def test_a_policy_without_such_settings_says_nothing() -> None:
    assert told(checkpoint("tiny_pi0"), lora=LORA)[1] == ""


# Dimensions that never moved.


def flat_policy(mode: str, tmp_path: Path) -> tuple[Any, str]:
    folder = copied("tiny_pi0", tmp_path)
    with_mode(folder, mode)

    def change(statistics: dict[str, Tensor]) -> None:
        without_spread(statistics, "action", 1)
        without_spread(statistics, "observation.state", 3)

    edit_statistics(folder, change)
    return told(folder, lora=LORA)


@pytest.mark.parametrize("mode", MODES)
def test_a_dimension_that_never_moved_has_no_limits_and_is_normalised_as_lerobot_does(
    mode: str, tmp_path: Path
) -> None:
    policy, notes = flat_policy(mode, tmp_path)
    assert "observation.state[3], action[1] never moved" in notes
    low, high = policy.action_limits
    assert low.isinf().tolist() == high.isinf().tolist() == [False, True, False]
    assert bool((low < high).all())
    given = load_policy(tmp_path / "tiny_pi0", lora=LORA, limits=(-1.0, 1.0)).action_limits
    assert given[0].isinf().tolist() == given[1].isinf().tolist() == [False, True, False]
    before, after = make_pre_post_processors(
        policy.host.config, pretrained_path=str(tmp_path / "tiny_pi0")
    )
    raw = raw_observation(2, 0) | {"action": torch.rand(2, ACTION)}
    theirs = before(dict(raw))
    assert torch.equal(policy.from_robot(raw["action"])[:, :ACTION], theirs["action"])
    ours = policy.processors.observe(raw)
    assert torch.equal(ours["observation.state"], theirs["observation.state"])
    chunk = noise_of(policy)
    assert torch.equal(policy.to_robot(chunk), after(policy.real_actions(chunk)))
    assert bool(torch.isfinite(policy.to_robot(chunk)).all())


@pytest.mark.parametrize("mode", MODES)
def test_a_dimension_that_never_moved_is_not_judged(mode: str, tmp_path: Path) -> None:
    policy, _ = flat_policy(mode, tmp_path)
    features = {
        "observation.state": {"dtype": "float32", "shape": (STATE,)},
        "action": {"dtype": "float32", "shape": (ACTION,)},
        "observation.images.top": {"dtype": "video", "shape": (32, 32, 3)},
    }
    mean = [0.1] * STATE
    assert not list(dataset_problems(policy, features, {"observation.state": {"mean": mean}}))
    mean[2] = 1e4
    (problem,) = dataset_problems(policy, features, {"observation.state": {"mean": mean}})
    assert "the mean of observation.state[2] is 1e+04" in problem


def test_limits_without_a_spread_are_none_though_the_deviation_has_one(tmp_path: Path) -> None:
    folder = copied("tiny_pi0", tmp_path)

    def change(statistics: dict[str, Tensor]) -> None:
        statistics["action.max"][0] = statistics["action.min"][0]

    edit_statistics(folder, change)
    low, high = load_policy(folder, lora=LORA).action_limits
    assert (low.isinf() & high.isinf()).tolist() == [True, False, False]


# Shapes.


@pytest.mark.parametrize("kind", ["tiny_pi0", "tiny_pi05", "smolvla"])
@pytest.mark.parametrize("said", [2, 16])
def test_the_states_statistics_are_believed(kind: str, said: int, tmp_path: Path) -> None:
    folder = copied(kind, tmp_path)

    def lie(fields: dict[str, Any]) -> None:
        fields["input_features"]["observation.state"]["shape"] = [said]

    edit_json(folder / "config.json", lie)
    policy, notes = told(folder, lora=LORA)
    assert f"observation.state has shape ({said},) in config.json" in notes
    assert f"its statistics have {STATE} numbers; the statistics are believed" in notes
    honest = fresh_policy(kind, lora=True)
    assert policy.feature_dim == honest.feature_dim
    seen, noise = policy.processors.observe(raw_observation(2, 0)), noise_of(policy)
    assert policy.encode(seen).features.shape == (2, policy.feature_dim)
    assert torch.equal(by_euler(policy, seen, noise), by_euler(honest, seen, noise))
    policy.save_pretrained(tmp_path / "whole", merged=True)
    assert told(tmp_path / "whole", lora=LORA)[1] == ""


def wider(statistics: dict[str, Tensor], key: str, width: int) -> None:
    for name in [name for name in statistics if name.startswith(f"{key}.")]:
        value = statistics[name]
        if value.numel() > 1:
            statistics[name] = torch.cat([value, value.new_ones(width - len(value))])


def test_more_numbers_than_the_policy_pads_its_state_to_are_refused(tmp_path: Path) -> None:
    folder = copied("tiny_pi0", tmp_path)
    edit_statistics(folder, lambda s: wider(s, "observation.state", 40))
    with pytest.raises(UserError, match=r"its statistics have 40 numbers; max_state_dim is \d+"):
        load_policy(folder)


def test_a_state_that_is_not_padded_must_be_as_its_statistics(tmp_path: Path) -> None:
    folder = copied("multi_task_dit", tmp_path)
    edit_statistics(folder, lambda s: wider(s, "observation.state", 7))
    with pytest.raises(UserError, match="its statistics have 7 numbers; both must agree"):
        load_policy(folder)


def test_actions_of_another_length_than_their_statistics_are_refused(tmp_path: Path) -> None:
    """The host would cut them at one and scale them by the other."""
    folder = copied("tiny_pi0", tmp_path)

    def lie(fields: dict[str, Any]) -> None:
        fields["output_features"]["action"]["shape"] = [ACTION + 1]

    edit_json(folder / "config.json", lie)
    with pytest.raises(UserError) as error:
        load_policy(folder)
    assert f"action has shape ({ACTION + 1},) in config.json" in str(error.value)
    assert f"preprocessor have {ACTION} numbers" in str(error.value)


def test_statistics_that_disagree_about_their_length_are_named(tmp_path: Path) -> None:
    folder = copied("tiny_pi0", tmp_path)
    edit_statistics(folder, lambda s: s.update({"action.std": torch.ones(2)}))
    with pytest.raises(UserError, match="mean and std of action with 3 and 2 numbers"):
        load_policy(folder)


# Cameras.


@pytest.mark.parametrize("kind", ["tiny_pi0", "tiny_pi05", "smolvla"])
@pytest.mark.parametrize("missing", ["top", "wrist"])
def test_a_missing_camera_is_what_the_host_makes_of_it(kind: str, missing: str) -> None:
    policy = fresh_policy(kind, lora=True)
    raw = raw_observation(2, 0)
    whole = policy.processors.observe(dict(raw))
    del raw[f"observation.images.{missing}"]
    seen, noise = policy.processors.observe(raw), noise_of(policy)
    ours = by_euler(policy, seen, noise)
    torch.testing.assert_close(ours, host_chunk(policy.host, seen, noise), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, by_euler(policy, whole, noise), atol=1e-4)
    cameras = policy.cameras([key for key in seen if key.startswith("observation.images.")])
    assert cameras.missing == (f"observation.images.{missing}",)
    (note,) = cameras.notes()
    assert f"looks through observation.images.{missing} too, which the data lacks" in note
    assert {"smolvla": "left out"}.get(kind, "masked") in note


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_observation_without_any_camera_is_refused(kind: str) -> None:
    policy = fresh_policy(kind, lora=True)
    seen = policy.processors.observe(raw_observation(2, 0))
    seen = {key: value for key, value in seen.items() if "images" not in key}
    with pytest.raises(UserError, match=r"no 'observation.images.top'"):
        policy.encode(seen)


def test_a_host_that_needs_every_camera_is_given_every_camera() -> None:
    policy = fresh_policy("multi_task_dit", lora=True)
    seen = policy.processors.observe(raw_observation(2, 0))
    del seen["observation.images.wrist"]
    with pytest.raises(UserError, match=r"no 'observation.images.wrist'"):
        policy.encode(seen)
    cameras = policy.cameras(["observation.images.top"])
    assert not cameras.fit


# Relative actions.


def enable(fields: dict[str, Any]) -> None:
    for step in fields["steps"]:
        if "enabled" in step["config"]:
            step["config"]["enabled"] = True


@pytest.mark.parametrize("said_by", ["config", "policy_preprocessor", "policy_postprocessor"])
def test_relative_actions_are_refused_whoever_says_so(said_by: str, tmp_path: Path) -> None:
    folder = copied("tiny_pi0", tmp_path)
    if said_by == "config":
        edit_json(folder / "config.json", lambda f: f.update(use_relative_actions=True))
    else:
        edit_json(folder / f"{said_by}.json", enable)
    with pytest.raises(UserError, match="relative to the state are not supported"):
        load_policy(folder)


# The tokenizer.


def named_tokenizer(folder: Path, name: str) -> None:
    def change(fields: dict[str, Any]) -> None:
        for step in fields["steps"]:
            if step.get("registry_name") == "tokenizer_processor":
                step["config"]["tokenizer_name"] = name

    edit_json(folder / "policy_preprocessor.json", change)


def test_a_tokenizer_that_cannot_be_had_is_taken_from_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = tokenizer_processor.AutoTokenizer
    had = kind.from_pretrained

    def offline(name: str, **settings: Any) -> Any:
        if name == "someone/gated":
            raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")
        return had(name, **settings)

    monkeypatch.setattr(kind, "from_pretrained", offline)
    folder = copied("smolvla", tmp_path)
    named_tokenizer(folder, "someone/gated")
    with pytest.raises(UserError) as error:
        load_policy(folder)
    assert "the tokenizer 'someone/gated' of its policy_preprocessor.json" in str(error.value)
    assert "--policy.tokenizer=FOLDER takes one of this machine (You are" in str(error.value)
    tokenizer = Path(fresh_policy("smolvla", lora=True).host.config.vlm_model_name)
    policy = load_policy(folder, lora=LORA, tokenizer=tokenizer)
    raw = raw_observation(2, 0)
    ours = policy.processors.observe(dict(raw))
    theirs = fresh_policy("smolvla", lora=True).processors.observe(dict(raw))
    key = "observation.language.tokens"
    assert torch.equal(ours[key], theirs[key])
    policy.save_pretrained(tmp_path / "saved", merged=True)
    again = load_policy(tmp_path / "saved", lora=LORA)  # it names the folder
    assert torch.equal(again.processors.observe(dict(raw))[key], theirs[key])


def test_a_folder_of_a_tokenizer_must_be_there_and_of_use(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--policy.tokenizer=.*gone is not a folder"):
        load_policy(checkpoint("smolvla"), tokenizer=tmp_path / "gone")
    with pytest.raises(UserError, match=r"--policy.tokenizer=.* holds no tokenizer"):
        load_policy(checkpoint("smolvla"), tokenizer=tmp_path)
    with pytest.raises(UserError, match=r"a step tokenizer_processor, which .* does not have"):
        load_policy(checkpoint("tiny_pi0"), tokenizer=tmp_path)


# Adapters merged into the base.


def test_the_base_of_merged_adapters_is_saved_whole_and_named(tmp_path: Path) -> None:
    first = fresh_policy("smolvla", lora=True)
    with torch.no_grad():
        for parameter in first.trainable_parameters():
            parameter.add_(0.1)
    first.save_pretrained(tmp_path / "first")
    policy = load_policy(tmp_path / "first", lora=LORA)
    assert policy.lacks_base
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.sub_(0.05)
    policy.save_base(tmp_path / "base")
    with pytest.raises(UserError, match="by save_base"):
        policy.save_pretrained(tmp_path / "second")
    policy.name_base(tmp_path / "base")
    assert not policy.lacks_base
    policy.save_pretrained(tmp_path / "second")
    again = load_policy(tmp_path / "second", adapter="continue")
    seen, x = policy.processors.observe(raw_observation(2, 0)), noise_of(policy)
    tau = torch.tensor([0.3, 0.6])
    ours, theirs = policy.encode(seen), again.encode(seen)
    assert torch.equal(policy.velocity(x, tau, ours), again.velocity(x, tau, theirs))
    assert torch.equal(policy.base_velocity(x, tau, ours), again.base_velocity(x, tau, theirs))
    base = load_policy(tmp_path / "base", lora=None)
    assert not (tmp_path / "base/adapter_config.json").exists()
    assert torch.equal(base.velocity(x, tau, base.encode(seen)), policy.base_velocity(x, tau, ours))


def test_modules_trained_in_full_are_as_they_were_in_the_base(tmp_path: Path) -> None:
    settings = dataclasses.replace(LORA, full_training_modules=("action_out_proj",))
    policy = load_policy(checkpoint("tiny_pi0"), lora=settings)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1)
    policy.save_base(tmp_path)
    base, given = load_policy(tmp_path, lora=None), load_policy(checkpoint("tiny_pi0"), lora=None)
    theirs = given.host.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in base.host.state_dict().items())


def test_attention_by_torchs_own_module_is_trained_whole_or_not_at_all() -> None:
    """An adapter there would be merged and taken off at every call, and the base be rounded."""
    with pytest.raises(UserError, match=r"nn.MultiheadAttention.* take --peft.method=full"):
        fresh_policy("multi_task_dit_absolute", lora=True)
    policy = fresh_policy("multi_task_dit_absolute", lora=False)
    context = policy.encode(observation("multi_task_dit", 2))
    x, tau = torch.randn(2, *policy.chunk_shape), torch.tensor([0.25, 0.5])
    # With a gradient and without: torch has another way for the latter.
    with torch.no_grad():
        apart = policy.velocity(x, tau, context)
    assert torch.equal(policy.velocity(x, tau, context).detach(), apart)
    assert torch.equal(policy.base_velocity(x, tau, context).detach(), apart)
