"""Pushed checkpoints from the Hugging Face Hub, whole or as what a new run goes on with."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vla_trqam.adapters.checkpoint.policy_gate import PICKLED, check_policy_folder
from vla_trqam.config.flag_help import as_yaml
from vla_trqam.data.foreign import check_header, read_json
from vla_trqam.engine.folder.checkpoints import ALGORITHM, PRETRAINED, VALUED
from vla_trqam.errors import UserError, one_line
from vla_trqam.files import written_whole
from vla_trqam.hub.access import check_repo_id, connect, one_sentence
from vla_trqam.hub.model_card import PLOTS
from vla_trqam.hub.push import RUN
from vla_trqam.methods.base import OffPolicyMethod
from vla_trqam.methods.parts.parallel import shard_like

# All that a checkpoint is made of.
FETCHED = [".json", ".safetensors"]
# Of a pushed run, or of another policy's repository, not needed to go on.
NOT_FETCHED = [f"{PLOTS}/*", f"{RUN}/*", "training_state/*", "*.mp4"]
CRITIC = "critic."
_WHOLE = [f"*{suffix}" for suffix in FETCHED]


def pull_checkpoint(
    repo_id: str,
    folder: Path,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> Path:
    """Fetches a pushed checkpoint as the folder it was: ``pretrained_model/`` and ``algorithm/``.

    The files come through the Hub's cache, so an interrupted pull goes on where it stopped.

    Args:
        repo_id: ``USER/NAME``.
        folder: made; it must not exist.
        revision: branch, tag or commit.
        endpoint: of the Hub; None takes ``HF_ENDPOINT``, or huggingface.co.
        token: None takes ``HF_TOKEN``, or the one of ``hf auth login``, or none.

    Returns:
        The folder.

    Raises:
        UserError: the folder exists, the Hub does not give the repository, it is no checkpoint, or
            a file of it could make a library run something.
    """
    if folder.exists():
        raise UserError(f"--folder={folder} exists; choose another, or remove it")
    snapshot = _snapshot(repo_id, revision, endpoint, token, allow=_WHOLE)
    _algorithm_of(snapshot, repo_id)
    check_policy_folder(snapshot)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(folder) as part:
            _lay_out(snapshot, part)
    except OSError as error:
        raise UserError(f"--folder={folder} cannot be written: {error.strerror}") from None
    return folder


def pull_algorithm(
    repo_id: str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> Path:
    """The ``algorithm/`` folder alone, in the Hub's cache; arguments as :func:`pull_checkpoint`.

    Raises:
        UserError: the Hub does not give the repository, or it has no such folder.
    """
    snapshot = _snapshot(repo_id, revision, endpoint, token, allow=[f"{ALGORITHM}/*"])
    return _algorithm_of(snapshot, repo_id)


def find_algorithm(path: str) -> Path:
    """The ``algorithm/`` folder of a checkpoint's folder, or of a repository on the Hub.

    Raises:
        UserError: there is no such folder; or as :func:`pull_algorithm`.
    """
    folder = Path(path).expanduser()
    if folder.is_absolute() and not folder.is_dir():
        raise UserError(f"--critic.path={path} is not a folder")
    if not folder.is_dir():
        return pull_algorithm(path)
    if not (folder / ALGORITHM).is_dir():
        raise UserError(f"{folder} has no {ALGORITHM}/ folder: it is no checkpoint of this package")
    return folder / ALGORITHM


def load_algorithm(
    algorithm: Path,
    method: OffPolicyMethod,
    *,
    trust_region: bool = True,
    valued: Mapping[str, Any] | None = None,
) -> None:
    """Gives a method the critic, and the state of the trust region, of a checkpoint.

    Args:
        algorithm: the checkpoint's ``algorithm/`` folder.
        method: of the new run.
        trust_region: whether λ and the KL's moving average go on. They belong to the base that they
            were measured against: false where the pulled policy itself becomes the base.
        valued: the run's flags by which its critic's numbers mean something; compared with those
            that the checkpoint tells.

    Raises:
        UserError: a file is missing or damaged, the critic has other weights or values by other
            settings, or the trust region is of another scheme.
    """
    check_valued(algorithm, valued or {}, "--critic.path")
    try:
        check_header(algorithm / "networks.safetensors")
        tensors = load_file(algorithm / "networks.safetensors")
        critic = {k.removeprefix(CRITIC): v for k, v in tensors.items() if k.startswith(CRITIC)}
        _check_finite(critic)
        own = method.critic.state_dict()
        _check_shapes(critic, own)
        parts = {name: shard_like(own[name], value) for name, value in critic.items()}
        method.critic.load_state_dict(parts)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{algorithm} does not fit this run's critic: {one_line(error)}") from None
    if trust_region:
        _load_trust_region(algorithm / "scalars.json", method)


def check_valued(algorithm: Path, own: Mapping[str, Any], flag: str) -> None:
    """Refuses a checkpoint's critic that values by other settings; earlier versions do not tell.

    Args:
        algorithm: the checkpoint's ``algorithm/`` folder.
        own: the run's flags by which a critic's numbers mean something.
        flag: that named the checkpoint.

    Raises:
        UserError: one of them differs.
    """
    path = algorithm / VALUED
    told = read_json(path) if path.is_file() else {}
    for name in own.keys() & told.keys():
        if told[name] != own[name]:
            theirs, mine = (f"--{name}={as_yaml(values[name])}" for values in (told, own))
            raise UserError(
                f"the critic of {flag} values by {theirs}, this run by {mine}: its numbers would "
                f"mean something else; take its own, or leave out {flag}"
            )


def _check_shapes(critic: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for name, value in critic.items():
        mine = list(own[name].shape) if name in own else list(value.shape)
        if mine != list(value.shape):
            raise ValueError(
                f"its {name} has the shape {list(value.shape)}, this run's {mine}; take that run's "
                "--critic.hidden_dims and --critic.ensemble_size"
            )


def _check_finite(critic: dict[str, Tensor]) -> None:
    wrong = [name for name, value in critic.items() if not bool(torch.isfinite(value).all())]
    if wrong:
        raise ValueError(f"{wrong[0]} has a number that is not finite")


def _load_trust_region(path: Path, method: OffPolicyMethod) -> None:
    scalars = read_json(path)
    try:
        numbers = {k: v for k, v in scalars.items() if not isinstance(v, str)}
        wrong = [f"{k} is {v!r}" for k, v in numbers.items() if not _is_amount(v)]
        if wrong:
            raise ValueError(f"{wrong[0]}; it must be a finite number and not negative")
        method.load_scalars(scalars)
        method.step_factor = 1.0  # a smaller one is the former run's
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the state of a trust region: {one_line(error)}") from None


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and 0.0 <= value < math.inf


def _lay_out(snapshot: Path, folder: Path) -> None:
    """Copies, not the cache's links: a checkpoint may be moved."""
    (folder / PRETRAINED).mkdir(parents=True)
    for path in snapshot.iterdir():
        if path.is_file() and path.suffix in FETCHED:
            shutil.copyfile(path, folder / PRETRAINED / path.name)
    shutil.copytree(snapshot / ALGORITHM, folder / ALGORITHM)


