"""The lines of `metrics.jsonl` in a service for curves as well, through accelerate's trackers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, SupportsFloat, get_args

from vla_trqam.errors import UserError, one_line

Service = Literal["wandb", "trackio", "tensorboard"]
PROJECT = "vla_trqam"
# One number is on the axis of all curves, and must not shrink from line to line.
ONE_AXIS = ("wandb", "trackio")


class _Host(Protocol):
    """What is used of accelerate's trackers."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Numbers by name."""


class Tracker:
    """A service that gets every line of the log."""

    def __init__(self, host: _Host, service: Service) -> None:
        self._host, self._one_axis = host, service in ONE_AXIS
        self._last = 0

    def log(self, line: int, step: int, phase: str, values: Mapping[str, SupportsFloat]) -> None:
        """A line, whose numbers are named ``phase/name``.

        Pretraining and the critic's warm-up count their own updates, so a service with one axis
        for all curves gets the line's number there, and the updates as a curve of their own. A
        rollback cuts the log back, and what comes then is further to the right.
        """
        self._last = max(self._last + 1, line)
        found = {f"{phase}/{name}": float(value) for name, value in values.items()}
        if self._one_axis:
            self._host.log(found | {f"{phase}/step": step}, step=self._last)
        else:
            self._host.log(found, step=step)


def check_tracker(service: str | None) -> None:
    """Refuses a service that is none, or not installed.

    Raises:
        UserError: with the command that installs it.
    """
    if service is None:
        return
    if service not in get_args(Service):
        raise UserError(f"--log_with={service} must be one of {', '.join(get_args(Service))}")
    from accelerate.tracking import get_available_trackers

    if service not in {str(kind.value) for kind in get_available_trackers()}:
        raise UserError(
            f"--log_with={service} is not installed: `uv pip install {service}` brings it"
        )


@contextmanager
def tracker(service: Service, output_dir: Path, settings: Mapping[str, Any]) -> Iterator[Tracker]:
    """The service, started, until it has been told everything.

    Args:
        service: which; it is installed.
        output_dir: of the run, after whose folder it is named; a run that is gone on with is a
            further one of the same name there.
        settings: of the run; a service on other machines gets them.

    Raises:
        UserError: it does not start.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    named = {"name": output_dir.name, "config": dict(settings)}
    arguments: dict[str, dict[str, Any]] = {
        "wandb": {"run_name": PROJECT, "dir": str(output_dir), **named},
        "trackio": {"run_name": PROJECT, **named},
        "tensorboard": {"run_name": service, "logging_dir": output_dir},
    }
    host = LOGGER_TYPE_TO_CLASS[service](**arguments[service])
    try:
        host.start()
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"--log_with={service} does not start: {reason}") from None
    try:
        yield Tracker(host, service)
    finally:
        host.finish()
