"""What is pushed names no folder, user or machine; what it says otherwise stays."""

import json
import platform
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_fixtures import REPO, SENDS_DEPRECATED, hub, push, refused  # noqa: F401 - a fixture
from hub_server import HubServer, Repository
from pushed_run import CONFIG, evaluation, write_run

from vla_trqam.hub.pull import pull_checkpoint
from vla_trqam.report.page import write_report
from vla_trqam.report.public_copy import public_copy, without_paths

MARKER, HOST = "ann-7f3a", "laptop-of-7f3a"


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/ann/data/lift", "<lift>"),
        ("/home/ann/my data/lift", "<lift>"),
        ("/home/ann/", "<ann>"),
        ("~/runs/one", "<one>"),
        ("~ann/runs", "<runs>"),
        ("../runs/one", "<one>"),
        ("saved in /home/ann/a, then /tmp/b", "saved in <a>, then <b>"),
        ("[/home/ann/a,/b/c]", "[<a>,<c>]"),
        ("file:///home/ann/x", "<x>"),
        # No paths of a machine.
        ("lab/pi0", "lab/pi0"),
        ("https://huggingface.co/lab/pi0", "https://huggingface.co/lab/pi0"),
        ("recipes/finetune_pi0.py", "recipes/finetune_pi0.py"),
        ("put it on the left/right, at 1 m/s", "put it on the left/right, at 1 m/s"),
        ("~5 steps", "~5 steps"),
        ("2.11.0+cu130", "2.11.0+cu130"),
    ],
)
def test_of_a_path_its_last_part_stays(text: str, public: str) -> None:
    assert without_paths(text) == public
    assert without_paths({"a": [{"b": text}]}) == {"a": [{"b": public}]}


@pytest.mark.parametrize(
    ("command", "public"),
    [
        (
            "/home/ann/.venv/bin/accelerate launch /home/ann/code/recipes/finetune_pi0.py "
            "--policy.path=lab/pi0 '--dataset.root=/home/ann/my data/lift' --seed=3",
            "accelerate launch recipes/finetune_pi0.py --policy.path=lab/pi0 "
            "'--dataset.root=<lift>' --seed=3",
        ),
        (
            "python /srv/own.py --output_dir /srv/out --x=[/a/b,/a/c]",
            "python own.py --output_dir '<out>' '--x=[<b>,<c>]'",
        ),
        ("python -m vla_trqam.recipes.hub push", "python -m vla_trqam.recipes.hub push"),
        ("echo 'unfinished /home/ann/x", "echo 'unfinished <x>"),
    ],
)
def test_a_command_stays_one_that_can_be_read(command: str, public: str) -> None:
    assert without_paths({"command": command}) == {"command": public}


def test_where_a_policy_was_read_from_is_forgotten() -> None:
    fields = {"pretrained_path": "/home/ann/base", "repo_id": "lab/pi0"}
    assert without_paths(fields) == {"pretrained_path": None, "repo_id": "lab/pi0"}
    assert without_paths({"pretrained_path": "lab/pi0"}) == {"pretrained_path": "lab/pi0"}


def test_a_file_without_paths_goes_as_it_is(tmp_path: Path) -> None:
    for name, text in {
        "a.json": '{"a":   1}',
        "b.yaml": "a:   {b: lab/pi0}",
        "c.jsonl": '{"a/b":   1}\n',
        "d.safetensors": "/home/ann",
    }.items():
        (tmp_path / name).write_text(text)
        assert public_copy(tmp_path / name) is None


