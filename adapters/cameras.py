"""The cameras that a policy names beside those that are there, as its host takes them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from vla_trqam.adapters.families.base import FlowFamily


@dataclass(frozen=True)
class Cameras:
    """What a policy sees of an observation or a dataset.

    Attributes:
        seen: the policy's cameras that are there.
        missing: those that are not; the host's own empty ones are not counted.
        unseen: cameras that the policy does not look through.
        instead: what the host makes of a missing one; None where it needs them all.
    """

    seen: tuple[str, ...]
    missing: tuple[str, ...]
    unseen: tuple[str, ...]
    instead: str | None

    @property
    def fit(self) -> bool:
        """Whether the host takes an observation of these."""
        return not self.missing or bool(self.instead and self.seen)

    def notes(self) -> Iterator[str]:
        """A sentence for each thing that is tolerated."""
        if self.missing:
            yield (
                f"the policy looks through {', '.join(self.missing)} too, which the data lacks: "
                f"{self.instead}, as LeRobot does it (a --rename_map maps the data's names)"
            )
        if self.unseen:
            yield f"cameras not looked through, and never opened: {', '.join(self.unseen)}"


def cameras_of(family: FlowFamily, config: Any, there: Collection[str]) -> Cameras:
    """Compares by the names that the policy knows, ``observation.images.`` included."""
    named = config.image_features
    return Cameras(
        seen=tuple(key for key in named if key in there),
        missing=tuple(k for k in named if k not in there and "empty_camera" not in k),
        unseen=tuple(key for key in there if key not in named),
        instead=family.without_camera,
    )
