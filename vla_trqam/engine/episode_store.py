"""Where a run's rollouts go: a replay, and the cached features of its images."""

from __future__ import annotations

from dataclasses import dataclass

from vla_trqam.data.episode import Episode
from vla_trqam.data.feature_cache import FeatureCache
from vla_trqam.data.replay import Replay


@dataclass(frozen=True)
class EpisodeStore:
    """A replay that takes what a :class:`~vla_trqam.envs.rollout.RolloutPool` makes."""

    replay: Replay
    cache: FeatureCache | None = None

    @property
    def num_episodes(self) -> int:
        """Episodes that count."""
        return self.replay.num_episodes

    def add(self, episode: Episode, *, source: str) -> None:
        """Appends a whole episode, and its features to the cache."""
        self.replay.add(episode, source=source)
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
