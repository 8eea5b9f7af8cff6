"""The run: phases of updates with rollouts, evaluations, metrics and checkpoints between them."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vla_trqam.config.settings import OnDivergence
from vla_trqam.data.episode import Episode
from vla_trqam.data.sampling import ChunkSampler, MixedSampler
from vla_trqam.engine.alarms import Alarms
from vla_trqam.engine.divergence import not_finite, smaller_factor
from vla_trqam.engine.folder.checkpoints import (
    Position,
    check_whole,
    forget_checkpoints,
    last_checkpoint,
    load_checkpoint,
    read_position,
    save_checkpoint,
)
from vla_trqam.engine.playing import ROLLOUT_NOISE, Playing, success_rate
from vla_trqam.engine.processes.generators import Generators
from vla_trqam.engine.processes.interruption import Interrupted, InterruptGuard
from vla_trqam.errors import DivergenceError, UserError
from vla_trqam.methods.base import Method
from vla_trqam.report.metrics import MetricsLog
from vla_trqam.report.progress import TrainingProgress

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class Phase:
    """A stretch of updates.

    Attributes:
        name: "pretrain", "critic", "offline" or "online".
        num_steps: updates.
        make_method: called when the phase begins, with the policy as the last phase left it.
        sampler: where batches come from.
        batch_size: chunks a batch, of all processes.
        base_episodes: seeds of the episodes that the policy as it came rolls out before the first
            update, whatever acts in the method; they join the replay.
        episodes_before: seeds of the episodes to roll out before an update, given the updates done
            in the phase; they join the replay, each that of the process that rolled it out.
        evaluate_every: updates between evaluations, 0 for none.
        finish: called when the phase is over.
        moves_policy: whether its updates count as the run's: those that move the tuned field away
            from its base.
        renew: called where the run goes back to before this phase: it makes the next method new.
        turn_data: called before every update, with the updates done in the phase: of data that is
            not all there at once it brings what is drawn from next.
    """

    name: str
    num_steps: int
    make_method: Callable[[], Method]
    sampler: ChunkSampler[Any] | MixedSampler[Any]
    batch_size: int
    base_episodes: Sequence[int] = ()
    episodes_before: Callable[[int], Sequence[int]] = lambda _: ()
    evaluate_every: int = 0
    finish: Callable[[Method], None] = lambda _: None
    moves_policy: bool = True
    renew: Callable[[], None] = lambda: None
    turn_data: Callable[[int], None] = lambda _: None


@dataclass(kw_only=True)
class Run(Playing):
    """What all phases share, and what a checkpoint holds of it.

    Attributes:
        output_dir: the run's folder.
        generators: the run's randomness.
        metrics: the log, which the main process writes; None on the others.
        evaluation_seeds: initial states of the evaluations during training.
        log_freq: updates between lines of the log.
        save_freq: updates between checkpoints.
        device: where batches go.
        save_policy: writes the policy's part of a checkpoint into a folder.
        alarms: told as they begin, and logged.
        on_divergence: what becomes of a run with numbers that are not finite.
        valued: flags by which the critic's numbers mean something.
        step_factor: what the methods' step sizes are multiplied by, after rollbacks.
        step_sizes: the share of its step sizes with which an update is made, by the updates that
            moved the policy before it; None for all of them.
    """

    output_dir: Path
    generators: Generators
    metrics: MetricsLog | None
    evaluation_seeds: Sequence[int]
    log_freq: int
    save_freq: int
    device: torch.device
    save_policy: Callable[[Path], None]
    alarms: Alarms = field(default_factory=Alarms)
    on_divergence: OnDivergence = "stop"
    valued: Mapping[str, Any] = field(default_factory=dict)
    step_factor: float = 1.0
    step_sizes: Callable[[int], float] | None = None
    step: int = 0
    wall_clock: dict[str, float] = field(default_factory=dict)

    def train(self, phases: Sequence[Phase], guard: InterruptGuard) -> Method:
        """Runs the phases, from the last checkpoint where there is one; returns the last method.

        Raises:
            Interrupted: the guard was asked to stop; everything up to here is saved.
            UserError: the checkpoint is damaged, or of another run.
            DivergenceError: a number is not finite, and there is no rollback.
        """
        while True:
            try:
                return self._train(phases, guard)
            except DivergenceError as error:
                if self.on_divergence == "stop":
                    raise
                self._roll_back(error, phases)

    def _train(self, phases: Sequence[Phase], guard: InterruptGuard) -> Method:
        checkpoint = last_checkpoint(self.output_dir)
        if self.metrics is not None:
            self.alarms.restart(self.metrics.records())
        position = None if checkpoint is None else read_position(checkpoint)
        names = [phase.name for phase in phases]
        if position is not None and position.phase not in names:
            raise UserError(
                f"{checkpoint} is of the phase {position.phase!r}; "
                f"this run has {', '.join(names)} only"
            )
        begin = 0 if position is None else names.index(position.phase)
        method: Method | None = None
        for phase in phases[begin:]:
            method = phase.make_method()
            start = 0
            if checkpoint is not None and position is not None and phase.name == position.phase:
                self._load(checkpoint, method)
                start, self.step, self.wall_clock = (
                    position.phase_step,
                    position.step,
                    dict(position.wall_clock),
                )
            method.step_factor = self.step_factor
            self._train_phase(phase, method, start, guard)
        assert method is not None, "a run has at least one phase"
        return method

    def _load(self, checkpoint: Path, method: Method) -> None:
        rank = self.team.rank
        # Where weights are in parts, all load together or none does.
        self.team.on_main(lambda: check_whole(checkpoint))
        self.team.together(lambda: load_checkpoint(checkpoint, method, self.generators, rank))
        # A checkpoint from before a rollback has the larger one.
        self.step_factor = min(self.step_factor, method.step_factor)

    def _roll_back(self, error: DivergenceError, phases: Sequence[Phase]) -> None:
        """Replay and log as at the last checkpoint, for the next :meth:`_train` to go on from.

        Raises:
            DivergenceError: there is none, or it has been done too often.
        """
        checkpoint = self.team.together(lambda: last_checkpoint(self.output_dir))
        if checkpoint is None:
            raise error
        self.step_factor = smaller_factor(self.step_factor, error)
        position = read_position(checkpoint)
        kept = position.replay_episodes[self.team.rank]
        self.team.together(lambda: self.store.truncate_to(kept))
        if self.metrics is not None:
            self.metrics.cut_back(position.metrics_lines)
        names = [phase.name for phase in phases]
        for phase in phases[names.index(position.phase) + 1 :]:
            phase.renew()
        if self.team.is_main:
            sentence = f"{error}: back to {checkpoint}, with {self.step_factor:g} of the step sizes"
            print(sentence, file=sys.stderr, flush=True)

    def _train_phase(self, phase: Phase, method: Method, start: int, guard: InterruptGuard) -> None:
        with self._progress(phase, start) as progress:
            if phase.moves_policy and self.step == 0:
                # Of the policy as it came, whatever is to act.
                self._evaluate(phase, method, 0, progress)
            phase.turn_data(min(start, phase.num_steps - 1))
            for done in range(start, phase.num_steps):
                phase.turn_data(done)
                self._collect(phase, method, done, progress)
                with self.timed(phase.name), _named(f"{phase.name} update {done + 1}"):
                    rows = self.team.batch_share(phase.batch_size)
                    batch = phase.sampler.sample(rows, self.generators.replay)
                    batch = batch.to(self.device)
                    batch = replace(batch, action=self.policy.from_robot(batch.action))
                    with self._falling(phase, method):
                        method.update(batch, self.generators.noise)
                self.step += phase.moves_policy
                self._log(phase, method, done + 1, progress)
                self._evaluate(phase, method, done + 1, progress)
                whole = done + 1 == phase.num_steps
                stop = self.team.any(guard.requested)
                if whole or stop or (done + 1) % self.save_freq == 0:
                    self._save(phase, method, done + 1)
                if stop:
                    raise Interrupted(f"{phase.name} update {done + 1} of {phase.num_steps}")
        phase.finish(method)
        if self.team.any(guard.requested):
            raise Interrupted(f"the end of {phase.name}")

    @contextmanager
    def _falling(self, phase: Phase, method: Method) -> Iterator[None]:
        """A share of the step sizes, for this update: what is saved are those that they fall from.

        A critic that learns alone takes whole steps.
        """
        if self.step_sizes is None or not phase.moves_policy:
            yield
            return
        method.step_factor = self.step_factor * self.step_sizes(self.step)
        try:
            yield
        finally:
            method.step_factor = self.step_factor

    def _collect(self, phase: Phase, method: Method, done: int, progress: TrainingProgress) -> None:
        if phase.base_episodes and not done:
            seeds = phase.base_episodes
            self._join(phase, method, lambda: self.base_episodes(seeds), done, progress)
        later = phase.episodes_before(done)
        if later:

            def play() -> list[Episode]:
                return self.roll_out(self.chunks(method.actor(), ROLLOUT_NOISE), later)

            self._join(phase, method, play, done, progress)

    def _join(
        self,
        phase: Phase,
        method: Method,
        play: Callable[[], list[Episode]],
        done: int,
        progress: TrainingProgress,
    ) -> None:
        self._check_weights(phase, method, done)
        with self.timed("rollouts"):
            with method.acting():
                episodes = play()
            with method.present():  # what is drawn at their frames is by the weights in training
                self.keep(episodes, phase.name)
            outcomes = self.outcomes(episodes)
        for outcome in outcomes:
            values = {"success": float(outcome.success), "episode_steps": outcome.num_steps}
            self._record(self.step, phase.name, values)
        progress.update(done, {"success_rate": success_rate(outcomes)})

    def _log(self, phase: Phase, method: Method, done: int, progress: TrainingProgress) -> None:
        if done % self.log_freq and done != phase.num_steps:
            return
        seconds = self.wall_clock[phase.name]
        values = method.metrics() | {"updates_per_s": done / seconds if seconds else 0.0}
        if self.step_factor != 1.0:
            values["step_factor"] = self.step_factor
        step = self.step if phase.moves_policy else done
        looked = self.alarms.look(values)
        self._record(step, phase.name, values | looked.numbers)
        progress.update(done, values)
        for sentence in looked.sentences:
            progress.write(sentence)

    def _evaluate(
        self, phase: Phase, method: Method, done: int, progress: TrainingProgress
    ) -> None:
        if not phase.evaluate_every or done % phase.evaluate_every:
            return
        self._check_weights(phase, method, done)
        with self.timed("evaluations"), method.acting():
            outcomes = (
                self.evaluate(self.evaluation_seeds, method.actor())
                if self.step
                else self.evaluate_base(self.evaluation_seeds)
            )
        values = {"success_rate": success_rate(outcomes), "episodes": float(len(outcomes))}
        self._record(self.step, "eval", values)
        progress.update(done, values)

    def _record(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.log(step, phase, values)

    def _progress(self, phase: Phase, start: int) -> TrainingProgress:
        shown = None if self.team.is_main else io.StringIO()
        return TrainingProgress(phase.num_steps, phase.name, initial=start, stream=shown)

    def _save(self, phase: Phase, method: Method, done: int) -> None:
        self._check_weights(phase, method, done)
        position = Position(
            phase=phase.name,
            phase_step=done,
            step=self.step,
            replay_episodes=self.team.gather(self.store.num_episodes),
            metrics_lines=0 if self.metrics is None else self.metrics.num_lines,
            wall_clock=self.wall_clock,
            precision=self.team.precision,
        )
        name = f"{self.step:06d}" if phase.moves_policy else f"{phase.name}_{done:06d}"
        self.team.together(self._sync)

        def save_policy(folder: Path) -> None:
            with method.acting():
                self.save_policy(folder)

        with method.present():
            save_checkpoint(
                self.output_dir,
                name,
                method,
                save_policy,
                self.generators,
                position,
                self.team,
                self.valued,
            )
        if self.team.is_main and not phase.moves_policy:
            # Nobody evaluates these: the newest is for going on.
            forget_checkpoints(self.output_dir, f"{phase.name}_", keep=name)

    def _sync(self) -> None:
        """What a checkpoint counts on is on the disk before it."""
        self.store.flush()
        if self.metrics is not None:
            self.metrics.sync()

    def _check_weights(self, phase: Phase, method: Method, done: int) -> None:
        """Before they act or are saved: an update that broke them had losses that were finite."""
        found = [name for name in self.team.gather(not_finite(method)) if name is not None]
        if found:
            raise DivergenceError(
                f"training has diverged: {found[0]} is not finite after {phase.name} update {done}"
            )

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to the wall clock under a name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.wall_clock[name] = self.wall_clock.get(name, 0.0) + spent


@contextmanager
def _named(update: str) -> Iterator[None]:
    """Adds to a divergence where it happened."""
    try:
        yield
    except DivergenceError as error:
        raise DivergenceError(f"{error} in {update}") from error
