"""What is written at real size has the published sizes; what a run says is heard."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, SmolVLMForConditionalGeneration
from vla_costs.real_size import SMOLVLM_TEXT, SMOLVLM_VISION
from whole_run import INPUTS, Told, report, write_inputs

from vla_trqam.errors import UserError

PUBLISHED = 507_482_304
"""Weights of SmolVLM2-500M-Video-Instruct."""
SAID = {
    1.0: "ok    parameters   adapters: 5 trained",
    2.0: "ok    memory       weights 8.3 GiB are there; 5.1 GiB in all",
    3.0: "ok    base         the tuned field differs by 0 from the base",
    4.0: "critic: 5/200 (2%)",
    5.0: "critic: 200/200 (100%), 178.6 updates/s",
    6.0: "offline: 30/30 (100%), 1.9 updates/s",
    7.0: "most 2147483648",
}


def test_the_backbone_has_as_many_weights_as_the_published_one() -> None:
    language = {"model_type": "llama", "pad_token_id": 2}
    config = AutoConfig.for_model(
        "smolvlm",
        text_config=language | SMOLVLM_TEXT,
        vision_config=SMOLVLM_VISION,
        scale_factor=4,
        pad_token_id=2,
    )
    with torch.device("meta"):
        model = SmolVLMForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED


@pytest.fixture
def told() -> Told:
    heard = Told()
    for seconds, line in SAID.items():
        heard.hear(line + "\n", seconds)
    return heard


def test_a_part_ends_with_its_last_line(told: Told) -> None:
    assert told.seconds == {"machine": 1.0, "data": 3.0, "critic": 5.0, "policy": 6.0}
    assert told.memory == "weights 8.3 GiB are there; 5.1 GiB in all"
    assert told.most == 2**31


def test_the_table_has_the_run_in_it(told: Told, tmp_path: Path) -> None:
    told.seconds["end"] = 8.0
    saved = tmp_path / "run/checkpoints/last/pretrained_model"
    saved.mkdir(parents=True)
    (saved / "adapter_model.safetensors").write_bytes(bytes(3 * 2**20))
    rows = [{"phase": "critic", "updates_per_s": 178.6}, {"phase": "offline", "updates_per_s": 1.9}]
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = argparse.Namespace(policy="pi0", cameras=3, episodes=4, length=100, folder=tmp_path)
    heading, _, row, _, memory = report(given, told).splitlines()
    cells = dict(zip(heading.split(" | "), row.split(" | "), strict=True))
    assert cells["400 frames encoded, critic warm, s"] == "2"
    assert (cells["machine checked, s"], cells["data checked, s"]) == ("1", "3")
    assert (cells["critic, updates/s"], cells["policy, updates/s"]) == ("178.6", "1.90")
    assert (cells["at most, GiB"], cells["whole run, s"]) == ("2.0", "8")
    assert row.endswith("| 3 |")
    assert memory.startswith("memory: weights 8.3 GiB")


def test_inputs_of_another_kind_or_half_of_them_are_not_taken(tmp_path: Path) -> None:
    given = argparse.Namespace(**dict.fromkeys(INPUTS, 1), folder=tmp_path)
    with pytest.raises(UserError, match="and has no inputs"):
        write_inputs(given)
    (tmp_path / "inputs.json").write_text(json.dumps(dict.fromkeys(INPUTS, 1)))
    write_inputs(given)
    given.cameras = 2
    with pytest.raises(UserError, match="take another"):
        write_inputs(given)
