"""Where a LeRobotDataset lies: a folder of this machine, LeRobot's own, or the Hub's cache.

LeRobot and huggingface_hub are imported inside functions: they cost seconds.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_trqam.data.sources.lerobot.safety import CONVERTER, INFO_NAME
from vla_trqam.errors import UserError

COMMIT = re.compile("[0-9a-f]{40}")

NEWEST_VERSION = "v3.0"


@dataclass(frozen=True)
class DatasetPlace:
    """Where a dataset was found.

    Attributes:
        root: its folder.
        repo_id: of the dataset.
        commit: on the Hub; None for a folder that did not come from there.
    """

    root: Path
    repo_id: str
    commit: str | None = None

    def fetch(self, files: Collection[str]) -> None:
        """Download what is not there yet; does nothing for a folder of this machine.

        Raises:
            UserError: the Hub does not give them.
        """
        if self.commit is not None:
            missing = [file for file in files if not (self.root / file).is_file()]
            if missing:
                _snapshot(self.repo_id, self.commit, [glob.escape(file) for file in missing])


def find_dataset(repo_id: str, root: Path | None, revision: str | None) -> DatasetPlace:
    """The dataset with its `meta/`; tables and videos of the Hub come by `fetch`.

    Args:
        repo_id: of the dataset; with `root`, any name.
        root: its folder; None looks in LeRobot's own folder and then on the Hub.
        revision: branch, tag or commit on the Hub; None takes LeRobot's: the newest v3 tag.

    Raises:
        UserError: it is nowhere, or `root` and `revision` are both given.
    """
    if root is not None:
        if revision is not None:
            raise UserError(
                f"--dataset.revision={revision} is of the Hub and --dataset.root={root} of this "
                "machine: leave one out."
            )
        return DatasetPlace(root, repo_id)
    from lerobot.datasets.utils import has_legacy_hub_download_metadata
    from lerobot.utils.constants import HF_LEROBOT_HOME

    own = Path(HF_LEROBOT_HOME) / repo_id
    if (
        revision is None
        and (own / INFO_NAME).is_file()
        and not has_legacy_hub_download_metadata(own)
    ):
        return DatasetPlace(own, repo_id)
    # By its name, so that the cache knows it when the Hub is not there; all else by the commit.
    snapshot = _snapshot(repo_id, _revision(repo_id, revision), ["meta/*"])
    return DatasetPlace(snapshot, repo_id, snapshot.name)


def _revision(repo_id: str, revision: str | None) -> str:
    """The one to take. The Hub is asked for it, unless HF_HUB_OFFLINE says not to.

    Otherwise huggingface_hub would give an older copy where the Hub does not answer.
    """
    from huggingface_hub import HfApi, constants
    from lerobot.datasets.utils import CompatibilityError, get_safe_version

    if constants.HF_HUB_OFFLINE:
        return revision or NEWEST_VERSION
    try:
        wanted = revision or get_safe_version(repo_id, NEWEST_VERSION)
        HfApi().dataset_info(repo_id, revision=wanted)
    except CompatibilityError as error:
        raise UserError(
            f"The dataset {repo_id} is of an older version; convert it to v3 by "
            f"`{CONVERTER} --repo-id={repo_id}`."
        ) from error
    except _hub_errors() as error:
        raise _not_given(repo_id, revision, error) from error
    return wanted


def _snapshot(repo_id: str, revision: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

    try:
        folder = snapshot_download(
            repo_id,
            repo_type="dataset",
            revision=revision,
            cache_dir=HF_LEROBOT_HUB_CACHE,
            allow_patterns=patterns,
        )
    except _hub_errors() as error:
        raise _not_given(repo_id, revision, error) from error
    return Path(folder)


def _hub_errors() -> tuple[type[BaseException], ...]:
    """What huggingface_hub and `get_safe_version` raise; no common class covers them."""
    import httpx
    from huggingface_hub.errors import EntryNotFoundError, RevisionResolutionError

    own = (EntryNotFoundError, RevisionResolutionError)
    # Most of its own are of these three; a repository without version tags is a RuntimeError.
    return (httpx.HTTPError, OSError, ValueError, RuntimeError, *own)


def _not_given(repo_id: str, revision: str | None, error: BaseException) -> UserError:
    from huggingface_hub.errors import RevisionNotFoundError

    if isinstance(error, RevisionNotFoundError) and revision is not None:
        return UserError(f"The dataset {repo_id} has no revision {revision!r} on the Hub.")
    return UserError(
        f"The dataset {repo_id} cannot be opened ({_first_line(error)}); is its name right, and "
        "does the Hub answer? A folder of this machine is --dataset.root, and a dataset without a "
        "v3 tag takes --dataset.revision=main."
    )


def _first_line(error: Any) -> str:
    text = (str(error).strip() or "no reason").splitlines()[0]
    return f"{type(error).__name__}: {text}"


def commit_of(folder: Path) -> str | None:
    """The commit of a folder in the Hub's cache; None for any other folder."""
    known = folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name)
    return folder.name if known else None
