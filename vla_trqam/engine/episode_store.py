"""Where a run's episodes go: a replay of states, or one with images and their cached features."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from vla_trqam.data.feature_cache import FeatureCache
from vla_trqam.data.frame_replay import FrameEpisode, FrameReplay
from vla_trqam.data.replay import ReplayBuffer
from vla_trqam.envs.rollout import Episode


class EpisodeStore(Protocol):
    """A replay that takes what a :class:`~vla_trqam.envs.rollout.RolloutPool` makes."""

    @property
    def num_episodes(self) -> int:
        """Episodes that count."""

    def add(self, episode: Episode, *, source: str) -> None:
        """Appends a whole episode."""

    def flush(self) -> None:
        """Waits until the disk itself has all of them."""

    def truncate_to(self, num_episodes: int) -> None:
        """Forgets all but the first episodes."""


class StateStore:
    """Episodes of states."""

    def __init__(self, replay: ReplayBuffer) -> None:
        self.replay = replay

    @property
    def num_episodes(self) -> int:
        """Episodes that count."""
        return self.replay.num_episodes

    def add(self, episode: Episode, *, source: str) -> None:
        """Appends a whole episode."""
        self.replay.add_episode(
            episode.observations,
            episode.actions,
            episode.rewards,
            terminated=episode.terminated,
            truncated=episode.truncated,
            source=source,
            success=episode.success,
        )

    def flush(self) -> None:
        """Waits until the disk itself has all of them."""
        self.replay.flush()

    def truncate_to(self, num_episodes: int) -> None:
        """Forgets all but the first episodes."""
        self.replay.truncate_to(num_episodes)


class FrameStore:
    """Episodes with images, taken every ``chunk_length`` steps.

    Args:
        replay: where they go.
        cache: of the images' features, kept up to date; None for none.
        chunk_length: steps from decision to decision.
    """

    def __init__(
        self, replay: FrameReplay, cache: FeatureCache | None, *, chunk_length: int
    ) -> None:
        self.replay, self.cache, self._chunk_length = replay, cache, chunk_length

    @property
    def num_episodes(self) -> int:
        """Episodes that count."""
        return self.replay.num_episodes

    def add(self, episode: Episode, *, source: str) -> None:
        """Appends a whole episode, and its features to the cache."""
        frames = FrameEpisode(
            states=episode.observations,
            images=episode.images,
            observed=self._observed(episode),
            actions=episode.actions,
            rewards=episode.rewards,
            terminated=episode.terminated,
            truncated=episode.truncated and not episode.terminated,
            success=episode.success,
            task=episode.task,
        )
        self.replay.add_episode(frames, source=source)
        if self.cache is not None:
            self.cache.update()

    def flush(self) -> None:
        """Waits until the disk itself has all of them, and of their features."""
        if self.cache is not None:
            self.cache.flush()
        self.replay.flush()

    def truncate_to(self, num_episodes: int) -> None:
        """Forgets all but the first episodes, and their features."""
        self.replay.truncate_to(num_episodes)

    def _observed(self, episode: Episode) -> np.ndarray:
        """(T + 1,) bool: where the policy decided, and where the limit cut."""
        observed = np.arange(episode.num_steps + 1) % self._chunk_length == 0
        observed[-1] = not episode.terminated
        return observed
