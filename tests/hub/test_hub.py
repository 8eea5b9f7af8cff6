"""Push and pull against a local stand-in of the Hub: nothing is lost, and a failure says more."""

from __future__ import annotations

import json
import logging
import re
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from hub_fixtures import (
    REPO,
    SENDS_DEPRECATED,
    TOKEN,
    contents,
    expected,
    hub,
    push,
    refused,
    run,
    without_card,
)
from hub_server import Breakdown, HubServer, Repository
from pushed_run import CONFIG, make_adapter, write_run
from vla_trqam.recipes import hub as recipe

from vla_trqam.errors import UserError
from vla_trqam.hub.pull import load_algorithm, pull_algorithm, pull_checkpoint

__all__ = ["hub", "run"]  # fixtures
pytestmark = SENDS_DEPRECATED
SAME_BYTES = ("pretrained_model", "algorithm")


# There and back.


def test_a_pushed_checkpoint_lies_in_lerobots_layout_in_one_commit(hub: HubServer, run: Path):
    pushed = push(hub, run)
    assert pushed.url == f"{hub.endpoint}/{REPO}"
    files = hub.repos[REPO].files
    assert without_card(files) == expected(run)
    assert files["README.md"].decode().startswith("---\n")
    assert len(hub.repos[REPO].commits) == 2  # the empty one, and this
    assert pushed.commit == hub.repos[REPO].sha()


def test_a_pulled_checkpoint_has_the_bytes_of_the_pushed_one(
    hub: HubServer, run: Path, tmp_path: Path
):
    push(hub, run)
    folder = pull_checkpoint(REPO, tmp_path / "pulled", endpoint=hub.endpoint)
    saved = run / "checkpoints/last"
    assert sorted(path.name for path in folder.iterdir()) == sorted(SAME_BYTES)
    for part in SAME_BYTES:
        assert contents(folder / part) == contents(saved / part)
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_an_older_revision_can_be_pulled(hub: HubServer, run: Path, tmp_path: Path):
    first = push(hub, run, checkpoint="000050")
    push(hub, run)
    assert without_card(hub.repos[REPO].files) == expected(run)
    folder = pull_checkpoint(REPO, tmp_path / "old", revision=first.commit, endpoint=hub.endpoint)
    saved = run / "checkpoints/000050"
    assert contents(folder / "algorithm") == contents(saved / "algorithm")


def test_the_algorithm_alone_can_be_pulled(hub: HubServer, run: Path):
    push(hub, run)
    before = len(hub.requests)
    folder = pull_algorithm(REPO, endpoint=hub.endpoint)
    assert contents(folder) == contents(run / "checkpoints/last/algorithm")
    assert not any("model.safetensors" in path for _, path in hub.requests[before:])


def test_a_learner_goes_on_with_the_critic_and_the_trust_region(run: Path):
    learner = mock.Mock(critic=torch.nn.Linear(3, 1, bias=False))
    algorithm = run / "checkpoints/last/algorithm"
    learner.critic.weight = torch.nn.Parameter(torch.zeros(3))
    load_algorithm(algorithm, learner)  # type: ignore[arg-type]
    assert torch.equal(learner.critic.weight, torch.full((3,), 100.0))
    learner.load_scalars.assert_called_once_with({"lam": 3.0})
    load_algorithm(algorithm, learner, trust_region=False)  # type: ignore[arg-type]
    assert learner.load_scalars.call_count == 1
    learner.critic = torch.nn.Linear(4, 2)
    message = refused(lambda: load_algorithm(algorithm, learner))  # type: ignore[arg-type]
    assert "does not fit this run's critic" in message


def test_a_second_push_sends_no_large_file_again_and_makes_no_commit(hub: HubServer, run: Path):
    first = push(hub, run)
    sent = list(hub.uploaded)
    again = push(hub, run)
    assert hub.uploaded == sent
    assert again.commit == first.commit
    assert len(hub.repos[REPO].commits) == 2


