"""What the tests of push and pull share: the stand-in as the Hub, a run, and what to expect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_server import HubServer, User
from pushed_run import write_run

from vla_trqam.errors import UserError
from vla_trqam.hub.push import Pushed, push_checkpoint

TOKEN = "hf_thisIsAliceHerSecretToken"
REPO = "alice/lift"
# How huggingface_hub itself sends a file.
SENDS_DEPRECATED = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def take_for_the_hub(server: HubServer, patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Points huggingface_hub at the stand-in, as its environment variables would; alice logs in."""
    server.tokens[TOKEN] = User("alice", orgs=("lab",))
    constants = huggingface_hub.constants
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "ENDPOINT", server.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no_token"))
    patch.setenv("HF_TOKEN", TOKEN)
    # The waits between two attempts of huggingface_hub.
    patch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        take_for_the_hub(server, monkeypatch, tmp_path)
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def push(hub: HubServer, run: Path, **changes: Any) -> Pushed:
    return push_checkpoint(run, **({"repo_id": REPO, "endpoint": hub.endpoint} | changes))


def refused(call: Callable[[], Any]) -> str:
    """The sentence of a refusal."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert TOKEN not in message
    return message


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def expected(run: Path, checkpoint: str = "last") -> dict[str, bytes]:
    """What the repository must hold, but for the card."""
    saved = run / "checkpoints" / checkpoint
    files = contents(saved / "pretrained_model")
    files |= {f"algorithm/{k}": v for k, v in contents(saved / "algorithm").items()}
    files |= {f"plots/{k}": v for k, v in contents(run / "plots").items()}
    named = ("config.yaml", "metrics.jsonl", "report.json")
    return files | {f"run/{k}": (run / k).read_bytes() for k in named if (run / k).exists()}


def without_card(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if path != "README.md"}


def nothing_sent(hub: HubServer) -> bool:
    return not hub.uploaded and all(len(repo.commits) == 1 for repo in hub.repos.values())
