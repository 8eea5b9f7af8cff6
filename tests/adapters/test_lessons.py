"""What a tiny policy is pretrained on: looks and positions of a dataset, by instruction."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.policies.common.vla_utils import resize_with_pad, resize_with_pad_torch
from vla_trqam.adapters.loading import load_policy
from vla_trqam.adapters.tiny.lessons import joined, lesson_of_dataset, shrunk
from vla_trqam.adapters.tiny.pretraining import Looks, Scenes, learn_poses
from vla_trqam.recipes import make_tiny_vla

import vla_trqam.data
from vla_trqam.data.episode import Episode
from vla_trqam.data.replay import Replay
from vla_trqam.data.sources.lerobot.columns import OBJECT_POSITIONS
from vla_trqam.data.sources.lerobot.writer import write_lerobot_dataset
from vla_trqam.errors import UserError

SIZE, STEPS, EVERY, CHUNK = 64, 10, 4, 8
TEXTS = ("go left and stay there for good", "go right and stay there for good")
CAMERA = "observation.image"


def episode(number: int) -> Episode:
    """Its frames have the brightness, and its object the place, of its number."""
    observed = np.arange(STEPS + 1) % EVERY == 0
    observed[-1] = number % 2 == 0
    return Episode(
        observations=np.arange(STEPS + 1, dtype=np.float32)[:, None] + 100 * number,
        actions=np.arange(STEPS, dtype=np.float32)[:, None] + 0.5,
        rewards=np.zeros(STEPS, np.float32),
        terminated=number % 2 == 1,
        truncated=number % 2 == 0,
        success=number % 2 == 1,
        task=TEXTS[number % 2],
        images={CAMERA: np.full((observed.sum(), SIZE, SIZE, 3), 60 * number, np.uint8)},
        observed=observed,
        columns={OBJECT_POSITIONS: np.full((STEPS, 3), number, np.float32)},
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lessons")
    replay = Replay.create(
        folder / "replay",
        observation_dim=1,
        action_dim=1,
        capacity=4 * STEPS,
        cameras={CAMERA: (SIZE, SIZE, 3)},
        columns={OBJECT_POSITIONS: ("float32", (3,))},
    )
    for number in range(4):
        replay.add(episode(number), source="demonstrations")
    write_lerobot_dataset(replay, folder / "dataset", repo_id="local/lessons", fps=20)
    replay.close()
    return folder / "dataset"


def test_looks_are_the_frames_before_an_action_and_what_is_told_and_done_there(dataset):
    lesson = lesson_of_dataset(dataset, chunk=CHUNK, image_size=32, cloned_episodes=2)
    assert lesson.cameras == {CAMERA: (SIZE, SIZE, 3)}
    assert len(lesson.states) == len(lesson.actions) == 4 * STEPS
    looks, cloned = lesson.looks, lesson.cloned
    # Steps 0, 4 and 8; not the frame after the last action.
    assert looks.states[:, 0].tolist() == [100 * n + t for n in range(4) for t in (0, 4, 8)]
    assert looks.images[CAMERA].shape == (12, 32, 32, 3)
    assert looks.images[CAMERA][:, 0, 0, 0].tolist() == [60 * n for n in range(4) for _ in range(3)]
    assert looks.poses[:, 1].tolist() == [n for n in range(4) for _ in range(3)]
    assert [looks.texts[i] for i in looks.told] == [TEXTS[n % 2] for n in range(4) for _ in "abc"]
    assert len(cloned) == len(lesson.chunks) == 6
    assert lesson.chunks[1, :, 0].tolist() == [4.5, 5.5, 6.5, 7.5, 8.5, 9.5, 9.5, 9.5]


@pytest.mark.parametrize("count", [0, 5])
def test_more_episodes_than_there_are_cannot_be_cloned(dataset, count):
    with pytest.raises(UserError, match="must be 1 to 4, the episodes of"):
        lesson_of_dataset(dataset, chunk=CHUNK, image_size=32, cloned_episodes=count)


def test_a_dataset_without_positions_is_refused():
    packed = Path(vla_trqam.data.__file__).with_name("lift_pi0") / "dataset"
    with pytest.raises(UserError, match=OBJECT_POSITIONS):
        lesson_of_dataset(packed, chunk=CHUNK, image_size=32)


def test_frames_are_shrunk_as_lerobot_shrinks_them():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (70, 48, 48, 3)).astype(np.uint8)
    pixels = torch.from_numpy(frames) / 255
    channels_first = pixels.permute(0, 3, 1, 2)
    ours = torch.from_numpy(shrunk(frames, 16)) / 255
    for theirs in (
        resize_with_pad_torch(pixels, 16, 16),  # pi0's
        resize_with_pad(channels_first, 16, 16, pad_value=0.0).permute(0, 2, 3, 1),  # SmolVLA's
    ):
        assert (ours - theirs).abs().max() <= 0.5 / 255 + 1e-6
    assert shrunk(frames, 48) is frames
    with pytest.raises(UserError, match="48 x 20 are not square"):
        shrunk(frames[:, :, :20], 16)


def test_joined_scenes_say_what_each_said():
    def scenes(number: int, texts: list[str], told: list[int]) -> Scenes:
        rows = np.full((len(told), 1), number, np.float32)
        images = {"top": np.full((len(told), 2, 2, 3), number, np.uint8)}
        return Scenes(images, rows, rows, texts, np.array(told))

    both = joined(scenes(0, ["a", "b"], [0, 1]), scenes(1, ["c", "b"], [0, 1]), 2)
    assert [both.texts[i] for i in both.told] == ["a", "b", "c", "b", "c", "b"]
    assert both.states[:, 0].tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.long
def test_a_policy_made_of_a_dataset_tells_the_instructions_apart(dataset, tmp_path):
    output = tmp_path / "made"
    few = ["--pose_steps=60", "--clone_steps=2", "--num_threads=1"]
    flags = [f"--dataset={dataset}", f"--output={output}", "--cloned_episodes=2", *few]
    assert make_tiny_vla.main(flags) == 0
    assert sorted(path.name for path in output.iterdir()) == ["policy"]
    policy = load_policy(output / "policy", lora=None)
    assert policy.host.config.tokenizer_max_length >= max(map(len, TEXTS)) + 1
    # Pictures and states say nothing here: where the object is, the instruction alone says.
    blind = np.zeros((64, 96, 96, 3), np.uint8)
    told = np.arange(64) % 2
    poses = np.repeat((told[:, None] - 0.5).astype(np.float32), 3, axis=1)
    scenes = Scenes({CAMERA: blind}, np.zeros((64, 1), np.float32), poses, TEXTS, told)
    seen = Looks(policy, scenes).at(np.array([0, 1]))
    assert not torch.equal(*seen["observation.language.tokens"])
    read = seen["observation.language.attention_mask"].sum(dim=1)
    assert all(count >= len(text) for count, text in zip(read, TEXTS, strict=True))  # not cut
    losses: list[float] = []
    learn_poses(
        policy,
        scenes,
        steps=300,
        batch_size=16,
        lr=1e-3,
        seed=0,
        progress=lambda _, values: losses.append(values["pose_loss"]),
    )
    assert np.mean(losses[-5:]) < 0.2 < np.mean(losses[:3])
