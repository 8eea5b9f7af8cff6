"""Settings that cannot work are refused before anything is loaded."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import vla_trqam.recipes
import yaml

from vla_trqam.config.parsing import (
    dump_config,
    parse_config,
    resumed_config,
    saved_config,
    settings_of,
)
from vla_trqam.config.vla_settings import FinetuneVLAConfig
from vla_trqam.envs.registry import EnvConfig
from vla_trqam.errors import UserError

RECIPES = Path(vla_trqam.recipes.__file__ or next(iter(vla_trqam.recipes.__path__)))
PRESETS = next(
    folder / "finetune_pi0.yaml"
    for folder in (RECIPES, RECIPES.parent)
    if (folder / "finetune_pi0.yaml").is_file()
)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps=0", "--online.steps=0"], "both 0: nothing would be trained"),
        (["--env.type=null"], "need a simulator: give --env.type=robomimic"),
        (["--policy.path=lerobot/pi0_base"], "go together"),
        (["--dataset.repo_id=me/data"], "go together"),
        (["--policy.push_to_hub=true"], "needs --policy.repo_id=USER/NAME"),
        (["--policy.tokenizer=/nowhere"], "--policy.tokenizer=/nowhere is not a folder"),
        (
            ["--policy.push_to_hub=true", "--policy.repo_id=me/it", "--policy.tokenizer=."],
            "name a folder of this machine, --policy.tokenizer=.",
        ),
        (["--method.kl_budget=0"], "kl_budget"),
        (["--batch_size=0"], "--batch_size=0 must be at least 1"),
        (["--critic.next_actions=0"], "--critic.next_actions=0 must be at least 1"),
        (["--critic.updates_per_step=-1"], "must not be negative"),
        (["--discount=1"], "--discount=1.0 must lie between 0 and 1"),
        (["--policy.tuned_flow_steps=0"], "--policy.tuned_flow_steps=0 must be at least 1"),
        (
            ["--method.scheme=posterior", "--policy.tuned_flow_steps=1"],
            "--policy.tuned_flow_steps=1 is too few for the posterior scheme, whose last step has "
            "no noise: take at least 2 by --policy.tuned_flow_steps",
        ),
        (["--peft.r=0"], "--peft.r=0 must be at least 1"),
        (["--polcy.path=x"], "polcy"),
        (["--method.inverse_temperature=3"], "add --method.type=qam"),
    ],
)
def test_a_wrong_setting_gets_a_sentence(flags, sentence):
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
        parse_config(FinetuneVLAConfig, PRESETS, flags)


def test_an_offline_run_on_ones_own_policy_needs_no_simulator():
    flags = ["--policy.path=a/b", "--dataset.repo_id=c/d", "--env.type=null"]
    config = parse_config(
        FinetuneVLAConfig, PRESETS, [*flags, "--online.steps=0", "--base_episodes=0"]
    )
    assert config.env.type is None


def test_base_rounds_and_evaluations_use_different_initial_states():
    config = parse_config(FinetuneVLAConfig, PRESETS, [])
    rounds = [seed for done in range(config.online.steps) for seed in config.round_seeds(done)]
    every = [*config.evaluation_seeds(), *config.validation_seeds(), *config.base_seeds(), *rounds]
    assert len(every) == len(set(every))
    assert len(rounds) == config.num_training_episodes - config.base_episodes


def test_another_simulator_than_the_presets_takes_none_of_its_settings():
    preset = parse_config(FinetuneVLAConfig, PRESETS, [])
    assert (preset.env.type, preset.env.task, preset.env.shadows) == ("robomimic", "Lift", False)
    other = parse_config(FinetuneVLAConfig, PRESETS, ["--env.type=pusht", "--env.options={fps: 5}"])
    assert other.env == EnvConfig("pusht", options={"fps": 5})
    assert replace(other, env=preset.env) == preset
    same = parse_config(FinetuneVLAConfig, PRESETS, ["--env.type=robomimic"])
    assert same == preset


def test_options_of_a_simulator_survive_the_runs_settings(tmp_path):
    flags = ["--env.type=pusht", "--env.options={obs_type: pixels_agent_pos, fps: 5}"]
    config = parse_config(FinetuneVLAConfig, PRESETS, flags)
    dump_config(config, tmp_path / "config.yaml")
    assert saved_config(FinetuneVLAConfig, tmp_path / "config.yaml") == config


def test_settings_of_a_run_before_the_other_simulators_still_load(tmp_path):
    config = parse_config(FinetuneVLAConfig, PRESETS, [])
    settings = settings_of(config)
    del settings["env"]["instruction"], settings["env"]["options"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert saved_config(FinetuneVLAConfig, tmp_path / "config.yaml") == config


def test_help_lists_what_is_of_no_group_before_the_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse_config(FinetuneVLAConfig, PRESETS, ["--help"])
    flags = re.findall(r"^  --([\w.]+)=", capsys.readouterr().out, re.MULTILINE)
    in_group = ["." in flag for flag in flags]
    assert "prefix_cache" in flags
    assert in_group == sorted(in_group)


def test_a_home_that_the_shell_left_as_it_is_is_found():
    more = "[{repo_id: e/f, root: ~/more, success_labels: ~/labels.json}]"
    flags = ["--policy.path=a/b", "--dataset.repo_id=c/d", "--dataset.root=~/data"]
    config = parse_config(FinetuneVLAConfig, PRESETS, [*flags, f"--dataset.more={more}"])
    (other,) = config.dataset.more
    assert config.dataset.root == Path.home() / "data"
    assert (other.root, other.success_labels) == (Path.home() / "more", Path.home() / "labels.json")


def test_a_resumed_run_may_have_another_deadline_and_nothing_that_its_numbers_depend_on(tmp_path):
    env = EnvConfig(type="robomimic")
    dump_config(FinetuneVLAConfig(output_dir=tmp_path, env=env), tmp_path / "config.yaml")

    def resumed(**settings):
        asked = FinetuneVLAConfig(resume=True, output_dir=tmp_path, env=env)
        for name, value in settings.items():
            setattr(asked.eval, name, value)
        flags = ["--resume=true", *(f"--eval.{name}={value}" for name, value in settings.items())]
        return resumed_config(asked, "config.yaml", flags, lambda *_: None)

    assert resumed(chunk_deadline=77.0).eval.chunk_deadline == 77.0
    with pytest.raises(UserError, match=r"leave out --eval.episodes"):
        resumed(chunk_deadline=77.0, episodes=7)
