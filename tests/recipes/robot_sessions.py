"""Sessions at a simulated robot, recorded by LeRobot's own ``lerobot-rollout``."""

import json
import sys
from pathlib import Path

import pytest
import torch
from sim_point_robot import Corrector, Person, SimPoint
from toy_images import MAX_STEPS, TASK

FPS = 100


def record_episodes(
    policy: Path, root: Path, first_seed: int, count: int, patch: pytest.MonkeyPatch
) -> list[bool]:
    """Episodes of the policy; which of them were solved, as labels too."""
    from lerobot.rollout.strategies import episodic

    person = Person(MAX_STEPS, first_seed)
    patch.setattr(SimPoint, "person", person)
    patch.setattr(episodic, "init_keyboard_listener", lambda: (None, person.events))
    patch.setattr(episodic, "log_say", person.hears)
    strategy = ["--strategy.type=episodic", "--strategy.reset_to_initial_position=false"]
    _roll_out(policy, root, count, [*strategy, "--dataset.reset_time_s=0"], first_seed, patch)
    assert len(person.solved) == count
    return _labelled(root, person.solved)


def record_corrections(
    policy: Path, root: Path, first_seed: int, count: int, patch: pytest.MonkeyPatch
) -> list[bool]:
    """What a person did when taking over, an episode each; all of them end solved."""
    from lerobot.rollout.strategies import dagger

    person = Corrector(alone=2, seed=first_seed)
    patch.setattr(SimPoint, "person", person)
    patch.setattr(dagger, "_init_dagger_keyboard", person.listens)
    strategy = ["--strategy.type=dagger", "--strategy.smooth_handover=false"]
    _roll_out(policy, root, count, [*strategy, "--teleop.type=sim_leader"], first_seed, patch)
    assert person.corrections == count
    return _labelled(root, [True] * count)


def labels_of(root: Path) -> Path:
    """A list of true and false, an entry an episode."""
    return root.with_suffix(".json")


def _roll_out(
    policy: Path, root: Path, count: int, own: list[str], seed: int, patch: pytest.MonkeyPatch
) -> None:
    from lerobot.scripts.lerobot_rollout import rollout

    flags = [
        *(f"--policy.path={policy}", "--robot.type=sim_point", f"--fps={FPS}", *own),
        *(f"--dataset.repo_id=me/rollout_{root.name}", f"--dataset.root={root}"),
        *(f"--dataset.fps={FPS}", f"--dataset.num_episodes={count}", "--dataset.no_stamp=true"),
        *("--dataset.video=false", "--dataset.push_to_hub=false", f"--dataset.single_task={TASK}"),
        "--play_sounds=false",
    ]
    patch.setattr(sys, "argv", ["lerobot-rollout", *flags])
    torch.manual_seed(seed)  # of the host's noise
    rollout()


def _labelled(root: Path, solved: list[bool]) -> list[bool]:
    labels_of(root).write_text(json.dumps(solved))
    return solved
