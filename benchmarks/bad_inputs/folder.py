"""Rows of the table of malformed input: the folder of a run, new or to go on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bad_inputs.place import Command, Place, RecipeName, Row, cut, edit_json, pi0, replace, resumed
from bad_inputs.place import robomimic as robomimic_run

Change = Callable[[Path], object]
Spoiled = tuple[str, Change, tuple[str, ...]]

LAST = "checkpoints/last"
NETWORKS, SCALARS = f"{LAST}/algorithm/networks.safetensors", f"{LAST}/algorithm/scalars.json"
STATE = f"{LAST}/training_state"
METRICS, COMMAND, CONFIG = "metrics.jsonl", "command.txt", "config.yaml"


def removed(name: str) -> Change:
    return lambda run: (run / name).unlink()


def halved(name: str) -> Change:
    return lambda run: cut(run / name)


def rewritten(name: str, content: str | bytes) -> Change:
    return lambda run: replace(run / name, content)


def in_json(name: str, **values: Any) -> Change:
    return lambda run: edit_json(run / name, lambda fields: fields.update(values))


def in_settings(change: Callable[[dict[str, Any]], object]) -> Change:
    def spoil(run: Path) -> None:
        settings = yaml.safe_load((run / CONFIG).read_text())
        change(settings)
        replace(run / CONFIG, yaml.safe_dump(settings))

    return spoil


def _other_networks(run: Path) -> None:
    (run / NETWORKS).unlink()
    policy = run / LAST / "pretrained_model" / "model.safetensors"
    (run / NETWORKS).write_bytes(policy.read_bytes())


def of_an_old_run(**position: Any) -> Change:
    """A position that no checksum guards: checkpoints of old runs have none."""

    def spoil(run: Path) -> None:
        (run / LAST / "manifest.json").unlink(missing_ok=True)
        edit_json(run / STATE / "position.json", lambda fields: fields.update(position))

    return spoil


SPOILED: tuple[Spoiled, ...] = (
    ("no settings", removed(CONFIG), ("<run>/config.yaml", "no run to go on with")),
    ("settings that are not YAML", rewritten(CONFIG, "seed: [1"), ("<run>/config.yaml",)),
    ("settings cut short", halved(CONFIG), ("config.yaml",)),
    ("binary settings", rewritten(CONFIG, b"\xff\xfe\x00"), ("<run>/config.yaml",)),
    ("no settings in the file", rewritten(CONFIG, ""), ("<run>/config.yaml", "mapping")),
    (
        "a setting of a later version",
        in_settings(lambda settings: settings.update(warp=9)),
        ("<run>/config.yaml", "warp"),
    ),
    (
        "a setting of the wrong kind",
        in_settings(lambda settings: settings.update(batch_size="many")),
        ("<run>/config.yaml", "batch_size", "many"),
    ),
    (
        "a setting out of range",
        in_settings(lambda settings: settings.update(discount=2.0)),
        ("<run>/config.yaml", "discount"),
    ),
    ("no networks", removed(NETWORKS), ("networks.safetensors",)),
    ("networks cut short", halved(NETWORKS), ("networks.safetensors",)),
    ("networks that are a text", rewritten(NETWORKS, "networks"), ("networks.safetensors",)),
    ("the networks of something else", _other_networks, ("<run>/checkpoints/000002",)),
    ("no λ", removed(SCALARS), ("scalars.json",)),
    ("a λ that is not JSON", rewritten(SCALARS, "{"), ("scalars.json",)),
    ("a file without λ", rewritten(SCALARS, "{}"), ("<run>/checkpoints/",)),
    ("a λ that is a word", in_json(SCALARS, lam="wide", lagrange="wide"), ("<run>/checkpoints/",)),
    (
        "an optimizer cut short",
        halved(f"{STATE}/optimizer_state.safetensors"),
        ("optimizer_state.safetensors",),
    ),
    ("no random stream", removed(f"{STATE}/rng_state.safetensors"), ("rng_state.safetensors",)),
    (
        "a random stream of nothing",
        rewritten(f"{STATE}/rng_state.safetensors", bytes(20)),
        ("rng_state.safetensors",),
    ),
    ("the replay's random stream is gone", removed(f"{STATE}/replay_rng.json"), ("replay_rng",)),
    (
        "a random stream of another kind",
        in_json(f"{STATE}/replay_rng.json", bit_generator="MT19937"),
        ("<run>/checkpoints/",),
    ),
    ("no position", removed(f"{STATE}/position.json"), ("position.json",)),
    ("a position of nothing", rewritten(f"{STATE}/position.json", "{}"), ("position.json",)),
    ("a position that is a list", rewritten(f"{STATE}/position.json", "[1]"), ("position.json",)),
    (
        "a phase that is not the run's",
        in_json(f"{STATE}/position.json", phase="dreaming"),
        ("<run>/checkpoints/000002",),
    ),
    (
        "a negative position",
        in_json(f"{STATE}/position.json", step=-5, phase_step=-5),
        ("position.json",),
    ),
    (
        "a position that is a word",
        in_json(f"{STATE}/position.json", step="far", phase_step="far"),
        ("position.json",),
    ),
    ("more episodes than the replay has", of_an_old_run(replay_episodes=[99]), ("99", "replay")),
    (
        "a run of two processes",
        of_an_old_run(replay_episodes=[2, 2]),
        ("2 pr",),
    ),
    ("another precision", of_an_old_run(precision="bf16"), ("bf16", "--mixed")),
    ("no replay", lambda run: (run / "replay").rename(run / "x"), ("<run>/replay",)),
    ("no header of the replay", removed("replay/replay.json"), ("replay.json",)),
    ("a header that is not JSON", rewritten("replay/replay.json", "{"), ("replay.json",)),
    ("a header of nothing", rewritten("replay/replay.json", "{}"), ("replay.json",)),
    ("no actions in the replay", removed("replay/actions.npy"), ("actions.npy",)),
    ("actions cut short", halved("replay/actions.npy"), ("actions.npy",)),
    ("actions that are a text", rewritten("replay/actions.npy", "actions"), ("actions.npy",)),
    ("pickled actions", rewritten("replay/actions.npy", b"\x80\x04K\x01."), ("actions.npy",)),
    ("the list of episodes cut short", halved("replay/episodes.npy"), ("episodes.npy",)),
    ("no log", removed(METRICS), ("metrics.jsonl",)),
    ("a log cut short", halved(METRICS), ("metrics.jsonl",)),
    ("a log that is not JSON", rewritten(METRICS, "updates\n" * 40), ("metrics.jsonl",)),
    ("no base policy", lambda run: (run / "base_policy").rename(run / "x"), ("base_policy",)),
)

BY_FLAGS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("another seed", ("--seed=1",), ("leave out --seed",)),
    ("another batch", ("--batch_size=8",), ("leave out --batch_size",)),
    ("a preset", ("--preset=full",), ("leave out --preset",)),
    ("another dataset", ("--dataset.path=x.hdf5",), ("leave out --dataset.path",)),
    ("no thread", ("--num_threads=0",), ("--num_threads=0", "at least 1")),
)
RESUMED: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("no folder", ("--resume=true",), ("--resume=true", "--output_dir")),
    ("no such folder", ("--resume=true", "--output_dir=nowhere"), ("nowhere", "no run")),
    ("an empty folder", ("--resume=true", "--output_dir=."), ("no run to go on with",)),
    ("neither true nor false", ("--resume=perhaps", "--output_dir=."), ("resume", "perhaps")),
)


def _spoiled(change: Change, place: Place) -> Command:
    change(place.run())
    return resumed(place, "finetune_robomimic")


def _with_flags(flags: tuple[str, ...], place: Place) -> Command:
    place.run()
    return resumed(place, "finetune_robomimic", *flags)


def _resumed(recipe: RecipeName, flags: tuple[str, ...], _: Place) -> Command:
    return Command(recipe, flags)


def _vla(change: Change, place: Place) -> Command:
    change(place.vla_run())
    return resumed(place, "finetune_pi0")


def _in_use(place: Place) -> Command:
    place.run()
    return robomimic_run(place)


def _stranger(place: Place) -> Command:
    (place / "run").mkdir()
    place.write("run/precious.txt", "keep me")
    return robomimic_run(place)


def _vla_in_use(place: Place) -> Command:
    (place / "run").mkdir()
    place.write("run/precious.txt", "keep me")
    return pi0(place)


def _is_a_file(place: Place) -> Command:
    place.write("run", "keep me")
    return robomimic_run(place)


def _vla_is_a_file(place: Place) -> Command:
    place.write("run", "keep me")
    return pi0(place)


def _other_recipe(place: Place) -> Command:
    place.run()
    return resumed(place, "finetune_pi0")


def _gone_data(run: Path) -> None:
    settings = yaml.safe_load((run / CONFIG).read_text())
    settings["dataset"]["root"] = "/nowhere"
    replace(run / CONFIG, yaml.safe_dump(settings))
    pins = json.loads((run / "inputs.json").read_text())
    pins["dataset"]["folder"] = "/nowhere"
    replace(run / "inputs.json", json.dumps(pins))


VLA: tuple[Spoiled, ...] = (
    ("the dataset is gone", _gone_data, ("/nowhere",)),
    ("networks cut short", halved(NETWORKS), ("networks.safetensors",)),
    ("pictures of the replay cut short", halved("replay/images.agentview.npy"), ("agentview",)),
    ("a list of frames that is not JSON", rewritten("replay/frames.json", "{"), ("frames.json",)),
    ("frames' rows cut short", halved("replay/frame_rows.npy"), ("frame_rows.npy",)),
    ("features cut short", halved("replay/cache.prefix.features.npy"), ("features",)),
    (
        "a task's number that no task has",
        lambda run: replace(run / "replay/frames.json", json.dumps({"tasks": []})),
        ("frames.json",),
    ),
)

ROWS = (
    Row("run", "the folder is a run's already", _in_use, ("<run>", "in use", "--resume=true")),
    Row("run", "the folder holds other files", _stranger, ("<run>", "in use")),
    Row("run", "the folder is a file", _is_a_file, ("--output_dir=<run>", "is a file")),
    Row("run of π0", "the folder holds other files", _vla_in_use, ("<run>", "in use")),
    Row("run of π0", "the folder is a file", _vla_is_a_file, ("--output_dir=<run>", "is a file")),
    *(
        Row("resume", wrong, partial(_resumed, "finetune_robomimic", flags), words)
        for wrong, flags, words in RESUMED
    ),
    *(Row("resume", wrong, partial(_with_flags, flags), words) for wrong, flags, words in BY_FLAGS),
    Row("resume", "by the other recipe", _other_recipe, ("<run>/config.yaml",)),
    *(Row("resume", wrong, partial(_spoiled, change), words) for wrong, change, words in SPOILED),
    *(
        Row("resume of π0", wrong, partial(_resumed, "finetune_pi0", flags), words)
        for wrong, flags, words in RESUMED[:3]
    ),
    *(Row("resume of π0", wrong, partial(_vla, change), words) for wrong, change, words in VLA),
)
