"""A policy's folder is data: what its files name is not imported, not fetched, not unpickled."""

import json
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vla_trqam.adapters.checkpoint.policy_gate import check_policy_folder, is_safe_pattern

from vla_trqam.data.foreign import LARGEST_JSON
from vla_trqam.errors import UserError

PACKED = Path(__file__).parents[2] / "vla_trqam/data/lift_pi0/policy"
BEFORE, AFTER = "policy_preprocessor.json", "policy_postprocessor.json"
LORA: dict[str, Any] = {
    "auto_mapping": {"base_model_class": "TinyPI0Policy", "parent_library": "vla_trqam"},
    "base_model_name_or_path": "someone/policy",
    "init_lora_weights": True,
    "lora_alpha": 16,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "r": 16,
    "rank_pattern": {},
    "target_modules": r"(.*\.gemma_expert\..*\.self_attn\.(q|v)_proj|model\.(state_proj|a))",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PACKED, tmp_path / "policy"))


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        check_policy_folder(folder)
    message = str(error.value)
    assert "\n" not in message
    return message


def runs(command: str) -> dict[str, Any]:
    """A step that LeRobot's loader imports and calls."""
    return {"class": "subprocess.Popen", "config": {"args": command, "shell": True}}


def make_adapter(folder: Path, **changes: Any) -> Path:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(LORA | changes))
    return folder


class Marks:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.call, (["touch", str(self.marker)],)


def test_the_packed_policy_passes(folder: Path) -> None:
    check_policy_folder(folder)


# Processors.

STEP = {
    "a class": (lambda s: s.append(runs("true")), "step 7 names the class 'subprocess.Popen'"),
    "a class beside a name": (lambda s: s[1].update(runs("true")), "step 1 names the class"),
    "a step with code of the Hub": (
        lambda s: s.append({"registry_name": "action_tokenizer_processor"}),
        "step 7 is 'action_tokenizer_processor'; known are",
    ),
    "a step of the robot": (
        lambda s: s.append({"registry_name": "gym_hil_adapter_processor"}),
        "step 7 is 'gym_hil_adapter_processor'",
    ),
    "a name that is no text": (lambda s: s.append({"registry_name": ["x"]}), "step 7 is ['x']"),
    "no name": (lambda s: s.append({}), "step 7 is None"),
    "no step": (lambda s: s.append("x"), "step 7 is 'x'; it must have a registry_name"),
    "an unknown setting": (
        lambda s: s[3]["config"].update(tokenizer="x"),
        "step 3 (tiny_byte_tokenizer) has the setting 'tokenizer'; known settings are: max_length",
    ),
    "a setting of a step without any": (
        lambda s: s[1].update(config={"to_batch_action_processor": {}}),
        "step 1 (to_batch_processor) has the setting 'to_batch_action_processor'",
    ),
    "statistics in the settings": (
        lambda s: s[6]["config"].update(stats={}),
        "step 6 (normalizer_processor) has the setting 'stats'",
    ),
    "a text for a number": (
        lambda s: s[3]["config"].update(max_length="24"),
        "max_length is '24'; it must be a whole number from 0 to 1000000",
    ),
    "a huge number": (lambda s: s[3]["config"].update(max_length=10**12), "max_length is 1000000"),
    "a list for names": (lambda s: s[0]["config"].update(rename_map=[]), "rename_map is []"),
    "a shape that is none": (
        lambda s: s[6]["config"]["features"]["action"].update(shape=[10**9]),
        "must be features, each with a type and a shape",
    ),
    "no settings": (lambda s: s[0].update(config=[1]), "its config is [1]"),
    "another key": (lambda s: s[0].update(module="os"), "(rename_observations_processor) has 'mod"),
    "state of another folder": (
        lambda s: s[6].update(state_file="../other.safetensors"),
        "its state_file is '../other.safetensors'; it must be the plain name",
    ),
    "state at a path": (lambda s: s[6].update(state_file="/x.safetensors"), "the plain name"),
    "state that is pickled": (lambda s: s[6].update(state_file="x.pt"), "the plain name"),
    "state of nowhere": (lambda s: s[6].update(state_file="x.safetensors"), "is not there"),
    "state that is no text": (lambda s: s[6].update(state_file=7), "its state_file is 7"),
}


