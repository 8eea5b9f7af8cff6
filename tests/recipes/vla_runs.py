"""Whole runs of the recipes for LeRobot's policies on the toy task with images; fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from toy_images import (
    MAX_STEPS,
    SIZE,
    ImageToyPool,
    image_family,
    images_state,
    write_toy_dataset,
    write_toy_policy,
)
from toy_task import Killed
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
from vla_trqam.recipes import finetune_pi0, finetune_smolvla

from vla_trqam.data.episode import Episode
from vla_trqam.data.sources.lerobot import several
from vla_trqam.data.sources.lerobot.source import LeRobotReader
from vla_trqam.engine import finetune as engine
from vla_trqam.engine.run import Run
from vla_trqam.jobs import vla

PI0, SMOLVLA = (Path(str(recipe.__file__)) for recipe in (finetune_pi0, finetune_smolvla))
TINY = [
    "--peft.method=lora",
    "--policy.merged=false",
    "--peft.r=2",
    "--batch_size=4",
    "--save_freq=2",
    "--log_freq=1",
    "--evaluate_every=2",
    "--num_threads=1",
    "--steps=3",
    "--base_episodes=2",
    "--critic.warmup_steps=3",
    "--critic.updates_per_step=2",
    "--critic.batch_size=4",
    "--critic.next_actions=2",
    "--critic.hidden_dims=[8]",
    "--critic.ensemble_size=2",
    "--online.steps=4",
    "--online.episodes_per_round=2",
    "--online.updates_per_round=2",
    "--env.type=robomimic",
    f"--env.image_size={SIZE}",
    "--eval.episodes=4",
    f"--eval.max_episode_steps={MAX_STEPS}",
    "--eval.episodes_during_training=2",
    "--eval.num_workers=1",
    "--eval.videos=0",
    "--policy.tuned_flow_steps=null",
]


WITHOUT_NEXT_ACTIONS = {"--method.type=ifql", "--method.type=best_of_n"}
"""Methods that refuse a flag of TINY which would do nothing."""


@dataclass
class Files:
    """What runs are given.

    Attributes:
        policy: folder of a tiny π0.
        dataset: folder of a LeRobotDataset.
    """

    policy: Path
    dataset: Path

    def flags(self) -> list[str]:
        data = ["--dataset.repo_id=local/toy", f"--dataset.root={self.dataset}"]
        return [f"--policy.path={self.policy}", *data, *TINY]


@dataclass
class Whole:
    """A run: what it left, and what it had in memory.

    Attributes:
        folder: the run's.
        state: see `images_state`.
        policy: as it was at the end.
        rounds: of episodes, see `ImageToyPool`.
    """

    folder: Path
    state: dict[str, Any]
    policy: LeRobotFlowPolicy
    rounds: list[list[Episode]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("toy")
    return Files(
        policy=write_toy_policy(folder / "policy"),
        dataset=write_toy_dataset(folder / "dataset", folder / "scratch"),
    )


@pytest.fixture(scope="module", autouse=True)
def without_simulator() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "RolloutPool", ImageToyPool)
        patch.setattr(vla, "make_family", image_family)
        # Opening a dataset takes longer than these runs, and a reader does not change.
        patch.setattr(several, "LeRobotReader", cache(LeRobotReader))
        yield


@pytest.fixture(autouse=True)
def forgetful_pool() -> Iterator[None]:
    ImageToyPool.forget()
    yield
    ImageToyPool.forget()


@pytest.fixture
def no_conclusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "conclude", lambda *_, **__: None)


@pytest.fixture(scope="module")
def whole(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole_run(tmp_path_factory.mktemp("whole") / "run", files.flags())


@pytest.fixture(scope="module")
def full(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("full") / "run"
    return whole_run(folder, [*files.flags(), "--peft.method=full"], concluded=False)


@pytest.fixture
def tiny(files: Files) -> Callable[..., int]:
    """Runs the recipe with tiny settings; later flags win."""

    def run(folder: Path, *flags: str) -> int:
        own = files.flags()
        if WITHOUT_NEXT_ACTIONS & set(flags):
            own = [flag for flag in own if not flag.startswith("--critic.next_actions")]
        return main(*own, f"--output_dir={folder}", *flags)

    return run


def main(*arguments: str, recipe: Path = PI0) -> int:
    return vla.main(recipe, None, arguments)


def resume(folder: Path) -> int:
    return main("--resume=true", f"--output_dir={folder}")


def whole_run(
    folder: Path, flags: list[str], recipe: Path = PI0, *, concluded: bool = True
) -> Whole:
    """A run, and what it had in memory at its end."""
    runs: list[Run] = []
    conclude = engine.conclude

    def remember(run: Run, *arguments: Any, **settings: Any) -> None:
        runs.append(run)
        if concluded:
            conclude(run, *arguments, **settings)

    ImageToyPool.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "conclude", remember)
        assert main(*flags, f"--output_dir={folder}", recipe=recipe) == 0
    policy = runs[0].policy
    assert isinstance(policy, LeRobotFlowPolicy)
    return Whole(folder, images_state(folder), policy, list(ImageToyPool.rounds))


def without_conclusion(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "evaluation"}


@contextmanager
def killed(prepare: Callable[[pytest.MonkeyPatch], None]) -> Iterator[None]:
    """What is inside must end by a kill that ``prepare`` arranges."""
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        with pytest.raises(Killed):
            yield
    ImageToyPool.before_run = None
