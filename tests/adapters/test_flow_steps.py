"""Adapters that act with another number of flow steps than their base."""

import json
from pathlib import Path

import pytest
import torch
from lerobot.policies.factory import get_policy_class
from lerobot_contract import checkpoint, host_chunk, make_policy, observation
from vla_trqam.adapters.families.registry import FAMILIES
from vla_trqam.adapters.loading import load_policy
from vla_trqam.adapters.lora import LoRASettings

from vla_trqam.hub.card_facts import STEPS_FIELDS
from vla_trqam.sde import sample_ode
from vla_trqam.time_grid import TimeGrid

pytestmark = pytest.mark.slow

OWN, TUNED = 4, 2


def steps_in(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["num_inference_steps"])


def test_adapters_that_are_gone_on_with_have_the_steps_of_their_own_base(tmp_path: Path) -> None:
    policy = load_policy(checkpoint("tiny_pi0"), lora=LoRASettings(r=2))
    policy.take_flow_steps(TUNED)
    policy.save_pretrained(tmp_path / "adapters")
    assert steps_in(tmp_path / "adapters") == TUNED
    going_on = load_policy(tmp_path / "adapters", adapter="continue")
    assert (going_on.num_flow_steps, going_on.own_flow_steps) == (TUNED, OWN)
    merged = load_policy(tmp_path / "adapters", lora=LoRASettings(r=2))
    assert (merged.num_flow_steps, merged.own_flow_steps) == (TUNED, TUNED)


def test_the_model_card_knows_what_every_family_calls_its_number_of_steps() -> None:
    assert {family.steps_field for family in FAMILIES.values()} <= set(STEPS_FIELDS)


def test_a_base_is_saved_to_act_as_it_came(tmp_path: Path) -> None:
    policy = load_policy(checkpoint("tiny_pi0"), lora=LoRASettings(r=2))
    policy.take_flow_steps(TUNED)
    policy.save_base(tmp_path / "base")
    policy.save_pretrained(tmp_path / "merged", merged=True)
    assert (steps_in(tmp_path / "base"), steps_in(tmp_path / "merged")) == (OWN, TUNED)
    assert policy.num_flow_steps == TUNED


def test_stock_lerobot_acts_with_the_tuned_steps(tmp_path: Path) -> None:
    policy = make_policy("tiny_pi0", lora=False)
    policy.take_flow_steps(TUNED)
    policy.save_pretrained(tmp_path / "policy")
    host = get_policy_class("tiny_pi0").from_pretrained(tmp_path / "policy").eval()
    seen = observation("tiny_pi0", 3, 0)
    noise = torch.randn(3, *policy.chunk_shape, generator=torch.Generator().manual_seed(0))
    context = policy.encode(seen)
    with torch.no_grad():
        ours = sample_ode(lambda x, tau: policy.velocity(x, tau, context), noise, TimeGrid(TUNED))
        theirs = host_chunk(host, seen, noise)
    torch.testing.assert_close(policy.real_actions(ours), theirs, rtol=1e-4, atol=1e-5)