def _snapshot(
    repo_id: str,
    revision: str | None,
    endpoint: str | None,
    token: str | None,
    *,
    allow: list[str],
) -> Path:
    check_repo_id(repo_id)
    api = connect(endpoint, token)
    with one_sentence(api):
        # Asked first: huggingface_hub would give an older copy where the Hub does not answer.
        info = api.model_info(repo_id, revision=revision)
        if _WHOLE == allow:
            _say_what_is_left(repo_id, [file.rfilename for file in info.siblings or ()])
        found = api.snapshot_download(
            repo_id,
            revision=info.sha,
            allow_patterns=allow,
            ignore_patterns=NOT_FETCHED,
        )
    return Path(found)


def _say_what_is_left(repo_id: str, paths: list[str]) -> None:
    """Names what could be taken for a part of the policy."""
    left = [path for path in paths if Path(path).suffix in (".py", *PICKLED)]
    if left:
        print(f"of {repo_id} are not fetched, being code or pickles: {', '.join(sorted(left))}")


def _algorithm_of(snapshot: Path, repo_id: str) -> Path:
    if not (snapshot / ALGORITHM).is_dir():
        raise UserError(
            f"{repo_id} has no {ALGORITHM}/ folder: it is a policy, but no checkpoint that this "
            "package pushed"
        )
    return snapshot / ALGORITHM
