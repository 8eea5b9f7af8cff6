import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vla_trqam.data.sources.robomimic.official import (
    OFFICIAL_DATASETS,
    download_official,
    official_dataset,
)
from vla_trqam.errors import UserError

CONTENT = b"what the Hub holds under this name"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HELD = "/datasets/robomimic/robomimic_datasets/resolve/main/v1.5/can/mg/low_dim_sparse_v15.hdf5"


class Hub(BaseHTTPRequestHandler):
    """Answers for one file as the Hugging Face Hub does, 404 for the others."""

    def do_HEAD(self) -> None:
        held = self.path == HELD
        self.send_response(200 if held else 404)
        self.send_header("Content-Length", str(len(CONTENT) if held else 0))
        if held:
            self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        if self.path == HELD:
            self.wfile.write(CONTENT)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in must be asked even where the tests run with the Hub switched off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_dataset_is_downloaded_once_and_then_found_without_the_hub(
    hub: str, tmp_path: Path
) -> None:
    path = download_official("can/mg", cache_dir=tmp_path, endpoint=hub)
    assert path.name == "low_dim_sparse_v15.hdf5"
    assert path.read_bytes() == CONTENT
    nowhere = "http://127.0.0.1:9"
    assert download_official("can/mg", cache_dir=tmp_path, endpoint=nowhere) == path


def test_hub_that_does_not_answer_is_one_clear_error(tmp_path: Path) -> None:
    message = r"'lift/ph' cannot be had.*v1\.5/lift/ph/low_dim_v15\.hdf5.*--dataset\.path"
    with pytest.raises(UserError, match=message):
        download_official("lift/ph", cache_dir=tmp_path, endpoint="http://127.0.0.1:9")


def test_hub_without_the_file_is_one_clear_error(hub: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'lift/mh' cannot be had.*404.*--dataset\.path"):
        download_official("lift/mh", cache_dir=tmp_path, endpoint=hub)


def test_hub_switched_off_by_the_user_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'can/ph' cannot be had.*--dataset\.path"):
        download_official("can/ph", cache_dir=tmp_path)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'lift/xx'; there are: can/mg, .*lift/ph, .*transport/ph"):
        official_dataset("lift/xx")
    with pytest.raises(UserError, match="'stack/ph'"):
        download_official("stack/ph")


def test_known_names_are_those_robomimic_registers() -> None:
    robomimic = pytest.importorskip("robomimic")
    registered = {
        f"{task}/{kind}": {"low_dim", "low_dim_sparse"} & set(files)
        for task, kinds in robomimic.DATASET_REGISTRY.items()
        for kind, files in kinds.items()
        if not task.endswith("_real")
    }
    assert set(OFFICIAL_DATASETS) == set(registered)
    for name, dataset in OFFICIAL_DATASETS.items():
        task, kind = name.split("/")
        (file,) = registered[name]
        assert dataset.filename == f"v1.5/{name}/{file}_v15.hdf5"
        assert dataset.horizon == robomimic.DATASET_REGISTRY[task][kind][file]["horizon"]


def test_both_arms_are_observed_where_there_are_two() -> None:
    assert official_dataset("lift/ph").obs_keys == (
        "robot0_eef_pos",
        "robot0_eef_quat",
        "robot0_gripper_qpos",
        "object",
    )
    assert "robot1_eef_pos" in official_dataset("transport/mh").obs_keys