def test_a_whole_policy_replaces_adapters_and_leaves_foreign_files(hub: HubServer, run: Path):
    make_adapter(run, "lab/pi0")
    push(hub, run)
    hub.repos[REPO].files.update({"demo.mp4": b"film", "notes/config.json": b"{}"})
    push(hub, run, checkpoint="000050")
    files = hub.repos[REPO].files
    assert files.pop("demo.mp4") == b"film"
    assert files.pop("notes/config.json") == b"{}"
    assert without_card(files) == expected(run, "000050")


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_is_private_where_asked(hub: HubServer, run: Path, private: bool):
    push(hub, run, private=private)
    assert hub.repos[REPO].private is private
    push(hub, run, private=private)


def test_an_organisation_of_the_user_can_be_pushed_to(hub: HubServer, run: Path):
    push(hub, run, repo_id="lab/lift")
    assert without_card(hub.repos["lab/lift"].files) == expected(run)


# A push that fails half-way.


def clean_requests(hub: HubServer, run: Path) -> int:
    push(hub, run)
    count = len(hub.requests)
    hub.repos.clear(), hub.large.clear(), hub.uploaded.clear(), hub.requests.clear()
    return count


@pytest.mark.parametrize("failure", ["500", "drop"])
def test_wherever_a_push_breaks_off_the_same_push_completes_it(
    hub: HubServer, run: Path, failure: Breakdown
):
    before = contents(run)
    count = clean_requests(hub, run)
    for number in range(count):
        hub.break_down = (number, failure)
        message = refused(lambda: push(hub, run))
        # The three first requests ask who may write where and for the licence of the base.
        if number >= 3:
            assert f"nothing of {run} is lost" in message
            assert f"python -m vla_trqam.recipes.hub push --run={run} --repo_id={REPO}" in message
        assert ("failed (500" if failure == "500" else "does not answer") in message
        if REPO in hub.repos:
            assert len(hub.repos[REPO].commits) == 1, "half a checkpoint became visible"
        hub.break_down = None
        push(hub, run)
        assert without_card(hub.repos[REPO].files) == expected(run)
        assert len(hub.uploaded) == len(set(hub.uploaded)), "a large file was sent twice"
        hub.repos.clear(), hub.large.clear(), hub.uploaded.clear(), hub.requests.clear()
    assert contents(run) == before


def test_the_command_to_go_on_with_does_the_same_push(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
):
    count = clean_requests(hub, run)
    hub.break_down = (count - 2, "500")  # its last request: it asks for no licence
    wish = {"private": True, "checkpoint": "000050", "license_name": "mit"}
    message = refused(lambda: push(hub, run, **wish))
    hub.break_down = None
    command = message[message.index("python -m vla_trqam.recipes.hub ") :].split()
    assert recipe.main(command[3:]) == 0
    assert f"pushed to {hub.endpoint}/{REPO}" in capsys.readouterr().out
    assert hub.repos[REPO].private
    assert without_card(hub.repos[REPO].files) == expected(run, "000050")
    assert b"license: mit" in hub.repos[REPO].files["README.md"]


def test_an_interrupted_push_says_how_to_go_on(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
):
    target = "huggingface_hub.HfApi.create_commit"
    flags = ["push", f"--run={run}", f"--repo_id={REPO}"]
    with mock.patch(target, side_effect=KeyboardInterrupt):
        assert recipe.main(flags) == 130
    said = capsys.readouterr().err
    assert f"the push to {REPO} was interrupted" in said
    assert f"python -m vla_trqam.recipes.hub push --run={run} --repo_id={REPO}" in said


def test_an_interrupted_pull_leaves_no_folder_and_the_next_completes_it(
    hub: HubServer, run: Path, tmp_path: Path
):
    push(hub, run)
    begin = len(hub.requests)
    pull_algorithm(REPO, endpoint=hub.endpoint)
    half = (begin + len(hub.requests)) // 2 - begin
    hub.break_down = (len(hub.requests) + half, "500")
    folder = tmp_path / "pulled"
    refused(lambda: pull_checkpoint(REPO, folder, endpoint=hub.endpoint))
    assert not folder.exists()
    hub.break_down = None
    pull_checkpoint(REPO, folder, endpoint=hub.endpoint)
    for part in SAME_BYTES:
        assert contents(folder / part) == contents(run / "checkpoints/last" / part)


