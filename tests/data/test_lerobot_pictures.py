"""The cameras of a LeRobotDataset: they show what was declared, and nothing more is opened."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vla_trqam.data import episode as module
from vla_trqam.data.sources.base import create_replay, fill
from vla_trqam.data.sources.lerobot import pictures
from vla_trqam.data.sources.lerobot.video import decode_video
from vla_trqam.errors import UserError

from .lerobot_files import (
    DATA,
    EPISODES,
    FPS,
    LENGTH,
    SIDE,
    VIDEO,
    Written,
    edit_column,
    edit_info,
    edit_table,
    level,
    open_dataset,
    picture,
    png,
    setting,
    write_video,
)

HEIGHT, WIDTH = 24, 40


@pytest.fixture
def filmed(tmp_path: Path) -> Path:
    return Written(videos=["front", "side"]).write(tmp_path / "set")


def declare(root: Path, camera: str, **values: Any) -> None:
    edit_info(root, lambda info: info["features"][camera].update(values))


def film(root: Path, camera: str, height: int = HEIGHT, width: int = WIDTH) -> None:
    """Pictures that are not square."""
    frames = [(e, t) for e in range(4) for t in range(LENGTH)]
    shape = (height, width, 3)
    write_video(root / VIDEO.format(camera), (picture(*frame, shape) for frame in frames))


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ([3, HEIGHT, WIDTH], ["channels", "height", "width"]),
        ([3, HEIGHT, WIDTH], ["c", "h", "w"]),
        ([3, HEIGHT, WIDTH], None),
        ([HEIGHT, WIDTH, 3], ["height", "width", "channel"]),
        ([HEIGHT, WIDTH, 3], None),
        ([HEIGHT, WIDTH, 3], {"motors": ["x"]}),
        ([WIDTH, HEIGHT, 3], ["width", "height", "channels"]),
        ([3, WIDTH, HEIGHT], ["channels", "width", "height"]),
    ],
)
def test_cameras_are_read_as_declared(filmed: Path, shape: list[int], names: Any) -> None:
    declare(filmed, "front", shape=shape, names=names)
    film(filmed, "front")
    reader = open_dataset(filmed, cameras=("front",))
    assert reader.cameras == {"front": (HEIGHT, WIDTH, 3)}
    assert reader.features["observation.images.front"]["shape"] == (HEIGHT, WIDTH, 3)
    reader.check_cameras()
    images = np.asarray(reader.episode(2).images["front"])
    assert images.shape == (LENGTH, HEIGHT, WIDTH, 3)
    assert np.abs(images.mean((1, 2, 3)) - [level(2, t) for t in range(LENGTH)]).max() < 3


@pytest.mark.parametrize("shape", [[3, HEIGHT, 3], [HEIGHT, WIDTH, 7]])
def test_a_camera_whose_channels_nothing_tells_is_refused(filmed: Path, shape: list[int]) -> None:
    declare(filmed, "front", shape=shape, names=None)
    with pytest.raises(UserError, match=r"camera front with the shape .* do not tell its channels"):
        open_dataset(filmed)


def test_a_video_of_another_size_is_refused_before_it_is_decoded(filmed: Path) -> None:
    film(filmed, "side", 48, 64)
    message = (
        r"The camera side is declared with 32 x 32 x 3 .*, and videos/side/.*file-000.mp4 shows "
        "48 x 64 x 3"
    )
    with pytest.raises(UserError, match=message):
        open_dataset(filmed).check_cameras()


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    root = Written(images=["front"]).write(tmp_path / "set")
    for row, message in ((0, "episode 0, frame 0"), (9, "episode 1, frame 3")):
        wrong = {"bytes": png(picture(0, 0, (16, 20, 3))), "path": None}
        edit_column(root / DATA, "front", setting(row, wrong))
        reader = open_dataset(root, episodes=(row // LENGTH,))
        with pytest.raises(UserError, match=f"32 x 32 x 3 .*{message} shows 16 x 20 x 3"):
            reader.check_cameras() if row == 0 else np.asarray(reader.episode(0).images["front"])


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_images_have_the_declared_channels(tmp_path: Path, mode: str, channels: int) -> None:
    root = Written(images=["front"]).write(tmp_path / "set")
    held = io.BytesIO()
    Image.new(mode, (SIDE, SIDE), 77 if channels == 1 else (77,) * channels).save(held, "PNG")
    entry = {"bytes": held.getvalue(), "path": "frame.png"}
    edit_column(root / DATA, "front", lambda _: [entry] * 4 * LENGTH)
    declare(root, "front", shape=[SIDE, SIDE, channels])
    images = np.asarray(open_dataset(root).episode(0).images["front"])
    assert images.shape == (LENGTH, SIDE, SIDE, channels)
    assert (images == 77).all()
    declare(root, "front", shape=[SIDE, SIDE, 4 if channels == 3 else 3])
    with pytest.raises(UserError, match=rf"shows 32 x 32 x {channels} \({mode}\)"):
        open_dataset(root).check_cameras()


def test_images_of_indexed_colours_are_refused(tmp_path: Path) -> None:
    root = Written(images=["front"]).write(tmp_path / "set")
    held = io.BytesIO()
    Image.new("P", (SIDE, SIDE), 3).save(held, "PNG")
    edit_column(root / DATA, "front", setting(0, {"bytes": held.getvalue(), "path": None}))
    with pytest.raises(UserError, match=r"\(P\)"):
        open_dataset(root).check_cameras()


def spoil(root: Path, camera: str, how: str) -> None:
    path = root / VIDEO.format(camera)
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-400])
    elif how == "half":
        frames = [(e, t) for e in range(4) for t in range(LENGTH)]
        write_video(path, (picture(*frame) for frame in frames), index_first=True)
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "short":
        write_video(path, (picture(0, t) for t in range(3 * LENGTH)))
    elif how == "not listed":
        column = f"videos/{camera}/from_timestamp"
        edit_table(root / EPISODES, lambda table: table.drop_columns([column]))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "has no file videos/side/chunk-000/file-000.mp4: is it whole"),
        ("truncated", r"file-000.mp4 (cannot be decoded|has \d+ of \d+ bytes).*; is it whole"),
        ("half", r"file-000.mp4 has \d+ of \d+ bytes; is it whole"),
        ("short", "videos/side/.* ends at 1.8.* s, before the last frame of episode 3 at 2.300 s"),
        ("not listed", f"{EPISODES} has no column 'videos/side/from_timestamp'"),
    ],
)
def test_a_fault_of_a_video_is_found_before_anything_is_decoded(
    filmed: Path, how: str, message: str
) -> None:
    spoil(filmed, "side", how)
    with pytest.raises(UserError, match=message):
        open_dataset(filmed).check_cameras()


@pytest.mark.parametrize("how", ["missing", "truncated", "short", "not listed", "declared"])
def test_a_camera_that_nobody_looks_through_is_not_opened(filmed: Path, how: str) -> None:
    spoil(filmed, "side", how)
    if how == "declared":
        declare(filmed, "side", shape=[1, 2])
    for restricted in ({"cameras": ("front",)}, {"looked_through": ("front", "top")}):
        reader = open_dataset(filmed, **restricted)
        assert set(reader.cameras) == {"front"}
        assert {"observation.images.front", "observation.images.side"} < set(reader.features)
        reader.check_cameras()
        assert set(reader.episode(3).images) == {"front"}


def split_in_two(root: Path, camera: str) -> None:
    """Episodes 2 and 3 get files of their own, of every kind."""
    second = {name: name.replace("file-000", "file-001") for name in (DATA, EPISODES)}
    video = root / VIDEO.format(camera)
    for part, episodes in (("file-000.mp4", (0, 1)), ("file-001.mp4", (2, 3))):
        frames = [(e, t) for e in episodes for t in range(LENGTH)]
        write_video(video.with_name(part), (picture(*frame) for frame in frames))
    for name in ("data/file_index", f"videos/{camera}/file_index"):
        edit_column(root / EPISODES, name, lambda _: [0, 0, 1, 1])
    for side, first in (("from", 0.0), ("to", LENGTH / FPS)):
        times = [first, first + LENGTH / FPS] * 2
        edit_column(root / EPISODES, f"videos/{camera}/{side}_timestamp", lambda _, t=times: t)
    for name, other in second.items():
        whole = pq.read_table(root / name)
        late = pc.greater_equal(whole["episode_index"], 2)
        pq.write_table(whole.filter(late), root / other)
        pq.write_table(whole.filter(pc.invert(late)), root / name)


def test_episodes_are_found_in_their_own_files(tmp_path: Path) -> None:
    written = Written(videos=["front"], images=["wrist"])
    whole = list(open_dataset(written.write(tmp_path / "one")).episodes())
    root = written.write(tmp_path / "two")
    split_in_two(root, "front")
    reader = open_dataset(root)
    reader.check_cameras()
    for number, episode in enumerate(reader.episodes()):
        assert np.array_equal(episode.observations, whole[number].observations)
        assert np.array_equal(episode.images["wrist"], whole[number].images["wrist"])
        shown = np.asarray(episode.images["front"], int)
        difference = shown - whole[number].images["front"]
        assert np.abs(difference).max() < 3
    (root / VIDEO.format("front")).unlink()
    (root / DATA).unlink()
    later = open_dataset(root, episodes=(2, 3))
    later.check_cameras()
    assert later.episode(1).observations[0].tolist() == [3, 0]


def test_no_library_is_asked_for_a_camera_that_nobody_looks_through(
    filmed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import av

    opened, real = list[str](), av.open

    def remember(file: str, *arguments: Any, **options: Any) -> Any:
        opened.append(file)
        return real(file, *arguments, **options)

    monkeypatch.setattr(av, "open", remember)
    reader = open_dataset(filmed, looked_through=("front",))
    reader.check_cameras()
    list(reader.episodes())
    assert opened
    assert all("side" not in file for file in opened)


@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        ("from_timestamp", 2, 1.1, "shows episode 1 from 0.600 s on .* and episode 2 from 1.100 s"),
        ("to_timestamp", 2, 1.3, "has 0.100 s for episode 2, whose 6 frames take 0.600 s"),
        ("from_timestamp", 2, -1.0, "episode 2 has the video of 'front' from -1 to 1.8 s"),
        ("from_timestamp", 2, float("nan"), "episode 2 has the video of 'front' from nan"),
        ("file_index", 2, 5, "has no file videos/front/chunk-000/file-005.mp4"),
    ],
)
def test_parts_of_a_video_that_are_not_the_episodes_are_refused(
    filmed: Path, name: str, row: int, value: float, message: str
) -> None:
    edit_column(filmed / EPISODES, f"videos/front/{name}", setting(row, value))
    with pytest.raises(UserError, match=message):
        open_dataset(filmed).check_cameras()


def test_a_frame_that_the_video_lacks_is_named_with_its_episode(filmed: Path) -> None:
    from_begin = f"videos/front/{'from_timestamp'}"
    edit_column(filmed / EPISODES, from_begin, setting(3, 1.83))
    reader = open_dataset(filmed, cameras=("front",))
    message = r"Episode 3 of .*file-000.mp4 has no frame of the camera front at 1.8300 s: the near"
    with pytest.raises(UserError, match=message):
        np.asarray(reader.episode(3).images["front"])


def test_a_dataset_without_a_path_of_its_videos_is_refused(filmed: Path) -> None:
    edit_info(filmed, lambda info: info.update(video_path=None))
    with pytest.raises(
        UserError, match=r"has the video 'front'; its meta/info.json has no video_p"
    ):
        open_dataset(filmed).check_cameras()


def test_a_long_episode_is_decoded_a_few_frames_at_a_time(
    filmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied into a replay it never lies in memory as a whole."""
    at_once: list[int] = []

    def counted(path: Path, times: np.ndarray, **settings: Any) -> np.ndarray:
        at_once.append(len(times))
        return decode_video(path, times, **settings)

    reader = open_dataset(filmed, cameras=("front",))
    whole = np.concatenate([episode.images["front"] for episode in reader.episodes()])
    monkeypatch.setattr(pictures, "decode_video", counted)
    monkeypatch.setattr(module, "AT_A_TIME", 4)
    replay = create_replay(tmp_path / "replay", [reader])
    fill(replay, reader, "dataset", lambda _: None)
    assert set(at_once) == {4, LENGTH % 4}
    assert np.array_equal(replay.images("front"), whole)
