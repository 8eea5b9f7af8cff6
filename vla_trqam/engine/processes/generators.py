"""The randomness of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Generators:
    """The two sources of randomness of a run: what is drawn from the replay, and noise."""

    replay: np.random.Generator
    noise: torch.Generator

    @classmethod
    def seeded(cls, seed: int, device: torch.device) -> Generators:
        """Both from one seed."""
        return cls(np.random.default_rng(seed), torch.Generator(device).manual_seed(seed))
