"""Checkpoints to the Hugging Face Hub; :mod:`vla_trqam.hub.pull` brings them back.

A pushed repository has LeRobot's layout at its root, so that stock LeRobot loads it by name::

    README.md                    the model card
    config.json, *.safetensors   the policy and its processors
    algorithm/                   critic and trust region
    plots/                       figures of the run
    run/                         settings, logged numbers, report

Everything arrives in one commit. Large files go up before it; those that the Hub has already are
not sent again, so a push that failed half-way is completed by the same command.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from vla_trqam.adapters.checkpoint.policy_gate import NAMES_A_MODEL, check_policy_folder
from vla_trqam.data.foreign import read_json
from vla_trqam.engine.folder.checkpoints import ALGORITHM
from vla_trqam.engine.folder.run_folder import CONFIG_NAME
from vla_trqam.errors import UserError
from vla_trqam.hub.access import WriteAccess, check_push, check_repo_id, one_sentence
from vla_trqam.hub.card_facts import (
    ADAPTER_CONFIG,
    METRICS,
    POLICY_CONFIG,
    REPORT,
    RunFacts,
    find_checkpoint,
    read_facts,
)
from vla_trqam.hub.model_card import PLOTS, model_card
from vla_trqam.methods.registry import check_pushed
from vla_trqam.report.public_copy import WHERE_FROM, public_copy, without_paths

CARD, RUN = "README.md", "run"
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
# What a push may have left at the root; another push removes what it does not bring itself. An old
# adapter_config.json, for instance, would make a whole policy an adapter of something else.
OURS = (
    *("*.safetensors", POLICY_CONFIG, ADAPTER_CONFIG),
    *("policy_preprocessor*", "policy_postprocessor*"),
    *(f"{folder}/*" for folder in (ALGORITHM, PLOTS, RUN)),
)
TEXT = (".json", ".jsonl", ".yaml")
TOKENIZER = "tokenizer_name"
COMMAND = "python -m vla_trqam.recipes.hub"


@dataclass(frozen=True)
class Push:
    """What is pushed, before it is.

    Attributes:
        run: the run's folder.
        repo_id: where to.
        checkpoint: name of the checkpoint.
        files: local files by their path in the repository, without the card; the content where it
            is not the file's, because paths of this machine are left out.
        card: the model card's text.
        command: the command that does this push.
    """

    run: Path
    repo_id: str
    checkpoint: str
    files: Mapping[str, Path | bytes]
    card: str
    command: str

    def lines(self) -> Iterator[str]:
        """Files and sizes, for a reader."""
        sizes = {
            path: len(file) if isinstance(file, bytes) else file.stat().st_size
            for path, file in self.files.items()
        }
        sizes[CARD] = len(self.card.encode())
        for path, size in sorted(sizes.items()):
            yield f"{size / 1e6:12.3f} MB  {path}"
        yield f"{sum(sizes.values()) / 1e6:12.3f} MB  in {len(sizes)} files"


@dataclass(frozen=True)
class Pushed:
    """A finished push."""

    url: str
    commit: str


def prepare_push(
    run: Path,
    repo_id: str,
    *,
    checkpoint: str = "last",
    private: bool | None = None,
    license_name: str | None = None,
    policy: Path | None = None,
    tokenizer: str | None = None,
    api: HfApi | None = None,
) -> Push:
    """Collects the files of a checkpoint and writes its card; sends nothing.

    Args:
        run: folder of a finished or interrupted run.
        repo_id: ``USER/NAME``.
        checkpoint: its number, or "last".
        private: part of the command to go on with.
        license_name: the Hub's identifier of the licence; None takes the base policy's.
        policy: folder of an export of the checkpoint's policy; None takes the checkpoint's own.
        tokenizer: the Hub's name of what the run read from a folder of this machine; None where it
            read none.
        api: the Hub, asked for the licence of the base; None asks nobody.

    Raises:
        UserError: the run has no such checkpoint, a file of it is missing or damaged, it needs a
            folder of this machine or would run something on another, or the repository is the base
            policy's own.
    """
    check_repo_id(repo_id)
    found = find_checkpoint(run, checkpoint)
    facts = read_facts(run, found, policy)
    if facts.base == repo_id:
        raise UserError(
            f"--repo_id={repo_id} is the base policy's own repository; choose another, or the base "
            "would be overwritten"
        )
    check_pushed(facts.method.lower(), str(run))
    files = _files(run, facts)
    named = {} if tokenizer is None else _named(facts.policy, tokenizer)
    _check_paths(facts, named)
    check_policy_folder(facts.policy)
    flags = {
        "run": run,
        "repo_id": repo_id,
        "checkpoint": None if checkpoint == "last" else checkpoint,
        "private": None if private is None else str(private).lower(),
        "license": license_name,
        "merged": "true" if policy is not None else None,
        "tokenizer": tokenizer,
    }
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    command = f"{COMMAND} push {shlex.join(given)}"
    card = model_card(facts, repo_id, license_name or _license(facts, api))
    public = {path: public_copy(file) or file for path, file in files.items()}
    public |= {
        file.name: json.dumps(without_paths(value), indent=2).encode()
        for file, value in named.items()
    }
    return Push(run, repo_id, found.name, public, card, command)


def push_checkpoint(
    run: Path,
    repo_id: str,
    *,
    checkpoint: str = "last",
    private: bool | None = None,
    license_name: str | None = None,
    policy: Path | None = None,
    tokenizer: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Pushes policy, processors, critic, plots and model card of a run in one commit.

    Arguments are those of :func:`prepare_push` and :func:`~vla_trqam.hub.access.check_push`; a
    repository that does not exist is made.

    Raises:
        UserError: what :func:`prepare_push` and
            :func:`~vla_trqam.hub.access.check_push` refuse, before anything is sent; or
            the Hub failed meanwhile, with the command that goes on. The run stays as it is.
        KeyboardInterrupt: it was interrupted; that command is printed.
    """
    access = check_push(repo_id, private=private, endpoint=endpoint, token=token)
    push = prepare_push(
        run,
        repo_id,
        checkpoint=checkpoint,
        private=private,
        license_name=license_name,
        policy=policy,
        tokenizer=tokenizer,
        api=access.api,
    )
    _check_token(push, access.api)
    try:
        with one_sentence(access.api):
            return _send(push, access, private)
    except UserError as error:
        raise UserError(f"{error}; {_how_to_go_on(push)}") from None
    except KeyboardInterrupt:
        print(f"\nthe push to {repo_id} was interrupted; {_how_to_go_on(push)}", file=sys.stderr)
        raise


