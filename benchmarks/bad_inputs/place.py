"""What a row of the table of malformed input is, and the sound files that rows make copies of."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import h5py
import numpy as np

import vla_trqam.data
from vla_trqam.data.episode import Episode
from vla_trqam.data.replay import Replay
from vla_trqam.data.sources.lerobot.writer import write_lerobot_dataset
from vla_trqam.envs.robomimic.env_meta import env_meta_for

RecipeName = Literal[
    "compare",
    "finetune_robomimic",
    "finetune_ogbench",
    "finetune_pi0",
    "hub",
    "make_metaworld_data",
    "make_ogbench_data",
    "make_robomimic_data",
    "make_tiny_vla",
    "sweep_kl",
]
PACKED = Path(vla_trqam.data.__file__).with_name("lift_pi0")
POLICY, DATASET = PACKED / "policy", PACKED / "dataset"
PICTURE, LONG_ENOUGH = (32, 32, 3), 9
NUM_DEMOS, NUM_STEPS, OBJECT_DIM, ACTION_DIM = 4, 6, 3, 2
ROBOMIMIC = (
    "--dataset.obs_keys=[object]",
    "--batch_size=4",
    "--save_freq=2",
    "--log_freq=1",
    "--evaluate_every=0",
    "--num_threads=1",
    "--critic.hidden_dims=[8]",
    "--critic.ensemble_size=2",
    "--critic.warmup_steps=2",
    "--steps=2",
    "--base_episodes=0",
    "--online.steps=0",
    "--eval.episodes=2",
    "--eval.max_episode_steps=10",
    "--eval.num_workers=1",
    "--eval.videos=0",
)
NEW_POLICY = (
    "--policy.hidden_dims=[8]",
    "--policy.chunk_length=2",
    "--policy.num_flow_steps=3",
    "--pretrain.steps=2",
    "--pretrain.batch_size=4",
    "--pretrain.filter_key=null",
    "--pretrain.num_demos=null",
)
PI0 = (
    "--dataset.repo_id=local/x",
    "--dataset.episodes=[0,1]",
    "--env.type=null",
    "--num_threads=1",
    "--peft.r=2",
    "--steps=2",
    "--save_freq=1",
    "--batch_size=4",
    "--critic.batch_size=4",
    "--critic.warmup_steps=2",
    "--critic.updates_per_step=1",
    "--critic.hidden_dims=[8,8]",
    "--critic.ensemble_size=2",
    "--critic.next_actions=2",
)


# By these names recipes start simulators.
SIMULATORS = ("RolloutPool", "render_demos", "collect")


@dataclass(frozen=True)
class Command:
    """A recipe and its command line."""

    recipe: RecipeName
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One piece of malformed input.

    Attributes:
        area: of the table.
        wrong: what is wrong, in a few words.
        spoil: makes the malformed input in a folder of its own and returns the command that is
            given it.
        words: that the sentence must hold; ``<policy>`` and the like stand for the files' paths.
    """

    area: str
    wrong: str
    spoil: Callable[[Place], Command]
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """For the list of tests."""
        return f"{self.area}: {self.wrong}"


