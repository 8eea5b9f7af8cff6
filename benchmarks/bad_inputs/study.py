"""Rows of the table of malformed input: comparisons and sweeps, and the table of their tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import yaml

from bad_inputs.place import Command, Place, RecipeName, Row

Settings = dict[str, Any]
Change = Callable[[Settings], object]


def _settings() -> Settings:
    """A sound comparison."""
    maze = {
        "recipe": "finetune_ogbench",
        "flags": {"dataset.path": "maze.npz", "steps": 100, "evaluate_every": 50},
    }
    return {"methods": ["trqam", "fql"], "tasks": ["maze"], "seeds": [0], "table": {"maze": maze}}


def _study(recipe: RecipeName, change: Change, place: Place) -> Command:
    settings = _settings()
    if recipe == "sweep_kl":
        del settings["methods"]
    change(settings)
    (place / "study.yaml").write_text(yaml.safe_dump(settings))
    given = (f"--config_path={place / 'study.yaml'}", f"--output_dir={place / 'study'}")
    return Command(recipe, given)


def _set(**values: Any) -> Change:
    return lambda settings: settings.update(values)


def _entry(**values: Any) -> Change:
    return lambda settings: settings["table"]["maze"].update(values)


def _flag(name: str, value: Any) -> Change:
    return lambda settings: settings["table"]["maze"]["flags"].update({name: value})


ALPHAS = [{"alpha": 3.0}, {"alpha": 10.0}]
BUDGETS = [{"kl_budget": 1.0}, {"kl_budget": 2.0}]
COMPARED: tuple[tuple[str, Change, tuple[str, ...]], ...] = (
    ("a method that there is not", _set(methods=["magic"]), ("magic is no method", "trqam")),
    ("a method twice", _set(methods=["fql", "fql"]), ("--methods=[fql, fql]", "twice")),
    ("a task that the table has not", _set(tasks=["cube"]), ("cube is not in the study's table",)),
    ("no seed", _set(seeds=[]), ("--seeds=[] is empty",)),
    ("no worker", _set(workers=0), ("--workers=0", "at least 1")),
    ("a task without a recipe", lambda s: s["table"]["maze"].pop("recipe"), ("has no recipe",)),
    ("a recipe that there is not", _entry(recipe="tune"), ("tune is no recipe",)),
    ("a word of a task that means nothing", _entry(knob={}), ("has 'knob'", "knobs")),
    ("a setting that there is not", _flag("stepz", 3), ("--stepz is not a setting",)),
    ("a method's knob for all", _flag("method.alpha", 3), ("method.alpha", "knobs")),
    ("a knob of another method", _entry(knobs={"trqam": {"alpha": 3}}), ("method.alpha",)),
    (
        "evaluations that miss the end of the offline updates",
        _flag("evaluate_every", 33),
        ("--evaluate_every=33", "divisor"),
    ),
    ("data without a file", _entry(data={"recipe": "make_ogbench_data"}), ("has no file",)),
    (
        "a trial for one method alone",
        _entry(trials={"fql": ALPHAS}),
        ("unequal trials", "trqam 0, fql 2"),
    ),
    (
        "one trial",
        _entry(trials={"fql": ALPHAS[:1], "trqam": BUDGETS[:1]}),
        ("two or more mappings",),
    ),
    ("trials that are numbers", _entry(trials={"fql": [3, 10]}), ("two or more mappings",)),
    (
        "trials of a task that has none",
        _entry(trials="cube"),
        ("those of cube, which is no task of the table with trials",),
    ),
    ("known trials that are nowhere", _set(known_trials="no.json"), ("--known_trials=no.json",)),
    ("a seed of trials that is compared", _set(trial_seeds=[0]), ("--trial_seeds has 0",)),
)
SWEPT: tuple[tuple[str, Change, tuple[str, ...]], ...] = (
    ("a negative budget", _set(budgets=[-1.0]), ("-1.0 must be positive",)),
    ("a method without a budget", _set(method="fql"), ("method.kl_budget",)),
)


def _rows() -> tuple[Row, ...]:
    studies: tuple[tuple[RecipeName, Any], ...] = (("compare", COMPARED), ("sweep_kl", SWEPT))
    return tuple(
        Row("studies", f"{wrong} (`{recipe}.py`)", partial(_study, recipe, change), words)
        for recipe, cases in studies
        for wrong, change, words in cases
    )


ROWS = _rows()