def _files(run: Path, facts: RunFacts) -> dict[str, Path]:
    if not any((facts.policy / name).is_file() for name in WEIGHTS):
        raise UserError(f"{facts.policy} has neither {' nor '.join(WEIGHTS)}")
    files = {path.name: path for path in facts.policy.iterdir() if path.is_file()}
    files |= {f"{ALGORITHM}/{p.name}": p for p in (facts.checkpoint / ALGORITHM).iterdir()}
    files |= {f"{PLOTS}/{plot.name}": plot for plot in facts.plots}
    names = (CONFIG_NAME, METRICS) if facts.outdated else (CONFIG_NAME, METRICS, REPORT)
    written = (run / name for name in names)
    files |= {f"{RUN}/{path.name}": path for path in written if path.is_file()}
    files.pop(CARD, None)
    _check_own(files, (run, facts.policy))
    return files


def _check_own(files: Mapping[str, Path], folders: tuple[Path, ...]) -> None:
    """A link in a stranger's run would publish a file of this machine."""
    roots = [folder.resolve() for folder in folders]
    for file in files.values():
        if not any(file.resolve().is_relative_to(root) for root in roots):
            raise UserError(f"{file} is a link to {file.resolve()}, which is none of the run's")


def _named(policy: Path, tokenizer: str) -> dict[Path, Any]:
    """What the processors' files that name a tokenizer of this machine hold, by the Hub's name.

    Raises:
        UserError: that is a folder too, or none of them names one.
    """
    if Path(tokenizer).is_absolute() or Path(tokenizer).expanduser().is_dir():
        raise UserError(f"--tokenizer={tokenizer} is a folder; it is the name of one on the Hub")
    files = {path: read_json(path) for path in sorted(policy.glob("policy_p*processor.json"))}
    found = {
        path: renamed
        for path, value in files.items()
        if (renamed := _renamed(value, tokenizer)) != value
    }
    if not found:
        raise UserError(
            f"--tokenizer={tokenizer}: the processors in {policy} name no tokenizer of this "
            "machine; leave it out"
        )
    return found


