"""Rows of the table of malformed input: the Hub, and the recipes that make demonstrations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from bad_inputs.place import Command, Place, RecipeName, Row, edit_json, hub, replace

Change = Callable[[Path], object]
Flags = tuple[str, tuple[str, ...], tuple[str, ...]]
"""What is wrong, the command line, and words of the sentence."""

PUSH = ("push", "--run=run")
TO = (*PUSH, "--repo_id=some/one", "--dry_run")
PULL = ("pull", "--folder=pulled")

HUB: tuple[Flags, ...] = (
    ("no command", (), ("push|pull",)),
    ("an unknown command", ("shove",), ("shove", "push")),
    ("an unknown flag", (*PULL, "--repo_id=some/one", "--force"), ("--force", "--help")),
    ("a push of nothing", ("push", "--repo_id=some/one"), ("--run",)),
    ("a push to nowhere", PUSH, ("--repo_id",)),
    ("a pull to nowhere", ("pull", "--repo_id=some/one"), ("--folder",)),
    ("neither true nor false", (*TO, "--private=perhaps"), ("--private", "perhaps")),
    ("no such run", TO, ("run", "config.yaml")),
    ("a push without a token", (*PUSH, "--repo_id=some/one"), ("some/one", "HF_TOKEN")),
    ("a push to half a name", (*PUSH, "--repo_id=one"), ("--repo_id=one", "USER/NAME")),
    ("a push to a name with a space", (*PUSH, "--repo_id=some/o ne"), ("--repo_id=some/o ne",)),
    ("a push to three names", (*PUSH, "--repo_id=a/b/c"), ("--repo_id=a/b/c", "USER/NAME")),
    ("a push upwards", (*PUSH, "--repo_id=../one"), ("--repo_id=../one", "USER/NAME")),
    ("a push to an empty name", (*PUSH, "--repo_id="), ("--repo_id=", "USER/NAME")),
    ("a pull of half a name", (*PULL, "--repo_id=one"), ("--repo_id=one", "USER/NAME")),
    ("a pull, offline", (*PULL, "--repo_id=some/one"), ("HF_HUB_OFFLINE",)),
)

DATA: tuple[Flags, ...] = (
    ("no task", ("--episodes=2", "--output=x.hdf5"), ("--task",)),
    ("an unknown task", ("--task=tennis", "--episodes=2", "--output=x.hdf5"), ("tennis", "lift")),
    ("no episode", ("--task=lift", "--episodes=0", "--output=x.hdf5"), ("episodes", "0")),
    ("a word for episodes", ("--task=lift", "--episodes=ten", "--output=x"), ("--episodes", "ten")),
    (
        "a negative seed",
        ("--task=lift", "--episodes=2", "--output=x.hdf5", "--seed=-1"),
        ("seed", "-1"),
    ),
    (
        "fewer than no process",
        ("--task=lift", "--episodes=2", "--output=x.hdf5", "--workers=-1"),
        ("workers", "-1"),
    ),
    (
        "an unknown operator",
        ("--task=lift", "--episodes=2", "--output=x.hdf5", "--operators=nobody"),
        ("nobody", "better"),
    ),
    (
        "an unknown choice of states",
        ("--task=lift", "--episodes=2", "--output=x.hdf5", "--states=some"),
        ("--states", "some", "initial"),
    ),
    (
        "neither true nor false",
        ("--task=lift", "--episodes=2", "--output=x.hdf5", "--next_obs=perhaps"),
        ("--next_obs", "perhaps"),
    ),
    (
        "an unknown flag",
        ("--task=lift", "--episodes=2", "--output=x.hdf5", "--episode=3"),
        ("--episode=3",),
    ),
    ("the file exists", ("--task=lift", "--episodes=2", "--output=there"), ("there", "exists")),
    ("a folder below a file", ("--task=lift", "--episodes=2", "--output=there/x"), ("there",)),
)

TINY: tuple[Flags, ...] = (
    ("no folder", (), ("--output",)),
    ("an unknown policy", ("--output=x", "--policy=act"), ("--policy", "act", "smolvla")),
    ("an unknown flag", ("--output=x", "--episode=3"), ("--episode=3",)),
    ("the folder exists", ("--output=.",), ("exists", "--output")),
    ("no such demonstrations", ("--output=x", "--demos=nowhere.hdf5"), ("nowhere.hdf5",)),
    ("demonstrations that are none", ("--output=x", "--demos=there"), ("there", "HDF5")),
    ("a filter key of no demonstration", ("--output=x", "--filter_key=nobodys"), ("nobodys",)),
    ("no episode", ("--output=x", "--episodes=0"), ("--episodes=0", "at least 1")),
    ("a negative number of scenes", ("--output=x", "--scenes=-1"), ("--scenes=-1",)),
    ("a negative number of updates", ("--output=x", "--clone_steps=-1"), ("--clone_steps=-1",)),
    ("a word for a number", ("--output=x", "--pose_steps=many"), ("--pose_steps", "many")),
    ("no process", ("--output=x", "--num_workers=0"), ("--num_workers=0", "at least 1")),
    ("no thread", ("--output=x", "--num_threads=0"), ("--num_threads=0", "at least 1")),
    ("a negative seed", ("--output=x", "--seed=-1"), ("--seed=-1",)),
    (
        "scenes beside a dataset",
        ("--output=x", "--dataset=.", "--scenes=3"),
        ("--scenes", "leave it out"),
    ),
    ("a dataset that is none", ("--output=x", "--dataset=nowhere"), ("nowhere",)),
)


METAWORLD_OUT = ("--tasks=reach-v3", "--output=made")
METAWORLD: tuple[Flags, ...] = (
    ("no task", ("--output=made",), ("required: --tasks",)),
    ("the folder exists", ("--tasks=reach-v3", "--output=."), ("exists already",)),
    ("an unknown quality", (*METAWORLD_OUT, "--qualities=best"), ("'best'", "better, okay")),
    ("no step between frames", (*METAWORLD_OUT, "--every=0"), ("--every=0", "at least 1")),
    ("too many episodes", (*METAWORLD_OUT, "--episodes=1000000"), ("more than the 100000",)),
)


def _command(recipe: RecipeName, flags: tuple[str, ...], place: Place) -> Command:
    place.write("there", "keep me")
    return Command(recipe, flags)


def _of_a_run(change: Change, flags: tuple[str, ...], place: Place) -> Command:
    change(place.vla_run())
    return hub(*flags)


def _taken_folder(place: Place) -> Command:
    (place / "pulled").mkdir()
    return hub(*PULL, "--repo_id=some/one")


def _nothing(_: Path) -> None:
    """A sound run."""


def _no_checkpoint(run: Path) -> None:
    (run / "checkpoints").rename(run / "x")


def _no_weights(run: Path) -> None:
    (run / "checkpoints/last/pretrained_model/adapter_model.safetensors").unlink()


def _policy_config(content: str) -> Change:
    return lambda run: replace(run / "checkpoints/last/pretrained_model/config.json", content)


def _base(run: Path) -> None:
    """The base of the adapter is the repository that is pushed to."""
    path = run / "checkpoints/last/pretrained_model/adapter_config.json"
    edit_json(path, lambda fields: fields.update(base_model_name_or_path="some/one"))


def _settings(run: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    replace(run / "config.yaml", yaml.safe_dump([settings]))


RUNS: tuple[tuple[str, Change, tuple[str, ...], tuple[str, ...]], ...] = (
    ("no checkpoint", _no_checkpoint, TO, ("run", "no checkpoint")),
    ("an unknown checkpoint", _nothing, (*TO, "--checkpoint=000099"), ("000099", "000002")),
    (
        "a checkpoint elsewhere",
        _nothing,
        (*TO, "--checkpoint=../replay"),
        ("../replay", "is none of 000001, 000002"),
    ),
    ("a base of this machine", _nothing, TO, ("base_model_name_or_path", "--merged=true")),
    ("the base's own repository", _base, TO, ("--repo_id=some/one", "base policy's own")),
    ("a policy without weights", _no_weights, TO, ("pretrained_model", "adapter_model")),
    ("a policy's config that is not JSON", _policy_config("{"), TO, ("config.json",)),
    ("a policy's config without a type", _policy_config("{}"), TO, ("config.json", '"type"')),
    ("settings that are a list", _settings, TO, ("config.yaml", "mapping")),
    ("no log", lambda run: (run / "metrics.jsonl").unlink(), TO, ("metrics.jsonl",)),
    (
        "a report that is not JSON",
        lambda run: replace(run / "report.json", "{"),
        TO,
        ("report.json",),
    ),
    (
        "a position that is not JSON",
        lambda run: replace(run / "checkpoints/last/training_state/position.json", "{"),
        TO,
        ("position.json",),
    ),
)

ROWS = (
    *(Row("hub", wrong, partial(_command, "hub", flags), words) for wrong, flags, words in HUB),
    Row("hub", "a pull into a folder that exists", _taken_folder, ("--folder=pulled", "exists")),
    *(
        Row("hub", wrong, partial(_of_a_run, change, flags), words)
        for wrong, change, flags, words in RUNS
    ),
    *(
        Row("make_robomimic_data", wrong, partial(_command, "make_robomimic_data", flags), words)
        for wrong, flags, words in DATA
    ),
    *(
        Row("make_tiny_vla", wrong, partial(_command, "make_tiny_vla", flags), words)
        for wrong, flags, words in TINY
    ),
    *(
        Row("make_metaworld_data", wrong, partial(_command, "make_metaworld_data", flags), words)
        for wrong, flags, words in METAWORLD
    ),
)
