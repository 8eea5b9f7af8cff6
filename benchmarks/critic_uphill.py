"""Is the critic's action gradient uphill in the simulator?

    python benchmarks/critic_uphill.py outputs/lift_s0 --states 50 --step 0.1 0.2

At states met by the run's base policy on fresh seeds: the Monte-Carlo return after the base's
chunk, after the chunk moved along +grad Q, along -grad Q, and along a random direction of the same
norm, each followed by the same policy under the same noise. Q and its gradient are the target
ensemble's mean, which is what the adjoint starts from. Writes `<output>.json` (every number) and
`<output>.png`, RUN/critic_uphill unless given, and prints the table. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from run_results.finished_run import shareable_command
from run_results.result_page import write_compact_json
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm
from uphill.probe import (
    ARMS,
    Continuation,
    Decision,
    Env,
    Gradient,
    Outcome,
    arms_of,
    executed_move,
    follow,
    meet_decision,
)
from uphill.report import StepResult, describe, draw, to_json
from vla_trqam.adapters.mlp import MLPFlowPolicy

from vla_trqam.config.parsing import saved_config
from vla_trqam.config.settings import TRAINING_SEED
from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.critic import Critic, CriticEnsemble
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.data.sources.robomimic.hdf5 import read_robomimic
from vla_trqam.engine.acting import chunk_policy
from vla_trqam.engine.folder.checkpoints import ALGORITHM, CHECKPOINTS, LAST, PRETRAINED
from vla_trqam.engine.folder.run_folder import BASE_NAME, CONFIG_NAME
from vla_trqam.envs.chunked import ChunkEnv
from vla_trqam.envs.robomimic.env import RobomimicEnv
from vla_trqam.errors import UserError
from vla_trqam.jobs.robomimic_data import dataset_path
from vla_trqam.methods.base import FlowActor
from vla_trqam.report.provenance import command_line, git_commit, package_versions

# Above the seeds of the evaluations, below those of training.
FIRST_SEED = 900_000
# Training uses 1 (rollouts) and 2 (evaluations).
NOISE_SEED = 3


@dataclass(frozen=True, eq=False)
class Subject:
    """What is examined: policies and critic of a run, and its settings."""

    config: FinetuneRobomimicConfig
    base: MLPFlowPolicy
    tuned: MLPFlowPolicy
    critic: Critic

    def gradient_of(self, observations: np.ndarray, chunks: np.ndarray) -> tuple[Any, Any]:
        """See `uphill.probe.Gradient`."""
        features = self.base.features(self.base.encode(torch.from_numpy(observations)))
        action = torch.from_numpy(chunks.astype(np.float32))
        gradient, value = self.critic.action_gradient(features, action)
        return gradient.numpy().astype(np.float64), value.numpy().astype(np.float64)


def load_subject(run: Path, checkpoint: str = LAST) -> Subject:
    """Reads settings, base, and a checkpoint's policy and critic.

    Raises:
        UserError: the folder is not a run, or the checkpoint has no critic that fits.
    """
    config = saved_config(FinetuneRobomimicConfig, run / CONFIG_NAME)
    folder = run / CHECKPOINTS / checkpoint
    tuned = MLPFlowPolicy.from_pretrained(folder / PRETRAINED)
    base = MLPFlowPolicy.from_pretrained(run / BASE_NAME)
    critic = _load_critic(config, tuned, folder / ALGORITHM / "networks.safetensors")
    return Subject(config, base, tuned, critic)


def _load_critic(config: FinetuneRobomimicConfig, policy: MLPFlowPolicy, path: Path) -> Critic:
    knobs = config.critic
    ensemble = CriticEnsemble(
        policy.feature_dim,
        int(np.prod(policy.chunk_shape)),
        knobs.hidden_dims,
        knobs.ensemble_size,
        layer_norm=knobs.layer_norm,
    )
    critic = Critic(ensemble, clip_actions=knobs.clip_actions)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    mine = {k.removeprefix("critic."): v for k, v in tensors.items() if k.startswith("critic.")}
    if not mine:
        raise UserError(f"{path} has no critic: it is a checkpoint of the pretraining")
    try:
        critic.load_state_dict(mine)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the run's settings: {error}") from None
    return critic


def make_env(subject: Subject, horizon: int) -> ChunkEnv:
    """The run's task; it truncates after the run's limit and the horizon."""
    config = subject.config
    file = read_robomimic(dataset_path(config.dataset))
    env = RobomimicEnv(
        file.env_args,
        max_episode_steps=config.eval.max_episode_steps + horizon,
        obs_keys=config.dataset.obs_keys,
    )
    return ChunkEnv(env, subject.base.chunk_shape[0])


def examine(
    env: Env,
    decisions: Sequence[Decision],
    gradient_of: Gradient,
    steps: Sequence[float],
    after: Continuation,
    seed: int = 0,
) -> list[StepResult]:
    """Runs every arm from every decision.

    Args:
        env: a `ChunkEnv`.
        decisions: where, one an episode.
        gradient_of: the critic's.
        steps: sizes of the moves.
        after: what follows the chunks.
        seed: of the random directions.
    """
    chunks = np.stack([decision.chunk for decision in decisions])
    observations = np.stack([decision.observation for decision in decisions])
    base = _follow_all(env, decisions, chunks, after, "base")
    q_base = gradient_of(observations, chunks)[1]
    results = []
    for step in steps:
        moved = arms_of(decisions, gradient_of, step, np.random.default_rng(seed))
        outcomes = {
            arm: _follow_all(env, decisions, moved[arm], after, f"{arm} {step:g}") for arm in ARMS
        }
        results.append(
            StepResult(
                step=step,
                outcomes={"base": base} | outcomes,
                q={"base": q_base}
                | {arm: gradient_of(observations, moved[arm])[1] for arm in ARMS},
                executed={arm: executed_move(moved[arm], chunks) for arm in ARMS},
            )
        )
    return results


def _follow_all(
    env: Env, decisions: Sequence[Decision], chunks: np.ndarray, after: Continuation, name: str
) -> list[Outcome]:
    pairs = tqdm(list(zip(decisions, chunks, strict=True)), desc=name, leave=False, disable=None)
    return [follow(env, decision, chunk, after) for decision, chunk in pairs]


def run_command(
    run: Path,
    output: Path,
    *,
    states: int,
    steps: Sequence[float],
    follower: Literal["tuned", "base"],
    horizon: int | None,
    checkpoint: str,
) -> str:
    """Examines a run, writes JSON and figure, and returns the table."""
    subject = load_subject(run, checkpoint)
    config = subject.config
    limit = config.eval.max_episode_steps
    horizon = limit if horizon is None else horizon
    env = make_env(subject, horizon)
    act = chunk_policy(subject.base, FlowActor(subject.base), NOISE_SEED)
    rng = np.random.default_rng(0)
    seeds = tqdm(range(FIRST_SEED, FIRST_SEED + states), desc="states", leave=False, disable=None)
    decisions = [meet_decision(env, act, seed, limit, rng) for seed in seeds]
    after = Continuation(
        act
        if follower == "base"
        else chunk_policy(subject.tuned, FlowActor(subject.tuned), NOISE_SEED),
        horizon,
        config.discount,
        RewardSpec(config.dataset.reward),
    )
    results = examine(env, decisions, subject.gradient_of, steps, after)
    env.close()
    about = {
        "run": run.resolve().name,
        "checkpoint": (run / CHECKPOINTS / checkpoint).resolve().name,
        "follower": follower,
        "horizon": horizon,
        "discount": config.discount,
        "command": shareable_command(command_line()),
        "commit": git_commit(),
        "versions": package_versions(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    title = f"Is the critic's gradient uphill? {about['run']}, followed by the {follower} policy"
    draw(results, output.with_name(f"{output.name}.png"), title)
    path = output.with_name(f"{output.name}.json")
    write_compact_json(path, to_json(decisions, results, about))
    return f"{describe(results, follower)}\n\nnumbers: {path}"


def _check(options: argparse.Namespace) -> None:
    most = TRAINING_SEED - FIRST_SEED
    if not 2 <= options.states <= most:
        raise UserError(f"--states {options.states}: it must lie between 2 and {most}")
    wrong = [step for step in options.step if not 0.0 < step < float("inf")]
    if wrong:
        raise UserError(f"--step {wrong[0]:g}: the size of a move must be positive")
    if len(set(options.step)) < len(options.step):
        raise UserError("--step has one size twice")
    if options.horizon is not None and options.horizon < 1:
        raise UserError(f"--horizon {options.horizon}: it must be at least 1 control step")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--states", type=int, default=50, help="decisions, one an episode")
    parser.add_argument("--step", type=float, nargs="+", default=[0.1, 0.2], help="RMS of the move")
    parser.add_argument("--follow", choices=("tuned", "base"), default="tuned", help="who goes on")
    parser.add_argument("--horizon", type=int, help="control steps that count after the decision")
    parser.add_argument("--checkpoint", default=LAST, help="its folder's name")
    parser.add_argument("--output", type=Path, help="files to write, without ending")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)  # one state at a time: threads would only wait for each other
    try:
        _check(options)
        text = run_command(
            options.run,
            options.output or options.run / "critic_uphill",
            states=options.states,
            steps=options.step,
            follower=options.follow,
            horizon=options.horizon,
            checkpoint=options.checkpoint,
        )
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
