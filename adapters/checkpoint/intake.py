"""What is set right in a policy as it is loaded, each with a sentence of its own, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lerobot.utils.constants import ACTION, OBS_STATE
from vla_trqam.adapters.policy_checks import RELATIVE
from vla_trqam.adapters.processors import Processors

from vla_trqam.errors import UserError

Say = Callable[[str], None]

FOR_LONG_TRAINING = ("compile_model", "gradient_checkpointing")
"""What LeRobot's documented training command switches on."""


def switch_off(config: Any, where: str, say: Say) -> None:
    """Compilation and checkpointing, which do not reach the single velocity evaluations here.

    Before the host is built: it compiles its methods then.
    """
    on = [name for name in FOR_LONG_TRAINING if getattr(config, name, False)]
    for name in on:
        setattr(config, name, False)
    if on:
        say(
            f"{where}: {' and '.join(on)} {'is' if len(on) == 1 else 'are'} true in its config; "
            "off for this training, and in what it saves"
        )


def reconcile(config: Any, processors: Processors, where: str, say: Say) -> None:
    """Holds the config against the processors' statistics, which are of what was trained on.

    Raises:
        UserError: they contradict each other in what the host computes.
    """
    if processors.relative:
        raise UserError(f"{where}: a step of its processors is for relative actions; {RELATIVE}")
    _believe_state(config, processors, where, say)
    _check_action(config, processors, where)
    flat = processors.flat_names()
    if flat:
        say(
            f"{where}: {', '.join(flat)} never moved in the policy's training data (its statistics "
            "have no spread there): normalised as LeRobot does it, without limits, not judged"
        )


def _believe_state(config: Any, processors: Processors, where: str, say: Say) -> None:
    """`lerobot-train --policy.path` keeps the base's shape beside the new dataset's statistics."""
    feature, width = config.robot_state_feature, processors.width(OBS_STATE)
    if feature is None or width is None or tuple(feature.shape) == (width,):
        return
    said, room = tuple(feature.shape), getattr(config, "max_state_dim", None)
    if room is None or width > room:
        right = "both must agree" if room is None else f"max_state_dim is {room}"
        raise UserError(
            f"{where}: {OBS_STATE} has shape {said} in config.json, its statistics have {width} "
            f"numbers; {right}"
        )
    config.input_features[OBS_STATE] = replace(feature, shape=(width,))
    processors.correct_width(OBS_STATE)
    say(
        f"{where}: {OBS_STATE} has shape {said} in config.json, its statistics have {width} "
        "numbers; the statistics are believed"
    )


def _check_action(config: Any, processors: Processors, where: str) -> None:
    """The host cuts its actions at the config's shape and puts them back by the statistics."""
    said = tuple(config.action_feature.shape)
    for kind, width in (
        ("preprocessor", processors.width(ACTION)),
        ("postprocessor", processors.action_width),
    ):
        if width is not None and said != (width,):
            raise UserError(
                f"{where}: {ACTION} has shape {said} in config.json, the statistics of its {kind} "
                f"have {width} numbers; LeRobot cuts actions at the former and scales them by the "
                "latter, so they must agree"
            )
