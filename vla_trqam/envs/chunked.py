"""Action chunks as one environment step."""

from typing import Any

import gymnasium
import numpy as np


class ChunkEnv(gymnasium.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray]):
    """Executes chunks of H actions, stopping where the episode ends.

    Action: (H, A) within the wrapped environment's limits. Observation: its own, after the last
    action.
    Reward: the sum over the chunk. `info` holds what a replay needs, in arrays of fixed size whose
    rows from `num_steps` on are zero:

        chunk_observations (H, O): what was seen *before* each executed action,
        chunk_actions (H, A): the actions as executed, clipped to those limits,
        chunk_rewards (H,),
        num_steps: int, actions really executed, and is_success: bool.
    """

    def __init__(self, env: gymnasium.Env[np.ndarray, np.ndarray], chunk_length: int) -> None:
        """Wrap `env`, whose actions are a box of shape (A,).

        Args:
            env: for example a `TaskEnv`.
            chunk_length: H, at least 1.

        Raises:
            ValueError: `chunk_length` is below 1.
        """
        super().__init__(env)
        if chunk_length < 1:
            raise ValueError(f"chunk_length is {chunk_length}; it must be at least 1")
        self.chunk_length = chunk_length
        assert isinstance(env.action_space, gymnasium.spaces.Box)
        self._low, self._high = (
            limit.astype(np.float32) for limit in (env.action_space.low, env.action_space.high)
        )
        shape = (chunk_length, *env.action_space.shape)
        self.action_space = gymnasium.spaces.Box(
            np.broadcast_to(self._low, shape), np.broadcast_to(self._high, shape), shape, np.float32
        )
        self._observation: np.ndarray | None = None
        self._ended = (False, False)
        self._success = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset the wrapped environment; arguments and result are its own."""
        self._observation, info = self.env.reset(seed=seed, options=options)
        self._ended = (False, False)
        self._success = bool(info["is_success"])
        return self._observation, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Execute a chunk (H, A).

        Raises:
            ValueError: the chunk has another shape.
            gymnasium.error.ResetNeeded: before the first reset, or after the episode's end.
        """
        if self._observation is None or any(self._ended):
            raise gymnasium.error.ResetNeeded("reset the environment before this step")
        chunk = np.asarray(action, dtype=np.float32)
        if chunk.shape != self.action_space.shape:
            raise ValueError(f"chunk has shape {chunk.shape}; it must be {self.action_space.shape}")
        info = self._blank_info(chunk)
        for row in chunk:
            if any(self._ended):
                break
            self._execute(row, info)
        info["is_success"] = self._success
        reward = float(info["chunk_rewards"].sum())
        return self._observation, reward, *self._ended, info

    def _blank_info(self, chunk: np.ndarray) -> dict[str, Any]:
        assert self._observation is not None
        return {
            "chunk_observations": np.zeros(
                (self.chunk_length, *self._observation.shape), self._observation.dtype
            ),
            "chunk_actions": np.zeros_like(chunk),
            "chunk_rewards": np.zeros(self.chunk_length, np.float32),
            "num_steps": 0,
        }

    def _execute(self, action: np.ndarray, info: dict[str, Any]) -> None:
        step = info["num_steps"]
        executed = np.clip(action, self._low, self._high)
        info["chunk_observations"][step] = self._observation
        info["chunk_actions"][step] = executed
        self._observation, reward, terminated, truncated, step_info = self.env.step(executed)
        info["chunk_rewards"][step] = reward
        info["num_steps"] = step + 1
        self._ended = (terminated, truncated)
        self._success = bool(step_info["is_success"])