def _renamed(value: Any, tokenizer: str) -> Any:
    if isinstance(value, list):
        return [_renamed(item, tokenizer) for item in value]
    if not isinstance(value, dict):
        return value
    own = value.get(TOKENIZER)
    local = isinstance(own, str) and Path(own).expanduser().is_dir()
    return {
        key: tokenizer if local and key == TOKENIZER else _renamed(item, tokenizer)
        for key, item in value.items()
    }


def _check_paths(facts: RunFacts, named: Mapping[Path, Any]) -> None:
    """Refuses a policy that only this machine can load, by what is pushed of each file."""
    for file in sorted(facts.policy.glob("*.json")):
        for name, value in _texts(named.get(file) or read_json(file)):
            folder = name in NAMES_A_MODEL and Path(value).expanduser().is_dir()
            if folder or (name not in WHERE_FROM and Path(value).is_absolute()):
                raise UserError(
                    f"{file} needs {name}={value}, a path of this machine, so nobody else could "
                    f"load the policy: {_instead_of(name, facts)}"
                )


def _instead_of(name: str, facts: RunFacts) -> str:
    if name == TOKENIZER:
        return "--tokenizer=NAME tells the Hub's name of the same one"
    return (
        "push the whole policy by --merged=true"
        if facts.is_adapter
        else "train from one on the Hub"
    )


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, name)
    elif isinstance(value, str):
        yield name, value


def _license(facts: RunFacts, api: HfApi | None) -> str | None:
    """The licence that the policy's config names, or the card of its base."""
    if facts.policy_config.get("license"):
        return str(facts.policy_config["license"])
    if facts.base is None or api is None:
        return None
    with one_sentence(api):
        try:
            card = api.model_info(facts.base).card_data
        except RepositoryNotFoundError:
            print(f"the licence of {facts.base} is not known: the Hub does not show it")
            return None
    return None if card is None else card.get("license")


def _check_token(push: Push, api: HfApi) -> None:
    """Refuses to make the token public, should it be in a setting or in the run's command."""
    token = str(api.token)
    texts = {path: file for path, file in push.files.items() if path.endswith(TEXT)}
    holding = [path for path, file in texts.items() if token.encode() in _bytes(file)]
    if holding or token in push.card:
        raise UserError(
            f"{', '.join(holding) or CARD} holds the Hugging Face token, which must not be pushed: "
            f"remove it from the files in {push.run} and, if others saw them, make a new token"
        )


def _bytes(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def _send(push: Push, access: WriteAccess, private: bool | None) -> Pushed:
    api = access.api
    if access.private is None:
        api.create_repo(push.repo_id, private=private, exist_ok=True)
    present = api.list_repo_files(push.repo_id)
    operations: list[Any] = [CommitOperationAdd(CARD, push.card.encode())]
    operations += [
        CommitOperationAdd(path, file if isinstance(file, bytes) else str(file))
        for path, file in push.files.items()
    ]
    operations += [CommitOperationDelete(path) for path in _stale(present, push)]
    message = f"Checkpoint {push.checkpoint}"
    done = api.create_commit(push.repo_id, operations, commit_message=message)
    return Pushed(access.url, done.oid)


def _stale(present: list[str], push: Push) -> list[str]:
    mine = [path for path in present if any(_matches(path, pattern) for pattern in OURS)]
    return [path for path in mine if path not in push.files]


def _matches(path: str, pattern: str) -> bool:
    # fnmatch's star crosses slashes; a pattern of the root must not.
    return fnmatch(path, pattern) and path.count("/") == pattern.count("/")


def _how_to_go_on(push: Push) -> str:
    return f"nothing of {push.run} is lost, and what has arrived is not sent again: {push.command}"
