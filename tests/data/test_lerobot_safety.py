"""A stranger's LeRobotDataset: nothing outside its folder is opened, no size is believed."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vla_trqam.data.sources.lerobot.safety import DatasetFolder, read_info
from vla_trqam.errors import UserError

from .lerobot_files import (
    DATA,
    EPISODES,
    LENGTH,
    TASKS,
    VIDEO,
    Written,
    edit_column,
    edit_info,
    open_dataset,
    png,
    setting,
    write_video,
)

SECRET = 200


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Written(images=["front"]).write(tmp_path / "set")


@pytest.fixture
def with_video(tmp_path: Path) -> Path:
    return Written(videos=["front"]).write(tmp_path / "filmed")


@pytest.mark.parametrize(
    "template",
    [
        "/etc/{chunk_index}/{file_index}",
        "../{chunk_index}/{file_index}",
        "data/../../{chunk_index}",
        "data/{chunk_index.__class__}/{file_index}",
        "data/{chunk_index[0]}",
        "data/{chunk_index!r}",
        "data/{file_index:>1000000000}",
        "data/{file_index:0999999999d}",
        "data/{file_index:{chunk_index}}",
        "data/{0}/{1}",
        "data/{}",
        "data/{other}",
        "data/{chunk_index",
        "data\\{chunk_index}",
        "data/\0{chunk_index}",
        "x" * 1000,
        7,
    ],
)
@pytest.mark.parametrize("name", ["data_path", "video_path"])
def test_paths_have_no_other_places_and_stay_inside(root: Path, name: str, template: Any) -> None:
    edit_info(root, lambda info: info.update({name: template}))
    with pytest.raises(UserError, match=f"info.json says {name} is .* path in the dataset's"):
        open_dataset(root)


def test_a_camera_has_no_place_in_the_path_of_a_table(root: Path) -> None:
    edit_info(root, lambda info: info.update(data_path="data/{video_key}/{file_index}"))
    with pytest.raises(UserError, match="data_path"):
        open_dataset(root)


@pytest.mark.parametrize("name", ["../../out", "a/b", "..", "", "a\\b", "a\x1b[2J", "a\nb"])
def test_a_camera_whose_name_is_a_path_is_refused(with_video: Path, name: str) -> None:
    def rename(info: dict[str, Any]) -> None:
        info["features"][name] = info["features"].pop("front")

    edit_info(with_video, rename)
    with pytest.raises(UserError, match="a name that no folder can bear"):
        open_dataset(with_video)


@pytest.mark.parametrize("name", ["meta/info.json", DATA, EPISODES, "meta/tasks.parquet"])
def test_links_that_leave_the_folder_are_not_followed(
    root: Path, tmp_path: Path, name: str
) -> None:
    shutil.move(root / name, tmp_path / "outside")
    (root / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=f"{name} .* leads out of its folder"):
        open_dataset(root)


def test_folders_and_videos_that_are_links_are_not_followed_either(
    with_video: Path, tmp_path: Path
) -> None:
    shutil.move(with_video / "videos", tmp_path / "elsewhere")
    (with_video / "videos").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"front/chunk-000/file-000.mp4 .* leads out"):
        open_dataset(with_video).check_cameras()


def test_links_in_a_circle_are_refused(root: Path) -> None:
    (root / DATA).unlink()
    (root / DATA).symlink_to(root / DATA)
    with pytest.raises(UserError, match=f"{DATA}"):
        open_dataset(root)


def test_the_links_of_the_hubs_cache_are_followed_and_no_others(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "datasets--user--name"
    snapshot = Written(images=["front"]).write(repo / "snapshots" / "0123abc")
    whole = np.asarray(open_dataset(snapshot).episode(1).images["front"])
    (repo / "blobs").mkdir()
    shutil.move(snapshot / DATA, repo / "blobs" / "b")
    (snapshot / DATA).symlink_to("../../../../blobs/b")
    assert np.array_equal(open_dataset(snapshot).episode(1).images["front"], whole)
    shutil.move(repo / "blobs" / "b", tmp_path / "hub" / "b")
    (snapshot / DATA).unlink()
    (snapshot / DATA).symlink_to("../../../../../b")
    with pytest.raises(UserError, match="leads out of its folder"):
        open_dataset(snapshot)


@pytest.mark.parametrize("address", ["local", "http://127.0.0.1:9/x.png"])
@pytest.mark.parametrize("check", [True, False])
def test_images_are_taken_from_the_table_alone(
    root: Path, tmp_path: Path, address: str, check: bool
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(np.full((32, 32, 3), SECRET, np.uint8)))
    path = str(secret) if address == "local" else address
    row = 0 if check else 9
    edit_column(root / DATA, "front", setting(row, {"bytes": None, "path": path}))
    reader = open_dataset(root)

    def decoded() -> np.ndarray:
        return np.concatenate([episode.images["front"] for episode in reader.episodes()])

    read: Callable[[], Any] = reader.check_cameras if check else decoded
    with pytest.raises(UserError, match=r"episode \d, frame \d refers to .* in 'front' instead of"):
        read()


def test_a_column_of_names_holds_no_images(root: Path, tmp_path: Path) -> None:
    names = [str(tmp_path / "secret.png")] * 4 * LENGTH
    edit_column(root / DATA, "front", lambda _: names, pa.string())
    with pytest.raises(UserError, match="instead of holding the image"):
        open_dataset(root).check_cameras()


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {}\n",
    ],
)
def test_a_playlist_that_calls_itself_a_video_is_not_followed(with_video: Path, text: str) -> None:
    video = with_video / VIDEO.format("front")
    shutil.move(video, video.with_name("other.mp4"))
    video.write_text(text.format("other.mp4"))
    with pytest.raises(UserError, match=r"file-000.mp4 cannot be decoded"):
        open_dataset(with_video).check_cameras()


def test_a_video_of_another_kind_is_not_guessed_at(with_video: Path) -> None:
    edit_info(with_video, lambda info: info.update(video_path="videos/{video_key}.m3u8"))
    (with_video / "videos/front.m3u8").write_text("#EXTM3U\n")
    with pytest.raises(UserError, match=r"front.m3u8 is not a video that is read here: .mp4"):
        open_dataset(with_video).check_cameras()


def small(values: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda info: info.update(values)


def of_feature(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda info: info["features"][name].update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (small({"fps": 0}), "fps is 0; it must be above 0 and at most 1000"),
        (small({"fps": 1001}), "fps is 1001"),
        (small({"fps": float("nan")}), "fps is nan"),
        (small({"fps": "10"}), "fps is '10'"),
        (small({"fps": True}), "fps is True"),
        (small({"fps": None}), "fps is missing"),
        (small({"total_frames": 10**12}), "total_frames is 1000000000000; it must be 1 to"),
        (small({"total_episodes": 0}), "total_episodes is 0"),
        (small({"total_episodes": 2.5}), "total_episodes is 2.5"),
        (small({"features": []}), "names no features"),
        (small({"features": {"a": 3}}), "its feature 'a' names no dtype"),
        (small({"codebase_version": "v9.0"}), "of version 'v9.0'; v3 is"),
        (small({"codebase_version": 3}), "names no codebase_version"),
        (of_feature("action", shape=[10**9]), "declares 'action' with 1000000000 numbers"),
        (of_feature("action", shape=[0]), "declares 'action' with 0 numbers"),
        (of_feature("action", shape=[2, 2]), "has no vector 'action'"),
        (of_feature("action", shape="2"), "has no vector 'action'"),
        (of_feature("front", shape=[10**6, 10**6, 3]), "1000000 x 1000000 pixels"),
        (of_feature("front", shape=[32, -32, 3]), "32 x -32 pixels"),
        (of_feature("front", shape=[32, 32, 5]), "of 5 channels"),
        (of_feature("front", shape=[32, 32]), r"the shape \[32, 32\]; a picture has"),
        (of_feature("front", shape=None), r"the shape \[\]"),
    ],
)
def test_what_cannot_be_is_refused_before_a_table_is_opened(
    root: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit_info(root, edit)
    (root / DATA).unlink()
    with pytest.raises(UserError, match=message):
        open_dataset(root)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\xff", "[" * 100_000, '{"codebase_version": null}']
)
def test_damaged_descriptions_are_one_sentence(root: Path, text: str) -> None:
    (root / "meta/info.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"info.json is damaged"):
        read_info(DatasetFolder(root), "local/x")


def test_a_table_with_more_rows_than_bytes_is_not_read(root: Path) -> None:
    count = 10**6
    table = pa.table({name: np.zeros(count, np.int64) for name in ("episode_index", "frame_index")})
    pq.write_table(table, root / DATA)
    assert (root / DATA).stat().st_size < count
    with pytest.raises(UserError, match=r"declares 1000000 rows and has .* bytes, too few"):
        open_dataset(root)


def test_an_image_that_unpacks_to_much_more_is_not_unpacked(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = png(np.zeros((6000, 6000, 3), np.uint8))
    edit_column(root / DATA, "front", setting(0, {"bytes": bomb, "path": None}))

    def load(self: Image.Image) -> None:
        raise AssertionError("unpacked")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(UserError, match=r"32 x 32 x 3 .* frame 0 shows 6000 x 6000 x 3"):
        open_dataset(root).check_cameras()


def test_a_table_that_unpacks_to_much_more_is_not_unpacked(root: Path) -> None:
    held = [{"bytes": bytes(3 * 10**6), "path": str(row)} for row in range(4 * LENGTH)]
    whole = pq.read_table(root / DATA)
    number = whole.column_names.index("front")
    table = whole.set_column(number, "front", pa.array(held))
    pq.write_table(table, root / DATA, compression="zstd", use_dictionary=False)
    with pytest.raises(
        UserError, match=r"declares 72\d* bytes unpacked and has \d+ bytes, too few"
    ):
        open_dataset(root)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_what_is_no_image_is_one_sentence(root: Path, data: bytes) -> None:
    edit_column(root / DATA, "front", setting(0, {"bytes": data, "path": None}))
    message = "episode 0, frame 0 holds an image of the camera front that cannot be decoded"
    with pytest.raises(UserError, match=message):
        open_dataset(root).check_cameras()


def test_formats_that_run_other_programs_are_not_read(root: Path) -> None:
    held = io.BytesIO()
    Image.new("RGB", (32, 32)).save(held, "EPS")
    edit_column(root / DATA, "front", setting(0, {"bytes": held.getvalue(), "path": None}))
    with pytest.raises(UserError, match="PNG, JPEG, WEBP are read here"):
        open_dataset(root).check_cameras()


def test_a_video_larger_than_declared_is_not_decoded(with_video: Path) -> None:
    path = with_video / VIDEO.format("front")
    write_video(path, (np.zeros((512, 512, 3), np.uint8) for _ in range(4 * LENGTH)))
    with pytest.raises(UserError, match=r"camera front is declared with 32 x 32 x 3 .*512 x 512 x"):
        open_dataset(with_video).check_cameras()


@pytest.mark.parametrize("name", [DATA, EPISODES, TASKS, "meta/info.json"])
def test_damage_of_any_kind_is_one_sentence(root: Path, name: str) -> None:
    """Seeded, so that what is found once is found again."""
    rng, whole, told = np.random.default_rng(3), (root / name).read_bytes(), list[str]()
    for _ in range(60):
        spoilt = bytearray(whole)
        for place in rng.integers(len(whole), size=rng.integers(1, 20)):
            spoilt[place] = rng.integers(256)
        (root / name).write_bytes(spoilt)
        try:
            reader = open_dataset(root)
            reader.check_cameras()
            list(reader.episodes())
        except UserError as error:
            told.append(str(error))
    assert len(told) > 30
    assert all(text.isprintable() for text in told)