class Originals:
    """The sound files, each made when the first row asks for it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    @cached_property
    def hdf5(self) -> Path:
        """A small robomimic file: four demos, of which every other one succeeds."""
        path = self.root / "demos.hdf5"
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            data.attrs["env_args"] = json.dumps(env_meta_for("Lift"))
            for number in range(NUM_DEMOS):
                _add_demo(data.create_group(f"demo_{number}"), number)
            file["mask/worse"] = np.array(["demo_0", "demo_1"], dtype="S")
        return path

    @cached_property
    def run(self) -> Path:
        """A run of the Robomimic recipe without simulator and report."""
        from vla_trqam.recipes import finetune_robomimic

        from vla_trqam.engine import finetune as engine

        folder = self.root / "robomimic_run"
        flags = (*ROBOMIMIC, *NEW_POLICY, f"--dataset.path={self.hdf5}", f"--output_dir={folder}")
        with patch.object(engine, "conclude", lambda *_, **__: None):
            _ended_well(finetune_robomimic.main(flags))
        return folder

    @cached_property
    def vla_run(self) -> Path:
        """A run of the packed tiny policy on two of the packed episodes: adapters and a critic."""
        from vla_trqam.recipes import finetune_pi0

        from vla_trqam.jobs import vla

        folder = self.root / "vla_run"
        flags = (f"--policy.path={POLICY}", f"--dataset.root={DATASET}", *PI0)
        recipe = Path(str(finetune_pi0.__file__))
        _ended_well(vla.main(recipe, PACKED, [*flags, f"--output_dir={folder}"]))
        return folder

    @cached_property
    def image_dataset(self) -> Path:
        """Two episodes of random numbers and pictures, for the packed policy."""
        generator = np.random.default_rng(0)
        replay = Replay.create(
            self.root / "replay",
            observation_dim=9,
            action_dim=7,
            cameras={"agentview": PICTURE},
            capacity=2 * LONG_ENOUGH,
        )
        for success in (True, False):
            replay.add(_random_episode(generator, success), source="demonstrations")
        write_lerobot_dataset(replay, self.root / "images", repo_id="local/x", fps=20)
        replay.close()
        return self.root / "images"


class Place:
    """A row's own folder, with copies to spoil; the command's working directory too."""

    def __init__(self, root: Path, originals: Originals) -> None:
        self.root, self.originals = root.resolve(), originals

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def hdf5(self, change: Callable[[h5py.File], object] | None = None) -> Path:
        """A copy of the robomimic file, changed."""
        path = Path(shutil.copyfile(self.originals.hdf5, self / "file.hdf5"))
        if change is not None:
            with h5py.File(path, "r+") as file:
                change(file)
        return path

    def policy(self) -> Path:
        """A copy of the packed policy."""
        return _copied(POLICY, self / "policy")

    def dataset(self) -> Path:
        """A copy of the packed dataset; unlink a file before writing to it."""
        return _copied(DATASET, self / "dataset")

    def run(self) -> Path:
        """A copy of the Robomimic recipe's run."""
        return _copied(self.originals.run, self / "run")

    def vla_run(self) -> Path:
        """A copy of the tiny policy's run."""
        return _copied(self.originals.vla_run, self / "run")

    def adapter(self) -> Path:
        """A copy of the LoRA checkpoint of that run."""
        last = self.originals.vla_run / "checkpoints" / "last"
        return _copied(last.resolve() / "pretrained_model", self / "policy")

    def image_dataset(self) -> Path:
        """A copy of a small dataset with embedded pictures."""
        return _copied(self.originals.image_dataset, self / "dataset")

    def critic(self) -> Path:
        """A copy of the whole checkpoint."""
        last = self.originals.vla_run / "checkpoints" / "last"
        return _copied(last.resolve(), self / "critic")

    def write(self, name: str, content: str | bytes) -> Path:
        """A file of this content."""
        path = self / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


def robomimic(place: Place, *flags: str, policy: Sequence[str] = NEW_POLICY) -> Command:
    """The Robomimic recipe with tiny settings; later flags win."""
    base = (*ROBOMIMIC, *policy, f"--output_dir={place / 'run'}")
    if not any(flag.startswith(("--dataset.path", "--dataset.name")) for flag in flags):
        base = (*base, f"--dataset.path={place.originals.hdf5}")
    return Command("finetune_robomimic", (*base, *flags))


def pi0(place: Place, *flags: str) -> Command:
    """The recipe for π0 on the packed policy and two of the packed episodes; later flags win."""
    base = (f"--policy.path={POLICY}", f"--dataset.root={DATASET}", *PI0)
    return Command("finetune_pi0", (*base, f"--output_dir={place / 'run'}", *flags))


