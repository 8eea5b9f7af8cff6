"""Methods with networks beside a tiny π0, and one that takes these as its reward."""

import json

import pytest
import vla_runs
from safetensors.torch import load_file
from toy_deaths import dies_at_update
from toy_files import differences
from toy_images import images_state
from vla_runs import (
    files,
    forgetful_pool,
    killed,
    no_conclusion,
    resume,
    tiny,
    without_simulator,
)

from vla_trqam.engine.cached import Cached

__all__ = ["files", "forgetful_pool", "no_conclusion", "tiny", "without_simulator"]  # fixtures

pytestmark = pytest.mark.slow

METHODS = {
    "fql": (["--method.hidden_dims=[16]"], "one_step."),
    "ifql": (["--method.num_samples=3"], "value."),
    "dsrl": (["--method.hidden_dims=[16]"], "noise_actor."),
    "best_of_n": (["--method.num_samples=2"], "value."),
    "cgql_l": ([], "critic."),
    "residual": (["--method.edit_hidden_dims=[16]"], "edit."),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_whole_and_a_killed_one_to_the_same_bits(name, tiny, no_conclusion, tmp_path):
    knobs, own = METHODS[name]
    flags = [f"--method.type={name}", *knobs]
    assert tiny(tmp_path / "whole", *flags) == 0
    weights = load_file(tmp_path / "whole/checkpoints/last/algorithm/networks.safetensors")
    assert any(key.startswith(own) for key in weights)
    assert any(key.startswith("next_actions.") for key in weights) == (
        name not in ("ifql", "best_of_n")
    )
    with killed(lambda patch: dies_at_update(patch, Cached, 5)):
        tiny(tmp_path / "killed", *flags)
    assert resume(tmp_path / "killed") == 0
    found = differences(images_state(tmp_path / "killed"), images_state(tmp_path / "whole"))
    assert found == []


def test_qam_e_trains_the_policy_and_the_edit_and_its_critic_can_be_a_reward(
    tiny, no_conclusion, tmp_path, monkeypatch, capsys
):
    flags = ["--method.type=qam_e", "--method.edit_hidden_dims=[16]"]
    assert tiny(tmp_path / "earlier", *flags) == 0
    place = "checkpoints/last/algorithm/networks.safetensors"
    weights = load_file(tmp_path / "earlier" / place)
    assert {"policy", "critic", "edit", "temperature", "next_actions"} == {
        key.partition(".")[0] for key in weights
    }
    monkeypatch.setattr(vla_runs, "TINY", [x for x in vla_runs.TINY if "--critic." not in x])
    flags = ["--method.type=reward_matching"]
    flags.append(f"--method.reward_path={tmp_path / 'earlier/checkpoints/last'}")
    assert tiny(tmp_path / "run", *flags, "--policy.critic_layer=0") == 2
    said = capsys.readouterr().err
    assert "the critic of --method.reward_path values by --policy.critic_layer=-1, this run" in said
    assert tiny(tmp_path / "run", *flags) == 0
    kept = {key.partition(".")[0] for key in load_file(tmp_path / "run" / place)}
    assert kept == {"policy", "reward"}
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    found = set().union(*(json.loads(line) for line in lines))
    assert {"reward_mean", "kl_estimate"} <= found
    assert not {"td_loss", "q_mean", "next_action_age"} & found


def test_the_whole_run_with_its_report_names_the_method(tiny, tmp_path):
    assert tiny(tmp_path / "run", "--method.type=ifql", "--method.num_samples=2") == 0
    assert (tmp_path / "run/report.md").read_text().startswith("# IFQL of ")
