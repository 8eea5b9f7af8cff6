"""Pushes a run's checkpoint to the Hugging Face Hub, or pulls a pushed one.

The token is HF_TOKEN, or the one that `hf auth login` left. Examples::

    python recipes/hub.py push --run=outputs/finetune_pi0/DATE --repo_id=USER/NAME --dry_run
    python recipes/hub.py push --run=outputs/finetune_pi0/DATE --repo_id=USER/NAME --private=true
    python recipes/hub.py pull --repo_id=USER/NAME --folder=pulled
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vla_trqam.config.command_line import boolean, exit_status, flags_of
from vla_trqam.engine.folder.checkpoints import PRETRAINED
from vla_trqam.errors import UserError, one_line
from vla_trqam.files import PART
from vla_trqam.hub.access import check_push
from vla_trqam.hub.card_facts import find_checkpoint
from vla_trqam.hub.pull import pull_checkpoint
from vla_trqam.hub.push import prepare_push, push_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""

    def work() -> None:
        options = parse(arguments)
        (push if options.command == "push" else pull)(options)

    return exit_status(work)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the flags; an unknown one is a UserError."""
    parser = flags_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="push|pull")
    _add_push(commands.add_parser("push", help="a run's checkpoint to the Hub", allow_abbrev=False))
    _add_pull(commands.add_parser("pull", help="a pushed checkpoint", allow_abbrev=False))
    return parser.parse_args(arguments)


def _add_push(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", type=Path, required=True, help="folder of a finished or interrupted run")
    add("--repo_id", required=True, help="USER/NAME; made if it does not exist")
    add("--checkpoint", default="last", help="number of the checkpoint, or last")
    switch: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True}
    default = "whether a new repository is private; the account's default if not given"
    add("--private", **switch, help=default)
    add("--license", help="the Hub's identifier, like apache-2.0; the base policy's if not given")
    merged = "push the whole policy with its LoRA adapters merged in"
    add("--merged", **switch, default=False, help=merged)
    tokenizer = "the Hub's name of what --policy.tokenizer=FOLDER was to the run, like google/NAME"
    add("--tokenizer", help=tokenizer)
    dry = "print files, sizes and the model card; ask nothing of the Hub and send nothing"
    add("--dry_run", **switch, default=False, help=dry)


def _add_pull(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--repo_id", required=True, help="USER/NAME")
    add("--folder", type=Path, required=True, help="where to; must not exist")
    add("--revision", help="branch, tag or commit")


def push(options: argparse.Namespace) -> None:
    """Pushes, or prints what would be pushed.

    Raises:
        UserError: it cannot be pushed.
    """
    if not options.dry_run:
        # Before the adapters are merged, which takes a while.
        check_push(options.repo_id, private=options.private)
    with _policy(options) as policy:
        what: dict[str, Any] = {
            "checkpoint": options.checkpoint,
            "private": options.private,
            "license_name": options.license,
            "policy": policy,
            "tokenizer": options.tokenizer,
        }
        if options.dry_run:
            prepared = prepare_push(options.run, options.repo_id, **what)
            print("\n".join(prepared.lines()), prepared.card, sep="\n\n", end="")
            return
        pushed = push_checkpoint(options.run, options.repo_id, **what)
    print(f"pushed to {pushed.url} (commit {pushed.commit})")


def pull(options: argparse.Namespace) -> None:
    """Pulls a checkpoint and says where it is.

    Raises:
        UserError: it cannot be pulled.
    """
    folder = pull_checkpoint(options.repo_id, options.folder, revision=options.revision)
    print(f"the policy is {folder / PRETRAINED}, the critic and trust region are beside it")


@contextmanager
def _policy(options: argparse.Namespace) -> Iterator[Path | None]:
    """An export of the checkpoint's policy while it is needed; None where it goes as it is."""
    if not options.merged:
        yield None
        return
    saved = find_checkpoint(options.run, options.checkpoint) / PRETRAINED
    if not (saved / "adapter_config.json").is_file():
        raise UserError(f"--merged=true, but {saved} has no adapters: it is a whole policy already")
    from vla_trqam.adapters.checkpoint.saving import told_of_merging
    from vla_trqam.adapters.loading import load_policy

    # Beside the checkpoints: what holds them has room for one more, as a temporary one may not.
    folder = options.run / f"{PART}merged"
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
        policy = load_policy(saved, adapter="continue")
        told = told_of_merging(policy.lost_by_merging)
        if told is not None:
            print(f"{saved}: {told}; what is pushed acts otherwise than what was evaluated")
        try:
            folder.mkdir()
            policy.save_pretrained(folder, merged=True)
        except (OSError, SafetensorError) as error:
            raise UserError(f"the merged policy cannot be written: {one_line(error)}") from None
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