def test_every_line_of_a_log_is_a_record_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss":  1}\n{"alarm": "see /home/ann/run"}\n')
    assert public_copy(path) == b'{"loss":  1}\n{"alarm": "see <run>"}\n'


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("{/")
    assert f"{path} cannot be read" in refused(lambda: public_copy(path))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of somebody whose name and machine must not be told."""
    home = tmp_path / MARKER
    home.mkdir()
    for variable, value in {"HOME": str(home), "USER": MARKER, "LOGNAME": MARKER}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setattr(platform, "node", lambda: HOST)
    return home


def run_at_home(home: Path, command: str | None) -> Path:
    """A run in which everything that can be a folder is one."""
    config: dict[str, Any] = CONFIG | {
        "output_dir": str(home / "run"),
        "policy": {"path": str(home / "base"), "repo_id": REPO},
        "dataset": {"repo_id": "local/x", "root": str(home / "my data/lift"), "name": None},
        "critic": {"path": f"~/{MARKER}/critic"},
        "rename_map": {f"{home}/a": "b"},
    }
    run = write_run(home / "run", config=config)
    policy = run / "checkpoints/last/pretrained_model/config.json"
    fields = {"type": "pi0", "license": "mit", "pretrained_path": str(home / "base")}
    policy.write_text(json.dumps(fields))
    write_report(
        run,
        config=config,
        evaluation=evaluation(),
        metrics_path=run / "metrics.jsonl",
        step=100,
        wall_clock={"offline": 60.0},
        title="TRQAM of pi0 on Lift",
        seeds={"training": 3},
        command=command,
    )
    return run


OWN = None
GIVEN = (
    "accelerate launch --config_file={home}/a.yaml {home}/code/recipes/finetune_pi0.py "
    "'--dataset.root={home}/my data/lift' --output_dir {home}/run --critic.path=~/critic"
)


@SENDS_DEPRECATED
@pytest.mark.parametrize("command", [GIVEN, OWN], ids=["given", "own"])
def test_nothing_that_arrives_at_the_hub_names_a_folder_or_the_machine(
    command: str | None,
    hub: HubServer,  # noqa: F811
    home: Path,
) -> None:
    run = run_at_home(home, command and command.format(home=home))
    assert any(MARKER in path.read_text() for path in run.glob("*.json")), "nothing to hide"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    push(hub, run)
    arrived = hub.repos[REPO].files
    assert {"README.md", "config.json", "run/config.yaml", "run/report.json"} <= arrived.keys()
    private = [MARKER, HOST, str(home.parent), str(Path.cwd())]
    for path, content in arrived.items():
        for text in private:
            assert text.encode() not in content, f"{path} tells {text}"
    assert {path: path.read_bytes() for path in before} == before, "the run was changed"

    config = yaml.safe_load(arrived["run/config.yaml"])
    assert config["output_dir"] == "<run>"
    assert config["policy"] == {"path": "<base>", "repo_id": REPO}
    assert config["dataset"]["root"] == "<lift>"
    assert config["trqam"] == CONFIG["trqam"]
    assert json.loads(arrived["config.json"])["pretrained_path"] is None
    report = json.loads(arrived["run/report.json"])
    assert report["config"] == config
    assert report["evaluation"] == json.loads((run / "report.json").read_text())["evaluation"]
    if command is GIVEN:
        assert "recipes/finetune_pi0.py '--dataset.root=<lift>'" in report["provenance"]["command"]
        assert report["provenance"]["command"] in arrived["README.md"].decode()
        assert "accelerate launch -q recipes/finetune_pi0.py" in arrived["README.md"].decode()


@SENDS_DEPRECATED
def test_a_policy_with_a_tokenizer_in_a_folder_here_is_not_pushed(
    hub: HubServer,  # noqa: F811
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = run_at_home(home, None)
    (home / "tokens").mkdir()
    monkeypatch.chdir(home)
    path = run / "checkpoints/last/pretrained_model/config.json"
    path.write_text(json.dumps({"type": "smolvla", "vlm_model_name": "tokens"}))
    assert "needs vlm_model_name=tokens, a path of this machine" in refused(lambda: push(hub, run))


@SENDS_DEPRECATED
def test_a_tokenizer_of_this_machine_is_pushed_by_its_name_on_the_hub(
    hub: HubServer,  # noqa: F811
    home: Path,
) -> None:
    run = run_at_home(home, None)
    path = run / "checkpoints/last/pretrained_model/policy_preprocessor.json"

    def name(tokenizer: Path | str) -> None:
        step = {
            "registry_name": "tokenizer_processor",
            "config": {"tokenizer_name": str(tokenizer)},
        }
        path.write_text(json.dumps({"name": "of " + str(home), "steps": [step]}))

    (home / "tokens").mkdir()
    name(home / "tokens")
    mine = path.read_bytes()
    for folder in (home / "tokens", "/nowhere"):
        said = refused(lambda given=folder: push(hub, run, tokenizer=str(given)))
        assert f"--tokenizer={folder} is a folder; it is the name of one on the Hub" in said
    push(hub, run, tokenizer="google/some-tokenizer")
    arrived = json.loads(hub.repos[REPO].files["policy_preprocessor.json"])
    assert arrived["steps"][0]["config"] == {"tokenizer_name": "google/some-tokenizer"}
    assert str(home) not in json.dumps(arrived)
    assert path.read_bytes() == mine
    more = json.loads(mine)
    more["steps"].append({"registry_name": "other", "config": {"file": str(home / "of_mine")}})
    path.write_text(json.dumps(more))
    said = refused(lambda: push(hub, run, tokenizer="google/some-tokenizer"))
    assert f"needs file={home / 'of_mine'}, a path of this machine" in said
    name("google/another")
    said = refused(lambda: push(hub, run, tokenizer="google/some-tokenizer"))
    assert "name no tokenizer of this machine; leave it out" in said


# The gate of both ways.


def add_commit(repo: Repository, files: dict[str, bytes]) -> None:
    repo.commits.append(repo.files | files)


RUNS = {"steps": [{"class": "subprocess.Popen", "config": {"args": "true"}}]}


@SENDS_DEPRECATED
def test_what_would_run_is_not_pushed(hub: HubServer, home: Path) -> None:  # noqa: F811
    run = run_at_home(home, None)
    path = run / "checkpoints/last/pretrained_model/policy_preprocessor.json"
    path.write_text(json.dumps(RUNS))
    assert "step 0 names the class 'subprocess.Popen'" in refused(lambda: push(hub, run))
    assert REPO not in hub.repos


@SENDS_DEPRECATED
@pytest.mark.parametrize("name", ["pretrained_model/more.json", "algorithm/key.json"])
def test_a_link_out_of_a_run_publishes_nothing(
    name: str,
    hub: HubServer,  # noqa: F811
    home: Path,
) -> None:
    run = run_at_home(home, None)
    (home / "key").write_text("{}")
    (run / "checkpoints/last" / name).symlink_to(home / "key")
    assert f"is a link to {home / 'key'}" in refused(lambda: push(hub, run))
    assert REPO not in hub.repos


@SENDS_DEPRECATED
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("policy_preprocessor.json", json.dumps(RUNS), "step 0 names the class"),
        ("config.json", '{"trust_remote_code": true}', "has trust_remote_code"),
        ("model.safetensors", "\xff" * 20, "declare a header of"),
    ],
    ids=["a class", "trust", "a header"],
)
def test_what_would_run_is_not_pulled(
    name: str,
    content: str,
    message: str,
    hub: HubServer,  # noqa: F811
    home: Path,
) -> None:
    push(hub, run_at_home(home, None))
    add_commit(hub.repos[REPO], {name: content.encode("latin-1")})
    folder = home / "pulled"
    said = refused(lambda: pull_checkpoint(REPO, folder, endpoint=hub.endpoint))
    assert message in said
    assert not folder.exists()


@SENDS_DEPRECATED
def test_code_and_pickles_of_a_repository_are_not_fetched(
    hub: HubServer,  # noqa: F811
    home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    push(hub, run_at_home(home, None))
    names = ("evil.py", "training_args.bin", "algorithm/critic.pt")
    add_commit(hub.repos[REPO], dict.fromkeys(names, b"evil"))
    folder = pull_checkpoint(REPO, home / "pulled", endpoint=hub.endpoint)
    left = "algorithm/critic.pt, evil.py, training_args.bin"
    assert capsys.readouterr().out == (
        f"of {REPO} are not fetched, being code or pickles: {left}\n"
    )
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}
    assert not any("evil" in path or "critic.pt" in path for _, path in hub.requests)
