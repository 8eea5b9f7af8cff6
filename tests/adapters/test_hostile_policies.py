"""Hostile folders against LeRobot, peft and transformers themselves: nothing that they name runs.

Where a library runs it when left alone, the test shows that first: the input is one that bites.
"""

import builtins
import json
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0.processor_pi0 import make_pi0_pre_post_processors
from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors
from lerobot.processor import tokenizer_processor
from lerobot_contract import FAMILIES, checkpoint
from lerobot_contract import make_policy as fresh_policy
from test_policy_gate import Marks, change, runs
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from vla_trqam.adapters.checkpoint.policy_gate import no_foreign_code
from vla_trqam.adapters.checkpoint.processor_gate import STEPS
from vla_trqam.adapters.loading import load_policy
from vla_trqam.adapters.tiny.byte_tokenizer import byte_tokenizer

from vla_trqam.errors import UserError

pytestmark = pytest.mark.slow

BEFORE = "policy_preprocessor.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("tiny_pi0"), tmp_path / "policy"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_policy(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def appears(marker: Path, seconds: float) -> bool:
    """Whether a process that was started writes the file within the time."""
    end = time.monotonic() + seconds
    while not marker.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return marker.exists()


def name_a_class(folder: Path, marker: Path) -> None:
    command = f"touch {marker}"
    change(folder / BEFORE, lambda fields: fields["steps"].insert(0, runs(command)))


# Processors.


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_gate_knows_every_step_and_setting_of_the_tiny_policies(kind: str) -> None:
    for name in (BEFORE, "policy_postprocessor.json"):
        for step in json.loads((checkpoint(kind) / name).read_text())["steps"]:
            assert step["config"].keys() <= STEPS[step["registry_name"]].keys()


@pytest.mark.parametrize(
    ("policy_type", "make"),
    [("pi0", make_pi0_pre_post_processors), ("pi05", make_pi05_pre_post_processors)],
)
def test_the_gate_knows_every_step_and_setting_of_lerobots_own(
    policy_type: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = byte_tokenizer()
    monkeypatch.setattr(tokenizer_processor.AutoTokenizer, "from_pretrained", lambda name: words)
    config = PreTrainedConfig.get_choice_class(policy_type)(device="cpu")
    for pipeline in make(config):
        pipeline.save_pretrained(tmp_path)
    written = sorted(tmp_path.glob("*.json"))
    assert len(written) == 2
    for path in written:
        for step in json.loads(path.read_text())["steps"]:
            known = STEPS[step["registry_name"]]
            assert step["config"].keys() <= known.keys()
            assert all(known[key].fits(value) for key, value in step["config"].items())


def test_a_class_that_lerobot_would_run_is_not_run(folder: Path, marker: Path) -> None:
    name_a_class(folder, marker)
    config = PreTrainedConfig.from_pretrained(folder)
    with pytest.raises(Exception, match="Popen"):
        make_pre_post_processors(config, pretrained_path=str(folder))
    assert appears(marker, 10), "the input does not bite"
    marker.unlink()

    assert "names the class 'subprocess.Popen'" in refusal(folder)
    assert not appears(marker, 0.3)


def test_a_class_in_the_base_of_an_adapter_is_not_run(
    folder: Path, marker: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    fresh_policy("tiny_pi0", lora=True).save_pretrained(adapter)
    change(
        adapter / "adapter_config.json",
        lambda fields: fields.update(base_model_name_or_path=str(folder)),
    )
    load_policy(adapter)
    name_a_class(folder, marker)
    assert f"{folder / BEFORE}: step 0 names the class" in refusal(adapter)
    assert not appears(marker, 0.3)


# Weights.


def test_a_pickled_adapter_is_not_unpickled(marker: Path, tmp_path: Path) -> None:
    fresh_policy("tiny_pi0", lora=True).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Marks(marker)))
    assert "nothing is unpickled" in refusal(tmp_path)
    assert not marker.exists()


# The config, as draccus decodes it.


@pytest.mark.parametrize("name", ["subprocess.Popen", "os:system", "lerobot.policies", "pi0 "])
def test_a_type_is_no_module(name: str, folder: Path) -> None:
    change(folder / "config.json", lambda fields: fields.update(type=name))
    assert f"LeRobot knows no policy type {name!r}" in refusal(folder)


def test_a_type_within_the_config_is_no_module(folder: Path) -> None:
    nested = {"type": "subprocess.Popen", "args": "true"}
    change(folder / "config.json", lambda fields: fields.update(rtc_config=nested))
    assert "is not a valid config" in refusal(folder)


def test_a_text_that_draccus_would_include_on_a_command_line_stays_a_text(folder: Path) -> None:
    text = f"include {folder / 'config.json'}"
    change(folder / "config.json", lambda fields: fields.update(compile_mode=text))
    assert load_policy(folder).host.config.compile_mode == text


# Code of a repository of transformers'.

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast): pass
class EvilConfig(PretrainedConfig): model_type = "evil"
"""
LOADERS = {
    AutoTokenizer: ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", None]}),
    AutoConfig: ("config.json", {"AutoConfig": "evil.EvilConfig"}),
    AutoProcessor: ("processor_config.json", {"AutoProcessor": "evil.Evil"}),
}


def model_with_code(folder: Path, marker: Path, loader: Any) -> Path:
    folder.mkdir()
    byte_tokenizer().save_pretrained(folder)
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    name, auto_map = LOADERS[loader]
    fields = {"auto_map": auto_map, "model_type": "evil", "tokenizer_class": "Evil"}
    (folder / name).write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("loader", LOADERS)
def test_a_model_with_code_does_not_run_it_whatever_is_typed(
    loader: Any, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(builtins, "input", lambda text: asked.append(text) or "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    model = model_with_code(tmp_path / "model", marker, loader)
    with no_foreign_code(), pytest.raises(ValueError, match="custom code"):
        loader.from_pretrained(str(model))
    assert not asked
    assert not marker.exists()
    loader.from_pretrained(str(model))
    assert asked
    assert marker.exists(), "the input does not bite"


def test_the_loader_runs_no_code_of_a_tokenizer(
    folder: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by an override, which the gate of the folder does not see."""
    monkeypatch.setattr(builtins, "input", lambda text: "y")
    model = model_with_code(tmp_path / "model", marker, AutoTokenizer)

    def name_it(fields: Any) -> None:
        step = next(s for s in fields["steps"] if s["registry_name"] == "tiny_byte_tokenizer")
        step["registry_name"] = "tokenizer_processor"
        step["config"]["tokenizer_name"] = "someone/tokens"

    change(folder / BEFORE, name_it)
    with pytest.raises(UserError, match="cannot be had"):
        load_policy(
            folder, processor_overrides={"tokenizer_processor": {"tokenizer_name": str(model)}}
        )
    assert not marker.exists()