@pytest.mark.parametrize("name", STEP)
@pytest.mark.parametrize("file", [BEFORE, AFTER])
def test_a_step_that_lerobot_does_not_write_is_refused(name: str, file: str, folder: Path) -> None:
    edit, message = STEP[name]
    if file == AFTER:
        shutil.copy(folder / BEFORE, folder / AFTER)  # the same steps: the gate is the same
        (folder / BEFORE).unlink()
    change(folder / file, lambda fields: edit(fields["steps"]))
    assert message in refusal(folder)
    assert file in refusal(folder)


@pytest.mark.parametrize("file", [BEFORE, AFTER, "config.json"])
def test_nothing_is_trusted_at_any_depth(file: str, folder: Path) -> None:
    change(folder / file, lambda f: f.setdefault("steps", [{}])[0].update(x=[[{TRUST: False}]]))
    assert f"{file} has trust_remote_code" in refusal(folder)


TRUST = "trust_remote_code"


def test_state_behind_a_link_is_read_in_the_hubs_cache_only(tmp_path: Path) -> None:
    blobs, revision = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(PACKED, blobs)
    revision.mkdir(parents=True)
    for file in blobs.iterdir():
        (revision / file.name).symlink_to(f"../../blobs/{file.name}")
    check_policy_folder(revision)
    shutil.move(blobs, tmp_path / "elsewhere")
    for file in revision.iterdir():
        file.unlink()
        file.symlink_to(f"../../elsewhere/{file.name}")
    assert "is a link out of the folder" in refusal(revision)


FILES = {
    "steps that are none": (lambda f: f.update(steps={}), "has no list of at most 64 steps"),
    "too many steps": (lambda f: f.update(steps=f["steps"] * 20), "has no list of at most 64"),
    "another key": (lambda f: f.update(hooks=[]), "has 'hooks'; it may have a name and steps"),
    "a name that is none": (lambda f: f.update(name={}), "its name is {}"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_processor_is_refused(name: str, folder: Path) -> None:
    edit, message = FILES[name]
    change(folder / BEFORE, edit)
    assert message in refusal(folder)


@pytest.mark.parametrize("file", [BEFORE, AFTER, "config.json", "adapter_config.json"])
def test_settings_are_parsed_only_if_they_are_small_and_flat(file: str, folder: Path) -> None:
    if file == "adapter_config.json":
        make_adapter(folder)
    (folder / file).write_text(" " * LARGEST_JSON + "{}")
    assert "has 10 MB, and a file of settings at most 10" in refusal(folder)
    (folder / file).write_text('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    assert "nested too deeply" in refusal(folder)
    (folder / file).write_bytes(b"\xff\xfe{")
    assert "is not JSON" in refusal(folder)


@pytest.mark.parametrize("declared", [10**18, 20_000_000, 0xFFFFFFFFFFFFFFFF])
@pytest.mark.parametrize("file", ["model", "policy_preprocessor_step_6_normalizer_processor"])
def test_a_header_longer_than_its_file_is_not_read(declared: int, file: str, folder: Path) -> None:
    path = folder / f"{file}.safetensors"
    path.write_bytes(declared.to_bytes(8, "little") + path.read_bytes()[8:])
    assert f"declare a header of {declared}" in refusal(folder)


# Weights.


def test_pickled_weights_are_refused_and_not_unpickled(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marks(marker)))
    assert "has pytorch_model.bin and no model.safetensors" in refusal(folder)
    assert not marker.exists()


def test_a_pickle_beside_safetensors_hurts_nobody(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(b"never read")
    check_policy_folder(folder)


# Adapters.


def test_an_ordinary_adapter_passes(folder: Path) -> None:
    check_policy_folder(make_adapter(folder))


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "XLORA", "adapters": {"x": "/x"}}, "peft_type is 'XLORA'"),
    "a module to import": ({"megatron_core": "os"}, "megatron_core is 'os'"),
    "megatron": ({"megatron_config": {"x": 1}}, "has megatron_config={'x': 1}, which plain LoRA"),
    "data to download": ({"corda_config": {"cache_file": "/x"}}, "has corda_config="),
    "quantisation": ({"loftq_config": {"loftq_bits": 4}}, "has loftq_config="),
    "layers copied": ({"layer_replication": [[0, 10**9]]}, "has layer_replication="),
    "a setting of tomorrow": ({"load_from": "evil/code"}, "has load_from='evil/code'"),
    "a pattern without end": ({"target_modules": "(.*a)+b"}, "target_modules is '(.*a)+b'"),
    "such a pattern of ranks": ({"rank_pattern": {"(a+)+b": 4}}, "rank_pattern is"),
    "a pattern among modules": ({"modules_to_save": ["(a+)+b"]}, "modules_to_save is"),
    "a base that is no name": ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path is"),
    "an unknown start": ({"init_lora_weights": "os.system"}, "init_lora_weights is 'os.system'"),
    "a huge rank": ({"r": 10**9}, "r is 1000000000"),
    "trust": ({"auto_mapping": {"trust_remote_code": True}}, "has trust_remote_code"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_is_more_than_plain_lora_is_refused(name: str, folder: Path) -> None:
    changes, message = ADAPTERS[name]
    assert message in refusal(make_adapter(folder, **changes))


def test_a_pickled_adapter_is_refused_and_not_unpickled(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    make_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Marks(marker)))
    assert "has adapter_model.bin and no adapter_model.safetensors" in refusal(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("pattern", "safe"),
    [
        ("all-linear", True),
        (r".*\.(q|k|v|o)_proj", True),
        (r"model\.layers\.\d+\.mlp", True),
        (r"(?:a|b)?\.c", True),
        ("(a+)+b", False),
        ("(a|a)*b", False),
        ("(?:a+){9}b", False),
        (".*.*.*.*.*b", False),
        (r"(a)\1", False),
        ("(?=a)b", False),
        ("(", False),
        ("a" * 2000, False),
    ],
)
def test_patterns_are_safe_whose_time_does_not_explode(pattern: str, safe: bool) -> None:
    assert is_safe_pattern(pattern) == safe


# Models that a policy names.

MODEL_FILES = {
    "tokenizer_config.json": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["e.E", 0]}},
    "config.json": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}},
    "processor_config.json": {"auto_map": {"AutoProcessor": "someone/code--evil.Evil"}},
}


