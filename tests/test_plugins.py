"""LeRobot's commands find our environment and policy types because the plugins are installed."""

import importlib.metadata
import importlib.util
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGINS = ("lerobot_env_robomimic", "lerobot_policy_vla_trqam_tiny")


@pytest.mark.parametrize("name", PLUGINS)
def test_the_plugin_is_installed_under_the_name_that_lerobot_looks_for(name: str) -> None:
    """LeRobot compares the name as it is written: a dash would hide it."""
    names = {found.metadata["Name"] for found in importlib.metadata.distributions()}
    assert name in names
    assert importlib.util.find_spec(name) is not None


def test_uv_sync_installs_every_plugin() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent.name for path in ROOT.glob("lerobot_*/pyproject.toml")}
    assert folders == set(PLUGINS)
    assert set(settings["dependency-groups"]["plugins"]) == folders
    assert "plugins" in settings["tool"]["uv"]["default-groups"]
    assert set(settings["tool"]["uv"]["workspace"]["members"]) == folders


def test_uv_sync_installs_the_small_simulators_that_live_together() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras, groups = settings["project"]["optional-dependencies"], settings["dependency-groups"]
    chosen = [name for key in ("robomimic", "ogbench", "pusht") for name in extras[key]]
    assert sorted(groups["simulators"]) == sorted(chosen)
    assert "simulators" in settings["tool"]["uv"]["default-groups"]
    excluded = [
        {next(iter(part.items())) for part in pair} for pair in settings["tool"]["uv"]["conflicts"]
    ]
    for other in (("extra", "robomimic"), ("group", "simulators")):
        assert {("extra", "libero"), other} in excluded


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_brings_no_dependency_of_its_own(name: str) -> None:
    """Whoever installs it with pip has vla-trqam already, which is on no index."""
    project = tomllib.loads((ROOT / name / "pyproject.toml").read_text())["project"]
    assert project["name"] == name
    assert project["dependencies"] == []


def test_the_wheel_has_every_package() -> None:
    """The list is by hand, for two folders of the root are installed below the package."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    below = {
        "vla_trqam": "vla_trqam",
        "adapters": "vla_trqam.adapters",
        "recipes": "vla_trqam.recipes",
    }
    found = {
        ".".join([package, *file.parent.relative_to(ROOT / folder).parts])
        for folder, package in below.items()
        for file in (ROOT / folder).rglob("__init__.py")
    }
    assert sorted(listed) == sorted(found)
