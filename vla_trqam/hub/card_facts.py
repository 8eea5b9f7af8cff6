"""What a model card tells, read from the folder of a run: nothing of it is typed by hand."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vla_trqam.config.parsing import in_todays_names
from vla_trqam.data.sources.lerobot.several import source_names
from vla_trqam.engine.folder.checkpoints import (
    CHECKPOINTS,
    PRETRAINED,
    Position,
    last_checkpoint,
    read_position,
)
from vla_trqam.engine.folder.pins import Pin, read_pins
from vla_trqam.engine.folder.run_folder import CONFIG_NAME
from vla_trqam.errors import UserError, one_line
from vla_trqam.report.evaluation import PairedEvaluation
from vla_trqam.report.flow_steps import FlowSteps
from vla_trqam.report.metrics import (
    Metrics,
    MetricSeries,
    TrustRegionSummary,
    join_phases,
    read_metrics,
    summarise_trust_region,
)
from vla_trqam.report.public_copy import without_paths

METRICS, REPORT = "metrics.jsonl", "report.json"
POLICY_CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# The policy type that only this package's own MLP has; LeRobot loads all others.
MLP_TYPE = "mlp_flow"
# What policies call their number of flow steps in their configs.
STEPS_FIELDS = ("num_flow_steps", "num_inference_steps", "num_steps", "num_integration_steps")


@dataclass(frozen=True, eq=False)
class RunFacts:
    """A checkpoint of a run and what the run's files say about it.

    Attributes:
        checkpoint: its folder.
        policy: the folder of the policy, the checkpoint's own or an export of it.
        config: every setting of the run.
        policy_config: the policy's ``config.json``.
        position: where the run stood.
        kl_final: the KL's moving average at that moment; None without a trust region.
        trust_region: the KL against its budget up to then; None without a trust region.
        flow_steps: of the base as it came and of the tuned policy; None where no report says it.
        evaluation: of this checkpoint against the base; None where there is none.
        not_evaluated: why there is none, a sentence.
        provenance: command, seeds, versions, commit and machine; None where no report is.
        title: of the report; None where no report is.
        simulator: its name, and the task there; None where no report says so.
        plots: the figures.
        outdated: the report is of fewer updates than the run has made since.
        base: Hub repository of the base policy; None where it is not known to be on the Hub.
        datasets: Hub repositories of the datasets; None for one that is not known to be there.
    """

    checkpoint: Path
    policy: Path
    config: dict[str, Any]
    policy_config: dict[str, Any]
    position: Position
    kl_final: float | None
    trust_region: TrustRegionSummary | None
    flow_steps: FlowSteps | None
    evaluation: PairedEvaluation | None
    not_evaluated: str
    provenance: dict[str, Any] | None
    title: str | None
    simulator: dict[str, str] | None
    plots: tuple[Path, ...]
    outdated: bool
    base: str | None
    datasets: tuple[str | None, ...]

    @property
    def goes_on(self) -> bool:
        """Whether the run went on with adapters that an earlier one had tuned."""
        return bool(self.setting("policy.adapter") == "continue")

    @property
    def policy_type(self) -> str:
        """LeRobot's name of the policy's architecture."""
        return str(self.policy_config["type"])

    @property
    def num_flow_steps(self) -> int | None:
        """K that the policy acts with; None where its config does not say."""
        return next(
            (int(self.policy_config[k]) for k in STEPS_FIELDS if k in self.policy_config), None
        )

    @property
    def for_lerobot(self) -> bool:
        """Whether stock LeRobot loads the policy."""
        return self.policy_type != MLP_TYPE

    @property
    def is_adapter(self) -> bool:
        """Whether the policy is LoRA weights that need their base."""
        return (self.policy / ADAPTER_CONFIG).is_file()

    @property
    def method(self) -> str:
        """What tuned the policy, like "TRQAM"."""
        return str(self.setting("method.type", "trqam")).upper()

    @property
    def kl_unit(self) -> str:
        """Of the KL and its budget."""
        per_action = self.setting("method.kl_per_action", False)
        return "nats per action" if per_action else "nats per chunk"

    def setting(self, name: str, default: Any = None) -> Any:
        """The value of a dotted setting, ``default`` where the recipe has no such setting."""
        value: Any = self.config
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    @property
    def recipe(self) -> str | None:
        """The script that made the run."""
        command = shlex.split(str((self.provenance or {}).get("command", "")))
        return next((word for word in command if word.endswith(".py")), None)


def find_checkpoint(run: Path, name: str = "last") -> Path:
    """A checkpoint of a run by its number, or the last one.

    Raises:
        UserError: there is no run, or no such checkpoint.
    """
    if not (run / CONFIG_NAME).is_file():
        raise UserError(f"{run} is not the folder of a run: it has no {CONFIG_NAME}")
    found = last_checkpoint(run)
    if found is None:
        raise UserError(f"{run} has no checkpoint yet; there is nothing to push")
    if name != "last":
        found = run / CHECKPOINTS / name
        there = sorted(path.name for path in (run / CHECKPOINTS).glob("[!.]*") if path.is_dir())
        if name not in there:
            raise UserError(f"--checkpoint={name} is none of {', '.join(there)}")
    return found


def read_facts(run: Path, checkpoint: Path, policy: Path | None = None) -> RunFacts:
    """Collects what the card of a checkpoint tells.

    Raises:
        UserError: a file is missing or is not what a run writes.
    """
    policy = policy or checkpoint / PRETRAINED
    config, report = in_todays_names(_read(run / CONFIG_NAME)), None
    if (run / REPORT).is_file():
        report = _read(run / REPORT)
    position = read_position(checkpoint)
    metrics = _until(read_metrics(run / METRICS), position.step)
    kl = join_phases(metrics, "kl_ema").value
    trust_region = summarise_trust_region(metrics)
    last = read_position(find_checkpoint(run)).step
    reported = (report or {}).get("step", last)  # earlier versions did not say
    evaluation, not_evaluated = _evaluation(run, checkpoint, report, reported, last)
    policy_config = _read(policy / POLICY_CONFIG)
    if "type" not in policy_config:
        raise UserError(f'{policy / POLICY_CONFIG} has no "type": it is not the config of a policy')
    return RunFacts(
        checkpoint=checkpoint,
        policy=policy,
        config=config,
        policy_config=policy_config,
        position=position,
        kl_final=None if trust_region is None else float(kl[-1]),
        trust_region=trust_region,
        flow_steps=_flow_steps(report),
        evaluation=evaluation,
        not_evaluated=not_evaluated,
        provenance=None if report is None else without_paths(report.get("provenance")),
        title=None if report is None else report.get("title"),
        simulator=None if report is None else report.get("simulator"),
        plots=() if reported != last else tuple(sorted((run / "plots").glob("*.png"))),
        outdated=reported != last,
        base=_base(run, config, checkpoint / PRETRAINED),
        datasets=_datasets(run, config),
    )


def _evaluation(
    run: Path, checkpoint: Path, report: dict[str, Any] | None, reported: int, last: int
) -> tuple[PairedEvaluation | None, str]:
    if report is None:
        return None, "The run was pushed before its end, so base and tuned policy were not compared"
    if not report.get("evaluation"):
        return None, "The run had no simulator to compare base and tuned policy in"
    if reported != last:
        return None, f"The run compared the policy of {reported} updates with the base, not this"
    final = find_checkpoint(run)
    if checkpoint.resolve() != final.resolve():
        return None, f"The run compared its last checkpoint, {final.name}, with the base, not this"
    return PairedEvaluation.from_json(report["evaluation"]), ""


def _flow_steps(report: dict[str, Any] | None) -> FlowSteps | None:
    found = (report or {}).get("flow_steps")
    return None if found is None else FlowSteps(**found)


def _until(metrics: Metrics, step: int) -> Metrics:
    """What was logged up to a step."""

    def cut(series: MetricSeries) -> MetricSeries:
        kept = np.searchsorted(series.step, step, side="right")
        return MetricSeries(series.step[:kept], series.time[:kept], series.value[:kept])

    return {
        phase: {name: cut(series) for name, series in by_name.items()}
        for phase, by_name in metrics.items()
    }


def _base(run: Path, config: dict[str, Any], own: Path) -> str | None:
    """The Hub repository that the policy was tuned from, also where an export of it is pushed."""
    if (own / ADAPTER_CONFIG).is_file():
        named = _read(own / ADAPTER_CONFIG).get("base_model_name_or_path")
        return named if named and is_on_the_hub(named) else None
    return _repository((config.get("policy") or {}).get("path"), read_pins(run).get("policy"))


def _datasets(run: Path, config: dict[str, Any]) -> tuple[str | None, ...]:
    """The Hub repositories that the offline data came from."""
    data, pins = config.get("dataset") or {}, read_pins(run)
    each = [data, *(data.get("more") or ())]
    named = [one.get("repo_id") if one.get("root") is None else None for one in each]
    return tuple(
        _repository(repo_id, pins.get(source))
        for repo_id, source in zip(named, source_names(len(each)), strict=True)
    )


def _repository(named: str | None, pin: Pin | None) -> str | None:
    """What the run began with, where that came from the Hub; by its name alone of an older run."""
    found = named is not None and is_on_the_hub(named)
    return named if found and (pin is None or pin.commit is not None) else None


def is_on_the_hub(name: str) -> bool:
    """Whether a path or repository means the latter: USER/NAME, and no folder of this machine."""
    parts = name.split("/")
    plain = len(parts) == 2 and all(parts) and not name.startswith((".", "~", "local/"))
    return plain and not Path(name).is_dir()


def _read(path: Path) -> dict[str, Any]:
    read = yaml.safe_load if path.suffix == ".yaml" else json.loads
    try:
        content = read(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping of names to values")
    return content
