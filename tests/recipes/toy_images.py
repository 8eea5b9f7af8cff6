"""The toy task seen by a camera: a tiny policy, a dataset with images, and rollouts of pictures.

The point of `toy_task` is a white square in a picture; what the policy is given and what an
episode holds is as `RolloutPool` has it with cameras.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from toy_files import checkpoint_state
from toy_task import (
    ACTION_DIM,
    NEAR,
    OBSERVATION_DIM,
    STEP,
    homing_policy,
    observe,
    start_of,
    toy_family,
)
from vla_trqam.adapters.tiny.checkpoints import (
    flow_features,
    tiny_pi0_config,
    tiny_smolvla_config,
    unit_stats,
    write_checkpoint,
)

from vla_trqam.data.episode import Episode
from vla_trqam.data.frame_files import CacheHeader
from vla_trqam.data.replay import Replay
from vla_trqam.data.sources.lerobot.writer import write_lerobot_dataset
from vla_trqam.envs.base import EnvFamily
from vla_trqam.envs.registry import EnvConfig
from vla_trqam.envs.rollout import ChunkPolicy, where_cameras_look

CAMERA, SIZE, TASK = "agentview", 32, "come near the origin"
CHUNK, MAX_STEPS, NUM_DEMOS = 2, 7, 6
PIXELS_PER_UNIT = 8


def draw(position: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8: a blue floor with a white square where the point is."""
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    picture[..., 2] = 90
    row, column = np.clip(SIZE // 2 + PIXELS_PER_UNIT * position, 2, SIZE - 3).astype(int)
    picture[row - 2 : row + 3, column - 2 : column + 3] = 255
    return picture


def roll_out(
    policy: ChunkPolicy,
    seed: int,
    max_episode_steps: int,
    chunk_length: int,
    cameras: Sequence[str],
) -> Episode:
    """An episode with pictures where the policy decided, and where the limit cut."""
    position, actions, chunk = start_of(seed), [], []
    states, pictures = [observe(position)], []
    success = False
    while not success and len(actions) < max_episode_steps:
        if not chunk:
            pictures.append(draw(position))
            asked = {
                "agent_pos": states[-1][None],
                "pixels": {camera: pictures[-1][None] for camera in cameras},
                "task": [TASK],
            }
            number = len(actions) // chunk_length
            chunk = list(policy(asked, np.array([seed]), np.array([number]))[0])
            assert len(chunk) == chunk_length
        actions.append(np.clip(chunk.pop(0), -1.0, 1.0))
        position = position + STEP * actions[-1]
        states.append(observe(position))
        success = bool(np.linalg.norm(position) < NEAR)
    if not success:
        pictures.append(draw(position))
    rewards = np.zeros(len(actions), np.float32)
    rewards[-1] = success
    return Episode(
        observations=np.stack(states),
        actions=np.stack(actions).astype(np.float32),
        rewards=rewards,
        terminated=success,
        truncated=not success,
        success=success,
        seed=seed,
        task=TASK,
        images={camera: np.stack(pictures) for camera in cameras},
        observed=where_cameras_look(len(actions), chunk_length, success),
    )


def image_family(config: EnvConfig, *, max_episode_steps: int) -> EnvFamily:
    """Stands in for `make_family`: the toy with the settings' cameras."""
    shape = (config.image_size, config.image_size, 3)
    return toy_family(max_episode_steps, cameras=dict.fromkeys(config.cameras, shape))


def toy_pool() -> ImageToyPool:
    """Of the camera and the episodes of these tests."""
    config = EnvConfig("robomimic", cameras=(CAMERA,), image_size=SIZE)
    family = image_family(config, max_episode_steps=MAX_STEPS)
    return ImageToyPool(family, chunk_length=CHUNK, num_workers=1)


class ImageToyPool:
    """Takes `RolloutPool`'s arguments; remembers what it did.

    Attributes:
        started: how many pools were made since :meth:`forget`.
        rounds: the episodes of every call of `run`, of all pools.
        before_run: called with the number of the call about to be made.
    """

    started: ClassVar[int] = 0
    rounds: ClassVar[list[list[Episode]]] = []
    before_run: ClassVar[Callable[[int], None] | None] = None

    def __init__(
        self,
        family: EnvFamily,
        *,
        chunk_length: int,
        num_workers: int,
        chunk_deadline: float = 120.0,
    ) -> None:
        self.family, self.chunk_length = family, chunk_length
        self.max_episode_steps, self.cameras = family.max_episode_steps, tuple(family.cameras)
        type(self).started += 1

    @classmethod
    def forget(cls) -> None:
        cls.started, cls.rounds, cls.before_run = 0, [], None

    def run(
        self,
        policy: ChunkPolicy,
        seeds: Sequence[int],
        *,
        on_episode: Callable[[Episode], None] | None = None,
    ) -> list[Episode]:
        if ImageToyPool.before_run is not None:
            ImageToyPool.before_run(len(ImageToyPool.rounds))
        episodes = [
            roll_out(policy, seed, self.max_episode_steps, self.chunk_length, self.cameras)
            for seed in seeds
        ]
        ImageToyPool.rounds.append(episodes)
        return episodes

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_toy_policy(folder: Path, *cameras: str) -> Path:
    """A tiny π0 with random weights."""
    features = flow_features(OBSERVATION_DIM, ACTION_DIM, cameras or (CAMERA,), SIZE)
    config = tiny_pi0_config(
        features,
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        num_inference_steps=3,
        max_state_dim=4,
        max_action_dim=3,
        vlm_width=16,
        vlm_mlp_dim=16,
        expert_width=16,
        expert_mlp_dim=16,
        head_dim=8,
        vision_width=16,
        vision_mlp_dim=16,
    )
    return write_checkpoint(config, unit_stats(features), folder)


def write_toy_smolvla(folder: Path) -> Path:
    """A stock SmolVLA over a tiny backbone, whose folder lies beside the policy's."""
    features = flow_features(OBSERVATION_DIM, ACTION_DIM, (CAMERA,), SIZE)
    config = tiny_smolvla_config(
        features, folder.with_name("smolvlm"), chunk_size=CHUNK, n_action_steps=CHUNK, num_steps=3
    )
    return write_checkpoint(config, unit_stats(features), folder)


def write_toy_dataset(
    root: Path, scratch: Path, cameras: Sequence[str] = (CAMERA,), *, use_videos: bool = False
) -> Path:
    """Demonstrations, of which some succeed, as a LeRobotDataset with pictures."""
    replay = Replay.create(
        scratch,
        observation_dim=OBSERVATION_DIM,
        action_dim=ACTION_DIM,
        cameras=dict.fromkeys(cameras, (SIZE, SIZE, 3)),
        capacity=NUM_DEMOS * MAX_STEPS,
    )
    for seed in range(NUM_DEMOS):
        replay.add(_demo(seed, cameras), source="demonstrations")
    write_lerobot_dataset(replay, root, repo_id="local/toy", fps=20, use_videos=use_videos)
    replay.close()
    return root


def _demo(seed: int, cameras: Sequence[str]) -> Episode:
    homing = homing_policy(CHUNK, noise=1.0)
    return roll_out(
        lambda seen, *key: homing(seen["agent_pos"], *key), seed, MAX_STEPS, CHUNK, cameras
    )


def images_state(output_dir: Path, replay_name: str = "replay") -> dict[str, Any]:
    """Everything that two equal runs of a recipe with images must agree on to the bit."""
    state = checkpoint_state(output_dir)
    replay = Replay.open(output_dir / replay_name)
    state |= {
        name: getattr(replay, name).tobytes() for name in ("observations", "actions", "rewards")
    }
    state |= {
        "episodes": {k: v.tolist() for k, v in vars(replay.episodes()).items()},
        "tasks": replay.task_of_episodes(),
        "pictures": {camera: replay.images(camera).tobytes() for camera in replay.cameras},
        "rows": replay.frame_index.rows_of_frames().tolist(),
    }
    replay.close()
    cache = CacheHeader.read(replay.path)
    assert cache is not None
    for name in cache.features:
        column = np.load(replay.path / f"cache.{name}.npy", mmap_mode="r", allow_pickle=False)
        state[name] = column[: replay.num_frames].tobytes()
    return state
