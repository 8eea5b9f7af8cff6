"""Rows of the table of malformed input: folders of policies, and a critic to begin with."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from bad_inputs.place import Command, Place, Row, cut, edit_json, pi0, replace, robomimic

Change = Callable[[Path], object]
Spoiled = tuple[str, Change, tuple[str, ...]]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTERS = "adapter_config.json", "adapter_model.safetensors"
BEFORE, AFTER = "policy_preprocessor.json", "policy_postprocessor.json"
STATISTICS = "policy_preprocessor_step_6_normalizer_processor.safetensors"
BACK = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


def setting(**values: Any) -> Change:
    return lambda folder: edit_json(folder / CONFIG, lambda fields: fields.update(values))


def no_setting(name: str) -> Change:
    return lambda folder: edit_json(folder / CONFIG, lambda fields: fields.pop(name))


def in_file(name: str, change: Callable[[Any], object]) -> Change:
    return lambda folder: edit_json(folder / name, change)


def in_step(number: int, **values: Any) -> Change:
    """Changes a step of the preprocessor."""
    return in_file(BEFORE, lambda fields: fields["steps"][number].update(values))


def step_setting(number: int, **values: Any) -> Change:
    return in_file(BEFORE, lambda fields: fields["steps"][number]["config"].update(values))


def rewritten(name: str, content: str | bytes) -> Change:
    return lambda folder: replace(folder / name, content)


def removed(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def halved(name: str) -> Change:
    return lambda folder: cut(folder / name)


def tensors(name: str, change: Callable[[dict[str, np.ndarray]], object]) -> Change:
    def spoil(folder: Path) -> None:
        values = load_file(folder / name)
        change(values)
        replace(folder / name, save(values))

    return spoil


def first(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    """Changes the first tensor by name."""

    def spoil(values: dict[str, np.ndarray]) -> None:
        name = min(values)
        values[name] = change(values[name].copy())

    return spoil


def with_nan(values: np.ndarray) -> np.ndarray:
    values.reshape(-1)[0] = np.nan
    return values


def statistic(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def spoil(values: dict[str, np.ndarray]) -> None:
        values[name] = change(values[name].copy())

    return tensors(STATISTICS, spoil)


def no_statistic(file: str, *names: str) -> Change:
    def spoil(values: dict[str, np.ndarray]) -> None:
        for name in names:
            del values[name]

    return tensors(file, spoil)


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": [1.0]}))


def _huge_header(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    replace(folder / WEIGHTS, (2**62).to_bytes(8, "little") + content[8:])


def _inserted_step(registry_name: str, **config: Any) -> Change:
    def insert(fields: Any) -> None:
        fields["steps"].insert(0, {"registry_name": registry_name, "config": config})

    return in_file(BEFORE, insert)


def _narrow(fields: Any) -> None:
    fields["output_features"]["action"]["shape"] = [6]


def _blind(fields: Any) -> None:
    del fields["input_features"]["observation.images.agentview"]


def _no_features(name: str) -> Change:
    return in_file(CONFIG, lambda fields: fields.update({name: {}}))


POLICY: tuple[Spoiled, ...] = (
    ("no config", removed(CONFIG), ("<policy>/config.json", "does not exist")),
    ("a config that is not JSON", rewritten(CONFIG, "{"), ("<policy>/config.json", "not JSON")),
    ("a binary config", rewritten(CONFIG, b"\xff\xfe\x00"), ("<policy>/config.json",)),
    ("a config that is a list", rewritten(CONFIG, "[]"), ("<policy>/config.json",)),
    ("a config nested too deep", rewritten(CONFIG, "[" * 100_000), ("<policy>/config.json",)),
    ("a config without a type", no_setting("type"), ("<policy>/config.json", '"type"')),
    ("a type that is a number", setting(type=3), ("<policy>/config.json", '"type"')),
    ("an unknown type", setting(type="pi9"), ("pi9",)),
    ("ACT, which is no flow", setting(type="act"), ("act",)),
    ("a diffusion policy", setting(type="diffusion"), ("diffusion",)),
    ("an unknown setting", setting(colour="red"), ("<policy>/config.json", "colour")),
    ("a word for a number", setting(chunk_size="many"), ("<policy>/config.json", "chunk_size")),
    ("chunks of 0 actions", setting(chunk_size=0, n_action_steps=0), ("chunk", "0")),
    ("more actions executed than a chunk has", setting(n_action_steps=9), ("n_action_steps", "9")),
    ("no flow step", setting(num_inference_steps=0), ("flow steps", "0")),
    ("two observations", setting(n_obs_steps=2), ("n_obs_steps", "2")),
    (
        "real-time chunking",
        setting(rtc_config={"enabled": True}),
        ("rtc_config", "null"),
    ),
    ("relative actions", setting(use_relative_actions=True), ("use_relative_actions",)),
    ("an unknown number format", setting(dtype="float7"), ("dtype", "float7")),
    ("an unknown width", setting(paligemma_variant="gemma_9t"), ("gemma_9t",)),
    ("fewer numbers than the action has", setting(max_action_dim=4), ("action_in_proj", "4", "8")),
    ("fewer numbers than the state has", setting(max_state_dim=4), ("state_proj", "4", "16")),
    ("no action", _no_features("output_features"), ("output_features", "action")),
    ("no camera", in_file(CONFIG, _blind), ("image",)),
    ("actions of 6 numbers", in_file(CONFIG, _narrow), ("action", "6", "7")),
    ("an unknown normalisation", setting(normalization_mapping={"ACTION": "SQUARE"}), ("SQUARE",)),
    ("a depth that the weights have not", setting(depth=3), ("<policy>",)),
    ("a width that the weights have not", setting(expert_width=32), ("<policy>",)),
    ("no weights", removed(WEIGHTS), ("<policy>", WEIGHTS)),
    ("weights cut short", halved(WEIGHTS), ("<policy>",)),
    ("empty weights", rewritten(WEIGHTS, b""), ("<policy>",)),
    ("weights that are a text", rewritten(WEIGHTS, "no weights at all"), ("<policy>",)),
    ("weights whose header is of 4 exabytes", _huge_header, ("<policy>",)),
    ("pickled weights", _pickled, ("<policy>", WEIGHTS)),
    ("a weight is missing", tensors(WEIGHTS, lambda w: w.pop(min(w))), ("<policy>", "weight")),
    ("a weight too many", tensors(WEIGHTS, lambda w: w.update(x=w[min(w)])), ("<policy>", "x")),
    ("a weight of another shape", tensors(WEIGHTS, first(lambda w: w[:1])), ("<policy>",)),
    ("a weight is NaN", tensors(WEIGHTS, first(with_nan)), ("<policy>", "finite")),
    ("no preprocessor", removed(BEFORE), ("<policy>", BEFORE)),
    ("no postprocessor", removed(AFTER), ("<policy>", AFTER)),
    ("a preprocessor that is not JSON", rewritten(BEFORE, "{"), ("<policy>", BEFORE)),
    ("a preprocessor without steps", rewritten(BEFORE, '{"name": "x"}'), ("<policy>", BEFORE)),
    ("steps that are numbers", rewritten(BEFORE, '{"name": "x", "steps": [1]}'), (BEFORE,)),
    ("an unknown step", in_step(2, registry_name="juggle"), (BEFORE, "juggle")),
    ("a step that names a class", in_step(2, **{"class": "os.system"}), (BEFORE, "class")),
    ("a step that fetches code", step_setting(3, trust_remote_code=True), ("trust_remote_code",)),
    (
        "a step with code of a stranger",
        _inserted_step("action_tokenizer_processor", action_tokenizer_name="a/b"),
        (BEFORE, "action_tokenizer_processor"),
    ),
    ("an unknown setting of a step", step_setting(3, colour="red"), (BEFORE, "colour")),
    ("a step's file outside", in_step(6, state_file="../../x.safetensors"), ("state_file",)),
    ("a step's file that is not there", in_step(6, state_file="x.safetensors"), ("x.safetensors",)),
    ("statistics that are no file of tensors", rewritten(STATISTICS, "mean"), ("<policy>",)),
    ("statistics cut short", halved(STATISTICS), ("<policy>",)),
    ("no mean of the action", no_statistic(STATISTICS, "action.mean"), ("mean", "action")),
    (
        "no spread of the state",
        no_statistic(STATISTICS, "observation.state.std"),
        ("std", "observation.state"),
    ),
    ("no mean to put actions back by", no_statistic(BACK, "action.mean"), ("postprocessor",)),
    ("a mean that is NaN", statistic("action.mean", with_nan), ("mean of action", "finite")),
    ("a spread that is NaN", statistic("observation.state.std", with_nan), ("std of", "finite")),
    ("a negative spread", statistic("action.std", lambda v: -v), ("std", "action")),
    ("statistics of 6 numbers", statistic("action.mean", lambda v: v[:6]), ("action", "6", "7")),
    (
        "statistics of another robot",
        statistic("observation.state.mean", lambda v: v + 1000),
        ("observation.state[0]",),
    ),
    (
        "actions put back by other numbers",
        tensors(BACK, lambda v: v.update({"action.mean": v["action.mean"] + 1})),
        ("postprocessor", "action"),
    ),
)

ADAPTER: tuple[Spoiled, ...] = (
    (
        "an adapter without a base",
        in_file(ADAPTER_CONFIG, lambda fields: fields.pop("base_model_name_or_path")),
        ("<policy>/adapter_config.json", "base_model_name_or_path"),
    ),
    (
        "a base that is not there",
        in_file(ADAPTER_CONFIG, lambda f: f.update(base_model_name_or_path="/nowhere")),
        ("/nowhere",),
    ),
    (
        "a base that is a number",
        in_file(ADAPTER_CONFIG, lambda f: f.update(base_model_name_or_path=7)),
        ("adapter_config.json", "base_model_name_or_path"),
    ),
    ("an adapter's config that is not JSON", rewritten(ADAPTER_CONFIG, "{"), ("not JSON",)),
    (
        "an adapter of another kind",
        in_file(ADAPTER_CONFIG, lambda fields: fields.update(peft_type="IA3")),
        ("IA3", "LoRA"),
    ),
    ("DoRA", in_file(ADAPTER_CONFIG, lambda fields: fields.update(use_dora=True)), ("dora",)),
    ("an adapter of another rank", in_file(ADAPTER_CONFIG, lambda f: f.update(r=4)), ("<policy>",)),
    ("no weights of the adapter", removed(ADAPTERS), ("<policy>", ADAPTERS)),
    ("an adapter cut short", halved(ADAPTERS), ("<policy>",)),
    ("an adapter's weight is NaN", tensors(ADAPTERS, first(with_nan)), ("<policy>", "finite")),
    (
        "an adapter's weight is missing",
        tensors(ADAPTERS, lambda w: w.pop(min(w))),
        ("<policy>", "lora"),
    ),
)

CONTINUED: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("adapters continued in full", ("--peft.method=full",), ("--peft.method=full",)),
    ("adapters continued with another rank", ("--peft.r=3",), ("--peft.r=3",)),
    ("adapters continued by who trains none", ("--method.type=fql",), ("fql", "merge")),
)

CRITIC: tuple[Spoiled, ...] = (
    (
        "no algorithm in the checkpoint",
        lambda c: (c / "algorithm").rename(c / "x"),
        ("algorithm/",),
    ),
    ("a critic without weights", removed("algorithm/networks.safetensors"), ("networks",)),
    ("a critic cut short", halved("algorithm/networks.safetensors"), ("<critic>/algorithm",)),
    ("no critic in it", tensors("algorithm/networks.safetensors", dict.clear), ("critic",)),
    (
        "a critic that is NaN",
        tensors(
            "algorithm/networks.safetensors",
            lambda w: w.update({k: with_nan(w[k].copy()) for k in w if k.startswith("critic.")}),
        ),
        ("<critic>/algorithm", "finite"),
    ),
)

TRUST_REGION: tuple[Spoiled, ...] = (
    ("a trust region that is not JSON", rewritten("algorithm/scalars.json", "{"), ("scalars",)),
    ("a trust region of nothing", rewritten("algorithm/scalars.json", "{}"), ("<critic>",)),
    (
        "a negative λ",
        in_file("algorithm/scalars.json", lambda f: f.update(dict.fromkeys(f, -1.0))),
        ("<critic>", "-1"),
    ),
    (
        "a λ that is a word",
        in_file("algorithm/scalars.json", lambda f: f.update(dict.fromkeys(f, "wide"))),
        ("<critic>", "wide"),
    ),
)


def _policy(change: Change, place: Place) -> Command:
    folder = place.policy()
    change(folder)
    return pi0(place, f"--policy.path={folder}")


def _adapter(change: Change, place: Place) -> Command:
    folder = place.adapter()
    change(folder)
    return pi0(place, f"--policy.path={folder}")


def _continued(flags: tuple[str, ...], place: Place) -> Command:
    return pi0(place, f"--policy.path={place.adapter()}", "--policy.adapter=continue", *flags)


def _continued_whole(place: Place) -> Command:
    return pi0(place, f"--policy.path={place.policy()}", "--policy.adapter=continue")


def _critic(change: Change, place: Place) -> Command:
    folder = place.critic()
    change(folder)
    return pi0(place, f"--critic.path={folder}")


def _trust_region(change: Change, place: Place) -> Command:
    folder = place.critic()
    change(folder)
    policy = f"--policy.path={folder / 'pretrained_model'}"
    return pi0(place, f"--critic.path={folder}", policy, "--policy.adapter=continue")


def _wider_critic(place: Place) -> Command:
    return pi0(place, f"--critic.path={place.critic()}", "--critic.hidden_dims=[16,16]")


def _file_for_policy(place: Place) -> Command:
    return pi0(place, f"--policy.path={place.write('policy', 'no folder')}")


def _elsewhere(path: str, place: Place) -> Command:
    return pi0(place, f"--policy.path={path}")


def _mlp(change: Change, place: Place) -> Command:
    """The policy of the Robomimic recipe."""
    base = place.run() / "base_policy"
    folder = base.rename(place / "policy")
    change(folder)
    idle = ("--output_dir=new", "--steps=2")
    return robomimic(place, f"--policy.path={folder}", *idle, policy=())


MLP: tuple[Spoiled, ...] = (
    ("no config", removed(CONFIG), ("<policy>", CONFIG)),
    ("a config that is not JSON", rewritten(CONFIG, "{"), ("<policy>", CONFIG)),
    ("a config that is a list", rewritten(CONFIG, "[]"), ("<policy>", CONFIG)),
    ("a config of nothing", rewritten(CONFIG, "{}"), ("<policy>", CONFIG)),
    ("another kind of policy", setting(type="pi0"), ("<policy>", "mlp_flow")),
    ("an unknown setting", setting(colour="red"), ("<policy>", "colour")),
    ("observations of 4 numbers", setting(observation_dim=4), ("<policy>",)),
    ("a width that is a word", setting(hidden_dims=["wide"]), ("<policy>", "hidden_dims")),
    ("a width of 10^12", setting(hidden_dims=[10**12]), ("<policy>", "1000000000000")),
    ("no flow step", setting(num_flow_steps=0), ("<policy>", "num_flow_steps", "0")),
    ("no weights", removed(WEIGHTS), ("<policy>", WEIGHTS)),
    ("weights cut short", halved(WEIGHTS), ("<policy>", WEIGHTS)),
    ("a weight is missing", tensors(WEIGHTS, lambda w: w.pop(min(w))), ("<policy>", WEIGHTS)),
    ("a weight of another shape", tensors(WEIGHTS, first(lambda w: w[:1])), ("<policy>",)),
    ("a weight is NaN", tensors(WEIGHTS, first(with_nan)), ("<policy>", "finite")),
    (
        "a negative spread",
        tensors(WEIGHTS, lambda w: w.update(observation_std=-w["observation_std"])),
        ("<policy>", "observation_std", "positive"),
    ),
)

ROWS = (
    *(Row("policy", wrong, partial(_policy, change), words) for wrong, change, words in POLICY),
    Row("policy", "a file for a folder", _file_for_policy, ("<policy>",)),
    Row("policy", "a folder that is not there", partial(_elsewhere, "/nowhere"), ("/nowhere",)),
    Row("policy", "no name of a repository", partial(_elsewhere, "a b/c"), ("a b/c",)),
    Row("policy", "a repository, offline", partial(_elsewhere, "some/one"), ("some/one", "Hub")),
    *(Row("adapter", wrong, partial(_adapter, change), words) for wrong, change, words in ADAPTER),
    Row(
        "adapter",
        "a whole policy that is to be continued",
        _continued_whole,
        ("--policy.adapter=continue", "<policy>", "no adapter"),
    ),
    *(
        Row("adapter", wrong, partial(_continued, flags), ("--policy.adapter=continue", *words))
        for wrong, flags, words in CONTINUED
    ),
    *(Row("critic", wrong, partial(_critic, change), words) for wrong, change, words in CRITIC),
    *(
        Row("critic", wrong, partial(_trust_region, change), words)
        for wrong, change, words in TRUST_REGION
    ),
    Row("critic", "a critic of another width", _wider_critic, ("<critic>/algorithm", "critic")),
    *(Row("MLP policy", wrong, partial(_mlp, change), words) for wrong, change, words in MLP),
)
