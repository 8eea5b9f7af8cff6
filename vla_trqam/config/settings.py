"""What the settings of every run have; every knob has one owner, here or in its part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from vla_trqam.config.methods import MethodChoice, default_method
from vla_trqam.errors import UserError
from vla_trqam.kernel_choice import DEFAULT_KERNELS, Kernels, check_kernels
from vla_trqam.methods.base import Offers
from vla_trqam.methods.registry import check_served, idle_knobs, name_of, requirements_of
from vla_trqam.report.tracker import Service

OnDivergence = Literal["stop", "rollback"]

# Initial states: evaluation seeds lie below, those of training above.
VALIDATION_SEED, TRAINING_SEED, TRAINING_SEED_STRIDE = 500_000, 1_000_000, 1_000_000
# An initial state's seed must fit 32 bits.
LARGEST_SEED = (2**32 - TRAINING_SEED) // TRAINING_SEED_STRIDE - 1


def check_on_divergence(value: str) -> None:
    """Refuses what is no choice.

    Raises:
        UserError: neither "stop" nor "rollback".
    """
    if value not in get_args(OnDivergence):
        raise UserError(f"--on_divergence={value} must be {' or '.join(get_args(OnDivergence))}")


@dataclass
class CriticConfig:
    """The critic ensemble.

    Attributes:
        hidden_dims: widths of the hidden layers.
        ensemble_size: E.
        layer_norm: normalise after every activation.
        pessimism: rho of mean - rho std in the TD target.
        adjoint_pessimism: the same in the value whose action gradient starts the adjoint.
        target_rate: EMA rate of the target network.
        clip_actions: evaluate at actions clipped to [-1, 1].
        gradient_noise: noise on the action gradient that starts the adjoint, in units of its size:
            an imperfect critic on purpose.
        warmup_steps: updates of the critic alone before the policy moves.
    """

    hidden_dims: tuple[int, ...] = (256, 256, 256)
    ensemble_size: int = 10
    layer_norm: bool = True
    pessimism: float = 0.5
    adjoint_pessimism: float = 0.0
    target_rate: float = 0.005
    clip_actions: bool = True
    gradient_noise: float = 0.0
    warmup_steps: int = 0


@dataclass
class OnlineConfig:
    """Updates with rollouts of the tuned policy between them.

    Attributes:
        steps: updates.
        episodes_per_round: episodes rolled out before every round of updates.
        updates_per_round: updates of a round.
        fraction: share of every batch from rollouts; None draws uniformly from all data.
    """

    steps: int = 5000
    episodes_per_round: int = 20
    updates_per_round: int = 250
    fraction: float | None = None


@dataclass
class EvalConfig:
    """The paired evaluation of base and tuned policy.

    Attributes:
        episodes: initial states.
        first_seed: of the initial states; training uses others.
        max_episode_steps: control steps (Robomimic's are 20 a second) until an episode is cut.
        num_workers: simulator processes; None for one a core.
        chunk_deadline: seconds for a reset or the steps of a chunk; a simulator process that takes
            longer is replaced, and its episode played again from the start.
        episodes_during_training: initial states (others) of the evaluations in between.
        videos: episodes filmed; None for two where off-screen rendering works, else none.
    """

    episodes: int = 100
    first_seed: int = 10_000
    max_episode_steps: int = 150
    num_workers: int | None = None
    chunk_deadline: float = 120.0
    episodes_during_training: int = 50
    videos: int | None = None


@dataclass
class RunSettings:
    """What the settings of every run have.

    ``GROWING`` has the numbers of updates that a resumed run may be given more of, by flag, and
    their phases, in order; ``OFFERS`` what the recipe's policies can do for a method.

    Attributes:
        output_dir: the run's folder; null for a new one named after the time.
        resume: go on with the run in ``output_dir``, whose settings it keeps.
        checkpoint: the one of that run to go on from, like 000500; null for its last.
        seed: of all that is random in training; the evaluation does not depend on it.
        steps: updates of the policy from the dataset, before the online ones.
        base_episodes: episodes of the base policy that join the replay first, so that the critic
            knows what the base does.
        batch_size: chunks a batch of the updates that move the policy.
        discount: gamma, per control step.
        evaluate_every: updates between evaluations during training; 0 for none.
        log_freq: updates between lines of ``metrics.jsonl``.
        save_freq: updates between checkpoints.
        on_divergence: of a run with a number that is not finite: it ends ("stop"), or goes back to
            its last checkpoint with half the step sizes ("rollback", at most five times).
        lr_end: the share of the step sizes that is left in the run's last update of the policy, to
            which they fall in a straight line from its first; 1 keeps them.
        log_with: a service that gets every line of ``metrics.jsonl`` as well; null for none.
        num_threads: torch's threads; null for one a core.
        kernels: what is hot by hand-written kernels ("fast"), or by ordinary torch ("plain"): the
            same up to rounding, and slower.
        critic: the critic ensemble.
        method: which method, and its knobs.
        online: updates with rollouts between them.
        eval: the evaluations.
    """

    GROWING: ClassVar[Mapping[str, str]] = {"steps": "offline", "online.steps": "online"}
    OFFERS: ClassVar[Offers] = Offers(training_base=True, own_field=True)

    output_dir: Path | None = None
    resume: bool = False
    checkpoint: str | None = None
    seed: int = 0
    steps: int = 10000
    base_episodes: int = 60
    batch_size: int = 128
    discount: float = 0.99
    evaluate_every: int = 3000
    log_freq: int = 100
    save_freq: int = 1000
    on_divergence: OnDivergence = "stop"
    lr_end: float = 1.0
    log_with: Service | None = None
    num_threads: int | None = None
    kernels: Kernels = DEFAULT_KERNELS
    critic: CriticConfig = field(default_factory=CriticConfig)
    method: MethodChoice = field(default_factory=default_method)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @classmethod
    def between(
        cls, preset: str, settings: Mapping[str, Any], flags: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What lies above a preset and below the flags, because both together decide it.

        Args:
            preset: its name.
            settings: its own, by dotted name.
            flags: those of the command line.
        """
        return {}

    @property
    def warmup_batch_size(self) -> int:
        """Chunks a batch of the updates of the critic alone."""
        return self.batch_size

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_rates()
        self._check_seeds()
        self._check_choices()

    def evaluation_seeds(self) -> list[int]:
        """Initial states of the final evaluation."""
        return _seeds(self.eval.first_seed, self.eval.episodes)

    def validation_seeds(self) -> list[int]:
        """Initial states of the evaluations during training."""
        return _seeds(VALIDATION_SEED, self.eval.episodes_during_training)

    def base_seeds(self) -> list[int]:
        """Initial states of the base's episodes before the offline updates."""
        return _seeds(self._first_training_seed, self.base_episodes)

    def round_seeds(self, done: int) -> list[int]:
        """Initial states of the rollouts before the online update after ``done`` of them."""
        number, rest = divmod(done, self.online.updates_per_round)
        count = self.online.episodes_per_round
        start = self._first_training_seed + self.base_episodes + number * count
        return [] if rest else _seeds(start, count)

    @property
    def num_training_episodes(self) -> int:
        """Episodes that all rollouts of the training add to the replay."""
        rounds = -(-self.online.steps // self.online.updates_per_round)
        return self.base_episodes + rounds * self.online.episodes_per_round

    @property
    def base_alone(self) -> bool:
        """Whether no method's update is made: the run makes a base for others to begin with."""
        return self.steps + self.online.steps == 0

    def step_sizes(self) -> Callable[[int], float] | None:
        """The share of them for an update, by the policy's updates before it; None keeps them."""
        if self.lr_end == 1.0:
            return None
        last, fall = max(1, self.steps + self.online.steps - 1), 1.0 - self.lr_end
        return lambda done: 1.0 - fall * min(1.0, done / last)

    def _makes_a_base(self) -> bool:
        """Whether there is something to train before the method."""
        return False

    @property
    def _first_training_seed(self) -> int:
        return TRAINING_SEED + self.seed * TRAINING_SEED_STRIDE

    def _at_least_one(self) -> dict[str, int | None]:
        """The recipe's own numbers that must be positive, by flag; None is for no number."""
        return {}

    def _not_negative(self) -> dict[str, int | None]:
        """The recipe's own numbers that may be 0, by flag."""
        return {}

    def _check_choices(self) -> None:
        """Refuses settings that do not go together."""
        check_on_divergence(self.on_divergence)
        if self.base_alone and not self._makes_a_base():
            raise UserError("--steps and --online.steps are both 0: nothing would be trained")
        check_kernels(self.kernels)
        check_served(self.method, self.OFFERS)
        if self.checkpoint is not None and not self.resume:
            raise UserError(
                f"--checkpoint={self.checkpoint} is one to go on from; add --resume=true and "
                "--output_dir, the folder of its run"
            )

    def _check_numbers(self) -> None:
        at_least_one = {
            "batch_size": self.batch_size,
            "log_freq": self.log_freq,
            "save_freq": self.save_freq,
            "num_threads": self.num_threads,
            "critic.hidden_dims": min(self.critic.hidden_dims, default=0),
            "critic.ensemble_size": self.critic.ensemble_size,
            "online.episodes_per_round": self.online.episodes_per_round,
            "online.updates_per_round": self.online.updates_per_round,
            "eval.episodes": self.eval.episodes,
            "eval.max_episode_steps": self.eval.max_episode_steps,
            "eval.num_workers": self.eval.num_workers,
            "eval.episodes_during_training": self.eval.episodes_during_training,
        }
        not_negative = {
            "steps": self.steps,
            "base_episodes": self.base_episodes,
            "critic.warmup_steps": self.critic.warmup_steps,
            "online.steps": self.online.steps,
            "evaluate_every": self.evaluate_every,
            "eval.videos": self.eval.videos,
        }
        refuse_below(at_least_one | self._at_least_one(), 1)
        refuse_below(not_negative | self._not_negative(), 0)

    def _check_rates(self) -> None:
        if not 0.0 < self.eval.chunk_deadline < float("inf"):
            raise UserError(
                f"--eval.chunk_deadline={self.eval.chunk_deadline} must be a positive number of "
                "seconds"
            )
        if not 0.0 < self.lr_end <= 1.0:
            raise UserError(f"--lr_end={self.lr_end} must lie in (0, 1]: the share that is left")
        if not 0.0 < self.discount < 1.0:
            raise UserError(f"--discount={self.discount} must lie between 0 and 1")
        if self.online.fraction is not None and not 0.0 < self.online.fraction < 1.0:
            raise UserError(f"--online.fraction={self.online.fraction} must lie between 0 and 1")
        if not 0.0 < self.critic.target_rate <= 1.0:
            raise UserError(f"--critic.target_rate={self.critic.target_rate} must lie in (0, 1]")
        for name in ("pessimism", "adjoint_pessimism", "gradient_noise"):
            size = getattr(self.critic, name)
            if not 0.0 <= size < float("inf"):
                raise UserError(f"--critic.{name}={size} must be finite and not negative")

    def _check_seeds(self) -> None:
        if not 0 <= self.seed <= LARGEST_SEED:
            raise UserError(f"--seed={self.seed} must lie between 0 and {LARGEST_SEED}")
        last = self.eval.first_seed + self.eval.episodes
        if self.eval.first_seed < 0 or last > VALIDATION_SEED:
            raise UserError(
                f"--eval.first_seed={self.eval.first_seed} must be at least 0 and leave its "
                f"{self.eval.episodes} initial states below {VALIDATION_SEED}"
            )
        most = TRAINING_SEED - VALIDATION_SEED
        if self.eval.episodes_during_training > most:
            raise UserError(
                f"--eval.episodes_during_training={self.eval.episodes_during_training} "
                f"must be at most {most}"
            )
        if self.num_training_episodes > TRAINING_SEED_STRIDE:
            raise UserError(
                f"the settings roll out {self.num_training_episodes} episodes for training; "
                f"there are initial states for {TRAINING_SEED_STRIDE}"
            )


def refuse_idle_knobs(config: RunSettings, flags: set[str]) -> None:
    """Refuses flags that the chosen method leaves without effect.

    Args:
        config: all settings.
        flags: the names, with their dashes, of those on the command line.

    Raises:
        UserError: there is such a flag.
    """
    idle = flags & idle_knobs(config.method)
    if not requirements_of(config.method).learns_critic:
        idle |= {flag for flag in flags if flag.startswith("--critic.")}
    if idle:
        raise UserError(
            f"--method.type={name_of(config.method)} has no use for {' and '.join(sorted(idle))}: "
            "leave it out"
        )


def refuse_below(values: Mapping[str, int | None], least: int) -> None:
    """Raises a UserError for the first of these flags that is below the least allowed."""
    for name, value in values.items():
        if value is not None and value < least:
            must = f"be at least {least}" if least else "not be negative"
            raise UserError(f"--{name}={value} must {must}")


def _seeds(first: int, count: int) -> list[int]:
    return list(range(first, first + count))
