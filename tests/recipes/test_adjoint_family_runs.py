"""External KL, SQAM, QAM-E and reward matching in the recipe for states."""

import json

import pytest
from safetensors.torch import load_file
from toy_deaths import dies_at_update
from toy_files import differences, final_state
from toy_task import Killed

from vla_trqam.methods.trqam import TRQAM

pytestmark = pytest.mark.slow

FLAGS = {
    "external_kl": ["--method.kl_budget=0.3"],
    "sqam": ["--method.value_penalty=0.1"],
}


def logged(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return set().union(*(json.loads(line) for line in lines))


@pytest.mark.parametrize("name", FLAGS)
def test_a_run_of_a_flow_of_the_family_goes_whole(name, tiny, no_conclusion, tmp_path):
    flags = [f"--method.type={name}", *FLAGS[name], "--critic.warmup_steps=4"]
    assert tiny(tmp_path / "run", *flags) == 0
    assert {"kl_estimate", "adjoint_loss", "td_loss"} <= logged(tmp_path / "run")


def test_a_killed_run_of_qam_e_goes_on_to_the_same_bits(
    tiny, resume, toy_pool, no_conclusion, tmp_path
):
    flags = ["--method.type=qam_e", "--method.edit_hidden_dims=[16]", "--critic.warmup_steps=4"]
    assert tiny(tmp_path / "whole", *flags) == 0
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, TRQAM, 5)
        with pytest.raises(Killed):
            tiny(tmp_path / "killed", *flags)
    assert resume(tmp_path / "killed") == 0
    assert differences(final_state(tmp_path / "killed"), final_state(tmp_path / "whole")) == []


def test_qam_e_is_saved_with_its_edit_and_reported(tiny, toy_pool, tmp_path):
    flags = ["--method.type=qam_e", "--method.edit_hidden_dims=[16]", "--eval.videos=0"]
    assert tiny(tmp_path / "run", *flags) == 0
    weights = load_file(tmp_path / "run/checkpoints/last/algorithm/networks.safetensors")
    assert {"edit", "temperature"} <= {key.partition(".")[0] for key in weights}
    assert (tmp_path / "run/report.md").read_text().startswith("# QAM_E on ")


def test_a_reward_is_the_critic_of_an_earlier_run(tiny, resume, toy_pool, tmp_path, capsys):
    assert tiny(tmp_path / "earlier", "--eval.videos=0") == 0
    reward = tmp_path / "earlier/checkpoints/last"
    flags = [
        *("--method.type=reward_matching", f"--method.reward_path={reward}", "--eval.videos=0"),
        f"--policy.path={tmp_path / 'earlier/base_policy'}",
    ]
    capsys.readouterr()
    assert tiny(tmp_path / "run", *flags) == 0
    found = logged(tmp_path / "run")
    assert {"reward_mean", "kl_estimate", "lam"} <= found
    assert not {"td_loss", "q_mean"} & found
    earlier, own = (
        load_file(folder / "algorithm/networks.safetensors")
        for folder in (reward, tmp_path / "run/checkpoints/last")
    )
    assert not any(key.startswith("critic.") for key in own)
    for key in [key for key in own if key.startswith("reward.")]:
        same = earlier[key.replace("reward.ensemble.", "critic.target.")]
        assert bool((own[key] == same).all()), key
    with pytest.MonkeyPatch.context() as patch:
        dies_at_update(patch, TRQAM, 3)
        with pytest.raises(Killed):
            tiny(tmp_path / "killed", *flags)
    assert resume(tmp_path / "killed") == 0
    assert differences(final_state(tmp_path / "killed"), final_state(tmp_path / "run")) == []


def test_a_warm_up_of_a_critic_that_is_not_learnt_is_left_out_and_told(
    tiny, toy_pool, no_conclusion, tmp_path, capsys
):
    assert tiny(tmp_path / "earlier") == 0
    reward = f"--method.reward_path={tmp_path / 'earlier/checkpoints/last'}"
    flags = ["--preset=full", "--method.type=reward_matching", reward]  # it has a warm-up
    assert tiny(tmp_path / "run", *flags) == 0
    assert "reward_matching learns no critic, and there is no warm-up" in capsys.readouterr().out
    phases = {json.loads(x)["phase"] for x in (tmp_path / "run/metrics.jsonl").open()}
    assert "critic" not in phases


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--method.type=reward_matching needs --method.reward_path"),
        (["--method.reward_path=nowhere"], "nowhere has no algorithm/networks.safetensors"),
        (["--critic.pessimism=1", "--method.reward_path=x"], "has no use for --critic."),
    ],
)
def test_a_run_without_its_reward_is_refused_before_its_folder_is_made(
    flags, said, tiny, toy_pool, tmp_path, capsys
):
    assert tiny(tmp_path / "run", "--method.type=reward_matching", *flags) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