def resumed(place: Place, recipe: RecipeName, *flags: str) -> Command:
    """The command that goes on with the run."""
    return Command(recipe, ("--resume=true", f"--output_dir={place / 'run'}", *flags))


def hub(*arguments: str) -> Command:
    """recipes/hub.py."""
    return Command("hub", arguments)


def edit_json(path: Path, change: Callable[[Any], object]) -> Path:
    """Changes what a JSON file holds; one that the file is a link to stays as it was."""
    content = json.loads(path.read_text())
    change(content)
    return replace(path, json.dumps(content))


def replace(path: Path, content: str | bytes) -> Path:
    """Writes a file anew; one that it is a link to stays as it was."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def cut(path: Path, share: float = 0.5) -> Path:
    """Leaves this share of a file."""
    content = path.read_bytes()
    return replace(path, content[: int(share * len(content))])


def run_main(command: Command) -> int:
    """The recipe's ``main`` in this process, with no Hub, no token and no simulator to reach."""
    from vla_trqam.engine import finetune as engine

    module = importlib.import_module(f"vla_trqam.recipes.{command.recipe}")
    arguments = list(command.arguments)
    if command.recipe == "finetune_pi0":
        main = partial(module.main, Path(str(module.__file__)), PACKED)
        module = importlib.import_module("vla_trqam.jobs.vla")
    else:
        main = module.main
    idle = _IdlePool if "--resume=true" in arguments else _no_simulator
    with ExitStack() as stack:
        # Runs on states have their simulators in the engine.
        for place in (module, engine):
            for name in SIMULATORS:
                if hasattr(place, name):
                    stack.enter_context(patch.object(place, name, idle))
        stack.enter_context(patch("huggingface_hub.constants.HF_HUB_OFFLINE", True))
        stack.enter_context(patch("vla_trqam.hub.access.get_token", lambda: None))
        status: int = main(arguments)
        return status


class SimulatorStartedError(Exception):
    """Input that should have been refused came as far as a simulator."""


def _no_simulator(*_: object, **__: object) -> None:
    raise SimulatorStartedError("a simulator was started")


class _IdlePool:
    """Of a resumed run, whose checkpoint is read last; no episode may be asked of it."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __getattr__(self, name: str) -> object:
        raise SimulatorStartedError(f"{name} was asked of a simulator")

    def __enter__(self) -> _IdlePool:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _copied(source: Path, target: Path) -> Path:
    """Hard links where the file system can: a video is some megabytes."""
    shutil.copytree(source, target, symlinks=True, copy_function=_linked)
    return target


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _add_demo(demo: h5py.Group, number: int) -> None:
    generator = np.random.default_rng(number)
    states = generator.normal(size=(NUM_STEPS + 1, OBJECT_DIM)).astype(np.float32)
    demo.attrs["num_samples"] = NUM_STEPS
    demo["actions"] = generator.uniform(-1, 1, (NUM_STEPS, ACTION_DIM)).astype(np.float32)
    demo["rewards"] = np.zeros(NUM_STEPS, np.float32)
    demo["rewards"][-1] = float(number % 2 == 0)
    demo["obs/object"], demo["next_obs/object"] = states[:-1], states[1:]


def _random_episode(generator: np.random.Generator, success: bool) -> Episode:
    rewards = np.zeros(LONG_ENOUGH, np.float32)
    rewards[-1] = success
    return Episode(
        observations=generator.normal(size=(LONG_ENOUGH + 1, 9)).astype(np.float32),
        images={
            "agentview": generator.integers(0, 256, (LONG_ENOUGH + 1, *PICTURE), dtype=np.uint8)
        },
        observed=np.ones(LONG_ENOUGH + 1, bool),
        actions=generator.uniform(-1, 1, (LONG_ENOUGH, 7)).astype(np.float32),
        rewards=rewards,
        terminated=success,
        truncated=not success,
        success=success,
        task="lift the cube",
    )


def _ended_well(status: int) -> None:
    if status:
        raise RuntimeError(f"a run on sound files ended with {status}")