# The licence, and the token.


def test_the_licence_is_that_of_the_bases_card(hub: HubServer, run: Path):
    card = b"---\nlicense: gemma\n---\n# base\n"
    hub.repos["lab/pi0"] = Repository(private=False, commits=[{"README.md": card}])
    push(hub, run)
    assert b"license: gemma" in hub.repos[REPO].files["README.md"]


def test_a_licence_that_nobody_knows_is_not_made_up(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
):
    push(hub, run)
    card = hub.repos[REPO].files["README.md"].decode()
    assert "license:" not in card
    assert "licence: that of the base policy, which does not say which" in card
    assert "the licence of lab/pi0 is not known" in capsys.readouterr().out


def test_the_token_reaches_no_file_log_or_message(
    hub: HubServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    caplog.set_level(logging.DEBUG)
    push(hub, write_run(tmp_path / "first"))
    hub.echo_token = True
    # At this level httpcore shows whatever a careless server answers.
    caplog.set_level(logging.INFO)
    # A careless user gave it as a flag, so the run's report has it.
    run = write_run(tmp_path / "run", config=CONFIG | {"output_dir": "out"})
    report = json.loads((run / "report.json").read_text())
    report["provenance"]["command"] += f" --token={TOKEN}"
    (run / "report.json").write_text(json.dumps(report))
    message = refused(lambda: push(hub, run))
    assert "report.json holds the Hugging Face token" in message
    report["provenance"]["command"] = "accelerate launch recipes/finetune_pi0.py"
    (run / "report.json").write_text(json.dumps(report))
    push(hub, run)
    for number in range(7):
        hub.requests.clear()
        hub.break_down = (number, "500")
        refused(lambda: push(hub, run, checkpoint="000050"))
    hub.break_down = None
    pull_checkpoint(REPO, tmp_path / "pulled", endpoint=hub.endpoint)
    hub.tokens[TOKEN].role = "fineGrained"
    with pytest.raises(UserError) as error:
        push(hub, run)
    told = "".join(traceback.format_exception(error.value))
    everywhere = [caplog.text, *capfd.readouterr(), told]
    assert not any(TOKEN in text for text in everywhere)
    written = contents(tmp_path) | {k: v for k, v in hub.repos[REPO].files.items()}
    assert not [name for name, content in written.items() if TOKEN.encode() in content]


# The command.


def test_a_dry_run_prints_files_and_card_and_asks_nothing_of_the_hub(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["push", f"--run={run}", f"--repo_id={REPO}", "--dry_run"]
    assert recipe.main(flags) == 0
    said = capsys.readouterr().out
    for path in (*expected(run), "README.md"):
        assert re.search(rf"\d+\.\d+ MB  {re.escape(path)}$", said, re.MULTILINE)
    assert "\nbase_model: lab/pi0\n" in said
    assert hub.requests == []


def test_push_and_pull_by_command(
    hub: HubServer, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert recipe.main(["push", "--run", str(run), "--repo_id", REPO, "--private"]) == 0
    assert hub.repos[REPO].private
    folder = tmp_path / "pulled"
    assert recipe.main(["pull", f"--repo_id={REPO}", f"--folder={folder}"]) == 0
    assert str(folder / "pretrained_model") in capsys.readouterr().out
    saved = run / "checkpoints/last/pretrained_model"
    assert contents(folder / "pretrained_model") == contents(saved)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["push"], "--run, --repo_id"),
        (["push", "--run=r", "--repo_id=alice/x", "--tokn=1"], "--tokn=1"),
        (["push", "--run=nowhere", "--repo_id=alice/x", "--dry_run"], "is not the folder of a run"),
        (["push", "--run=r", "--repo_id=alice/x", "--private=maybe"], "neither true nor false"),
        (["pull", "--repo_id=x", "--folder=f"], "not of the form USER/NAME"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_status_2(
    hub: HubServer, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
):
    assert recipe.main(flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert said.count("\n") == 1
