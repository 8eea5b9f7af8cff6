"""Settings by the names that they had before: on the command line, in presets, in runs' files."""

from pathlib import Path

import pytest
import vla_trqam.recipes
import yaml

from vla_trqam.config.parsing import given_flags, parse_config, saved_config, settings_of
from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.config.vla_settings import FinetuneVLAConfig
from vla_trqam.errors import UserError
from vla_trqam.methods.qam import QAMConfig
from vla_trqam.methods.trqam import TRQAMConfig

RECIPES = Path(next(iter(vla_trqam.recipes.__path__)))
ROBOMIMIC = RECIPES / "finetune_robomimic.yaml"


def read(*flags):
    return parse_config(FinetuneRobomimicConfig, ROBOMIMIC, flags)


@pytest.mark.parametrize(
    ("former", "today"),
    [
        ("--offline.steps=7", "--steps=7"),
        ("--offline.base_episodes=3", "--base_episodes=3"),
        ("--offline.critic_steps=5", "--critic.warmup_steps=5"),
        ("--trqam.kl_budget=0.3", "--method.kl_budget=0.3"),
        ("--method.name=qam", "--method.type=qam"),
    ],
)
def test_a_flag_of_before_is_the_one_of_today(former, today):
    assert read(former) == read(today) != read()
    assert given_flags([former]) == {today.partition("=")[0]}


def test_both_names_of_a_setting_at_once_are_refused():
    with pytest.raises(UserError, match=r"--offline\.steps is the former name of --steps"):
        read("--offline.steps=7", "--steps=8")


def saved_as(config, path, **changes):
    """A run's file as it was written then: what stood in `offline`, and the methods' groups."""
    settings = settings_of(config)
    critic = settings["critic"]
    settings["offline"] = {
        "steps": settings.pop("steps"),
        "base_episodes": settings.pop("base_episodes"),
        "critic_steps": critic.pop("warmup_steps"),
    }
    path.write_text(yaml.safe_dump(settings | changes))
    return path


def test_a_run_of_before_goes_on_with_its_own_settings(tmp_path):
    config = read("--steps=7", "--base_episodes=3", "--critic.warmup_steps=5")
    path = saved_as(config, tmp_path / "config.yaml")
    assert "offline" in yaml.safe_load(path.read_text())
    assert saved_config(FinetuneRobomimicConfig, path) == config


@pytest.mark.parametrize(("name", "kind"), [("trqam", TRQAMConfig), ("qam", QAMConfig)])
def test_a_run_of_before_there_was_a_choice_of_methods_goes_on_with_its_method(
    name, kind, tmp_path
):
    config = read()
    knobs = settings_of(config)["method"]
    knobs.pop("type")
    groups = {
        "method": {"name": name, "inverse_temperature": 1.0 if name == "trqam" else 3.0},
        "trqam": {**knobs, "kl_budget": 0.25},
    }
    known = {"scheme", *TRQAMConfig.__dataclass_fields__}
    groups["trqam"] = {k: v for k, v in groups["trqam"].items() if k in known}
    path = saved_as(config, tmp_path / "config.yaml", **groups)
    method = saved_config(FinetuneRobomimicConfig, path).method
    assert type(method) is kind
    if name == "trqam":
        assert method.kl_budget == 0.25
    else:
        assert method.inverse_temperature == 3.0


def test_the_settings_that_all_runs_share_have_one_name():
    shared = {"steps", "base_episodes", "online", "critic", "method", "eval", "seed"}
    for config in (FinetuneRobomimicConfig, FinetuneVLAConfig):
        assert shared <= config.__dataclass_fields__.keys()
