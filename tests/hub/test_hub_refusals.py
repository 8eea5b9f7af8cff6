"""What cannot be pushed or pulled is refused in one sentence, before anything is sent."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
from hub_fixtures import REPO, SENDS_DEPRECATED, TOKEN, hub, nothing_sent, push, refused, run
from hub_server import HubServer, Repository
from pushed_run import CONFIG, make_adapter, write_run

from vla_trqam.hub.access import check_push
from vla_trqam.hub.pull import pull_checkpoint
from vla_trqam.hub.push import push_checkpoint

__all__ = ["hub", "run"]  # fixtures
pytestmark = SENDS_DEPRECATED


# Who may do what.


@pytest.mark.parametrize("existing", [False, True])
def test_a_token_that_may_only_read_is_told_before_anything_is_sent(
    hub: HubServer, run: Path, existing: bool
):
    hub.tokens[TOKEN].role = "read"
    if existing:
        hub.repos[REPO] = Repository(private=False)
    message = refused(lambda: push(hub, run))
    assert "token of alice may only read" in message
    assert "https://huggingface.co/settings/tokens" in message
    assert nothing_sent(hub)


@pytest.mark.parametrize("existing", [False, True])
def test_a_fine_grained_token_without_the_permission_is_told_before_anything_is_sent(
    hub: HubServer, run: Path, existing: bool
):
    hub.tokens[TOKEN].role, hub.echo_token = "fineGrained", True
    if existing:
        hub.repos[REPO] = Repository(private=False)
    message = refused(lambda: push(hub, run))
    expects = "may not write to it" if existing else "the token has no permission for this (403"
    assert expects in message
    assert nothing_sent(hub)
    assert not any("preupload" in path for _, path in hub.requests)


@pytest.mark.parametrize("method", ["fql", "ifql", "dsrl", "best_of_n", "cgql", "cgql_l"])
def test_a_policy_beside_which_other_networks_act_is_refused(
    hub: HubServer, tmp_path: Path, method: str
):
    settings = {k: v for k, v in CONFIG.items() if k != "trqam"} | {"method": {"type": method}}
    folder = write_run(tmp_path / "run_of_another", config=settings)
    message = refused(lambda: push(hub, folder))
    assert f"would push a policy that acts as its base does: what {method} learns" in message
    assert nothing_sent(hub)


def test_somebody_elses_repository_is_refused(hub: HubServer, run: Path):
    hub.repos["bob/lift"] = Repository(private=False)
    message = refused(lambda: push(hub, run, repo_id="bob/lift"))
    assert "bob/lift exists and the token of alice may not write to it" in message
    assert nothing_sent(hub)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_name_under_somebody_else_is_refused_with_names_that_would_do(
    hub: HubServer, run: Path, hidden: bool
):
    if hidden:  # a private repository of another looks like none
        hub.repos["bob/lift"] = Repository(private=True)
    message = refused(lambda: push(hub, run, repo_id="bob/lift"))
    assert "choose --repo_id=alice/lift or lab/lift" in message
    assert nothing_sent(hub)


def test_an_unknown_token_is_refused(hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped")
    assert "does not know the token" in refused(lambda: push(hub, run))


def test_without_a_token_it_says_where_to_get_one(
    hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(lambda: push(hub, run))
    assert hub.requests == []


def test_a_visibility_that_a_push_cannot_give_is_refused(hub: HubServer, run: Path):
    hub.repos[REPO] = Repository(private=False)
    message = refused(lambda: push(hub, run, private=True))
    assert "is public, a push does not make it private" in message
    push(hub, run)


@pytest.mark.parametrize("name", ["lift", "a/b/c", "alice/li ft", "/lift", "alice/", "../x", ""])
def test_a_malformed_name_is_refused_without_asking_the_hub(hub: HubServer, run: Path, name: str):
    message = refused(lambda: push(hub, run, repo_id=name))
    assert f"--repo_id={name} is not of the form USER/NAME" in message
    assert hub.requests == []


def test_a_hub_that_does_not_answer_is_one_sentence(run: Path, tmp_path: Path, hub: HubServer):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    for call in (
        lambda: push_checkpoint(run, REPO, endpoint=endpoint),
        lambda: pull_checkpoint(REPO, tmp_path / "pulled", endpoint=endpoint),
    ):
        assert f"the Hub at {endpoint} does not answer" in refused(call)


def test_a_user_who_wants_to_be_offline_is_told_so(
    hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert "HF_HUB_OFFLINE is set" in refused(lambda: push(hub, run))
    assert hub.requests == []


def test_a_hub_without_xet_is_one_sentence_that_says_how_to_do_without(
    hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    assert "HF_HUB_DISABLE_XET=1 does without Xet" in refused(lambda: push(hub, run))


def test_a_full_disk_is_one_sentence_and_leaves_no_folder(
    hub: HubServer, run: Path, tmp_path: Path
):
    push(hub, run)
    folder, full = tmp_path / "pulled", OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("shutil.copyfile", side_effect=full):
        message = refused(lambda: pull_checkpoint(REPO, folder, endpoint=hub.endpoint))
    assert f"--folder={folder} cannot be written: No space left on device" in message
    with mock.patch("huggingface_hub.HfApi.snapshot_download", side_effect=full):
        message = refused(lambda: pull_checkpoint(REPO, folder, endpoint=hub.endpoint))
    assert "could not be read or written" in message
    assert list(tmp_path.glob("*pulled*")) == []


def test_check_push_finds_out_without_creating_anything(hub: HubServer):
    access = check_push(REPO, endpoint=hub.endpoint)
    assert (access.user, access.private, access.url) == ("alice", None, f"{hub.endpoint}/{REPO}")
    assert hub.repos == {}
    hub.repos[REPO] = Repository(private=True)
    assert check_push(REPO, endpoint=hub.endpoint).private is True


def test_what_is_no_pushed_checkpoint_is_not_pulled(hub: HubServer, run: Path, tmp_path: Path):
    hub.repos["lab/pi0"] = Repository(private=False, commits=[{"config.json": b"{}"}])
    folder = tmp_path / "pulled"
    message = refused(lambda: pull_checkpoint("lab/pi0", folder, endpoint=hub.endpoint))
    assert "lab/pi0 has no algorithm/ folder" in message
    message = refused(lambda: pull_checkpoint("lab/none", folder, endpoint=hub.endpoint))
    assert "shows no such repository" in message
    push(hub, run)
    wrong = {"revision": "v9", "endpoint": hub.endpoint}
    assert "no such revision" in refused(lambda: pull_checkpoint(REPO, folder, **wrong))
    folder.mkdir()
    assert "exists" in refused(lambda: pull_checkpoint(REPO, folder, endpoint=hub.endpoint))


# What cannot be pushed.


def drop_weights(run: Path) -> None:
    (run / "checkpoints/last/pretrained_model/model.safetensors").unlink()


def drop_checkpoints(run: Path) -> None:
    (run / "checkpoints").rename(run / "gone")


def drop_metrics(run: Path) -> None:
    (run / "metrics.jsonl").unlink()


def damage_report(run: Path) -> None:
    (run / "report.json").write_text("{")


def damage_processor(run: Path) -> None:
    (run / "checkpoints/last/pretrained_model/policy_preprocessor.json").write_text("{")


def need_a_tokenizer_of_this_machine(run: Path) -> None:
    path = run / "checkpoints/last/pretrained_model/policy_preprocessor.json"
    path.write_text(json.dumps({"steps": [{"config": {"tokenizer_name": str(run)}}]}))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (drop_weights, "has neither model.safetensors nor adapter_model.safetensors"),
        (drop_checkpoints, "has no checkpoint yet"),
        (drop_metrics, "metrics.jsonl does not exist"),
        (damage_processor, "policy_preprocessor.json is not JSON"),
        (damage_report, "report.json cannot be read"),
        (lambda run: (run / "config.yaml").unlink(), "is not the folder of a run"),
        (lambda run: make_adapter(run, str(run)), "push the whole policy by --merged=true"),
        (need_a_tokenizer_of_this_machine, "--tokenizer=NAME tells the Hub's name of the same one"),
        (lambda run: make_adapter(run, REPO), "is the base policy's own repository"),
    ],
)
def test_a_run_that_cannot_be_pushed_is_refused_before_anything_is_sent(
    hub: HubServer, run: Path, spoil: Callable[[Path], Any], sentence: str
):
    spoil(run)
    assert sentence in refused(lambda: push(hub, run))
    assert nothing_sent(hub)


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(hub: HubServer, run: Path):
    message = refused(lambda: push(hub, run, checkpoint="000070"))
    assert "--checkpoint=000070 is none of 000050, 000100" in message
