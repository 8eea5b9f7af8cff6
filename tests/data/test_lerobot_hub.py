"""Where a LeRobotDataset is looked for; the Hub is played by a folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from vla_trqam.data.sources.lerobot.source import LeRobotConfig, LeRobotReader
from vla_trqam.errors import UserError

from .lerobot_files import DATA, VIDEO, Written

pytestmark = pytest.mark.slow  # LeRobot's constants come with torch and the Hub's client

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FolderAsHub:
    """Stands in for `snapshot_download` and `dataset_info`.

    Attributes:
        downloads: revision and patterns of each call.
        asked: revisions that were to be resolved.
    """

    def __init__(self, source: Path, cache: Path) -> None:
        self.source, self.root = source, cache / "datasets--user--name" / "snapshots" / COMMIT
        self.downloads: list[tuple[str, list[str]]] = []
        self.asked: list[str] = []

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.downloads.append((options["revision"], options["allow_patterns"]))
        for pattern in options["allow_patterns"]:
            for path in self.source.glob(pattern.replace("meta/*", "meta/**/*")):
                target = self.root / path.relative_to(self.source)
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.is_file():
                    shutil.copyfile(path, target)
        return str(self.root)

    def dataset_info(self, repo_id: str, *, revision: str) -> Any:
        self.asked.append(revision)
        return type("Info", (), {"sha": COMMIT})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderAsHub:
    import huggingface_hub
    import lerobot.datasets.utils
    import lerobot.utils.constants

    written = Written(videos=["front", "side"]).write(tmp_path / "source")
    hub = FolderAsHub(written, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "dataset_info",
        lambda _, *a, **options: hub.dataset_info(*a, **options),
    )
    monkeypatch.setattr(lerobot.datasets.utils, "get_safe_version", lambda *_: "v3.0")
    monkeypatch.setattr(lerobot.utils.constants, "HF_LEROBOT_HOME", tmp_path / "home")
    return hub


def open_hub(**config: Any) -> LeRobotReader:
    return LeRobotReader(LeRobotConfig("user/name", reward="terminal_success", **config))


@pytest.mark.parametrize(("asked", "resolved"), [(None, "v3.0"), ("main", "main")])
def test_a_revision_is_resolved_to_a_commit_and_that_is_read(
    hub: FolderAsHub, asked: str | None, resolved: str
) -> None:
    reader = open_hub(revision=asked)
    assert hub.asked == [resolved]
    assert reader.revision == COMMIT
    assert [revision for revision, _ in hub.downloads] == [resolved, COMMIT]
    assert reader.episode(3).observations[0].tolist() == [3, 0]


def test_only_what_is_read_is_downloaded(hub: FolderAsHub) -> None:
    reader = open_hub(looked_through=("front",))
    reader.check_cameras()
    list(reader.episodes())
    wanted = [pattern for _, patterns in hub.downloads for pattern in patterns]
    assert wanted == ["meta/*", DATA, VIDEO.format("front")]


def test_offline_the_caches_copy_of_the_revision_is_read(
    hub: FolderAsHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_hub().revision == COMMIT
    assert hub.asked == []
    assert hub.downloads[0][0] == "v3.0"


def test_lerobots_own_folder_comes_before_the_hub_unless_a_revision_is_asked_for(
    hub: FolderAsHub, tmp_path: Path
) -> None:
    shutil.copytree(hub.source, tmp_path / "home" / "user" / "name")
    assert open_hub().revision is None
    assert hub.downloads == []
    assert open_hub(revision="main").revision == COMMIT


def test_a_folder_of_this_machine_has_no_revision(tmp_path: Path, hub: FolderAsHub) -> None:
    assert open_hub(root=hub.source).revision is None
    with pytest.raises(UserError, match=r"revision=main is of the Hub and --dataset.root="):
        open_hub(root=hub.source, revision="main")


def test_what_the_hub_does_not_give_is_one_sentence(
    hub: FolderAsHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    def failing(error: Exception) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        return fail

    gone = httpx.Response(404, request=httpx.Request("GET", "http://x"))
    error = RevisionNotFoundError("no", response=gone)
    monkeypatch.setattr(HfApi, "dataset_info", failing(error))
    with pytest.raises(UserError, match="The dataset user/name has no revision 'nowhere' on the"):
        open_hub(revision="nowhere")
    monkeypatch.setattr(HfApi, "dataset_info", failing(httpx.ConnectError("no route")))
    with pytest.raises(
        UserError, match=r"cannot be opened \(ConnectError: no route\).*does the Hub"
    ):
        open_hub()
