"""The methods beside the flow in the recipe for states: whole runs, kills, checkpoints."""

import json

import pytest
import yaml
from safetensors.torch import load_file
from toy_deaths import dies_at_update
from toy_files import differences, final_state
from toy_task import Killed

from vla_trqam.methods.cgql import CGQL
from vla_trqam.methods.dsrl import DSRL
from vla_trqam.methods.fql import FQL
from vla_trqam.methods.ifql import IFQL
from vla_trqam.methods.residual import Residual
from vla_trqam.methods.sac_flow import SACFlow

pytestmark = pytest.mark.slow

METHODS = {
    "fql": (FQL, ["--method.hidden_dims=[16]", "--method.alpha=3"], "one_step."),
    "ifql": (IFQL, ["--method.num_samples=4"], "value."),
    "dsrl": (DSRL, ["--method.hidden_dims=[16]"], "noise_actor."),
    "best_of_n": (IFQL, ["--method.num_samples=4"], "value."),
    "cgql_l": (CGQL, ["--method.inverse_temperature=3"], "critic."),
    "sac_flow": (SACFlow, ["--method.hidden_dims=[16]", "--method.gate_dim=4"], "gated_field."),
    "residual": (Residual, ["--method.edit_hidden_dims=[16]"], "edit."),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_whole_and_a_killed_one_to_the_same_bits(
    name, tiny, resume, toy_pool, tmp_path, capsys
):
    method, knobs, own = METHODS[name]
    flags = [f"--method.type={name}", *knobs, "--critic.warmup_steps=4", "--eval.videos=0"]
    assert tiny(tmp_path / "whole", *flags) == 0
    told = "the pretrained field is not used" in capsys.readouterr().out
    assert told == (name == "sac_flow")
    folder = tmp_path / "whole/checkpoints/last"
    weights = load_file(folder / "algorithm/networks.safetensors")
    assert any(key.startswith(own) for key in weights)
    config = yaml.safe_load((tmp_path / "whole/config.yaml").read_text())
    assert config["method"]["type"] == name
    report = (tmp_path / "whole/report.md").read_text()
    assert report.startswith(f"# {name.upper()} on ")
    lines = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    assert not any("kl_estimate" in json.loads(line) for line in lines)
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, method, 5)
        with pytest.raises(Killed):
            tiny(tmp_path / "killed", *flags)
    assert resume(tmp_path / "killed") == 0
    assert differences(final_state(tmp_path / "killed"), final_state(tmp_path / "whole")) == []


def test_what_acts_in_the_evaluation_is_the_methods_actor(tiny, toy_pool, tmp_path):
    """The saved policy is the base untouched: what differs is the method's network."""
    flags = ["--method.type=fql", "--method.hidden_dims=[16]", "--eval.videos=0"]
    assert tiny(tmp_path / "run", *flags) == 0
    saved, base = (
        load_file(tmp_path / "run" / place / "model.safetensors")
        for place in ("checkpoints/last/pretrained_model", "base_policy")
    )
    assert all(bool((saved[key] == base[key]).all()) for key in base)
    outcome = json.loads((tmp_path / "run/evaluation.json").read_text())
    base_end, tuned_end = (outcome[f"{who}_steps"] for who in ("base", "tuned"))
    assert base_end != tuned_end