@pytest.mark.parametrize("field", ["vlm_model_name", "vision_encoder_name", "text_encoder_name"])
@pytest.mark.parametrize("file", MODEL_FILES)
def test_a_model_with_code_of_its_own_is_refused(field: str, file: str, folder: Path) -> None:
    model = folder.parent / "model"
    model.mkdir()
    change(folder / "config.json", lambda fields: fields.update({field: str(model)}))
    check_policy_folder(folder)
    (model / file).write_text(json.dumps(MODEL_FILES[file]))
    assert f"{model / file} names code of its own (auto_map)" in refusal(folder)


def test_a_tokenizer_with_code_of_its_own_is_refused(folder: Path) -> None:
    tokens = folder.parent / "tokens"
    tokens.mkdir()

    def name_it(fields: Any) -> None:
        fields["steps"][3]["registry_name"] = "tokenizer_processor"
        fields["steps"][3]["config"]["tokenizer_name"] = str(tokens)

    change(folder / BEFORE, name_it)
    check_policy_folder(folder)
    name = "tokenizer_config.json"
    (tokens / name).write_text(json.dumps(MODEL_FILES[name]))
    assert f"{tokens / name} names code of its own" in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"x": {"_attn_implementation": "someone/kernel"}}, "would be fetched from the Hub"),
        ({"x": [{"trust_remote_code": True}]}, "has trust_remote_code"),
    ],
)
def test_a_model_that_fetches_code_is_refused(
    fields: dict[str, Any], message: str, folder: Path
) -> None:
    model = folder.parent / "model"
    model.mkdir()
    change(folder / "config.json", lambda f: f.update(vlm_model_name=str(model)))
    (model / "config.json").write_text(json.dumps(fields))
    assert message in refusal(folder)


def test_a_model_with_pickled_weights_is_refused(folder: Path) -> None:
    model = folder.parent / "model"
    model.mkdir()
    change(folder / "config.json", lambda f: f.update(vlm_model_name=str(model)))
    (model / "pytorch_model.bin").write_bytes(b"")
    assert "has pytorch_model.bin and no *.safetensors" in refusal(folder)


def test_a_model_that_is_no_name_is_refused(folder: Path) -> None:
    change(folder / "config.json", lambda f: f.update(vlm_model_name={"class": "os.system"}))
    assert "vlm_model_name is {'class': 'os.system'}; it must be a name or a folder" in refusal(
        folder
    )
