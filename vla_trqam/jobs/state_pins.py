"""Where the data of a run on states lies, wherever the run is gone on with or looked at from."""

from __future__ import annotations

from pathlib import Path

from vla_trqam.config.state_settings import StateRunConfig
from vla_trqam.engine.folder.pins import began_at, read_pins


def take_dataset(config: StateRunConfig, run: Path) -> None:
    """A path in a run's settings is relative to where it was begun; the run has pinned the place.

    Args:
        config: the run's; its data's path is replaced.
        run: the run's folder.

    Raises:
        UserError: what the run pinned is damaged.
    """
    pin, asked = read_pins(run).get("dataset"), config.dataset.path
    if pin is not None and asked is not None:
        file = asked.name if asked.name in pin.files else ""
        config.dataset.path = began_at(pin, asked, file)
