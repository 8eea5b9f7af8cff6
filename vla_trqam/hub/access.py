"""Talking to the Hugging Face Hub: whose token, may it write there, and errors as one sentence.

``huggingface_hub`` reads ``HF_ENDPOINT`` when it is imported; the ``endpoint`` of the functions
here wins over it. The token is an argument, ``HF_TOKEN``, or what ``hf auth login`` left; it goes
into requests and nowhere else. Large files travel by Xet where the package ``hf_xet`` is installed;
``HF_HUB_DISABLE_XET=1`` sends them by plain HTTP, for mirrors of the Hub that know no Xet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from vla_trqam.errors import UserError, one_line

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
LONGEST_REASON = 300  # characters


@dataclass(frozen=True)
class WriteAccess:
    """A token that may write to a repository.

    Attributes:
        api: the Hub, with the token.
        repo_id: the repository.
        user: whose token it is.
        private: whether the repository is private; None if it does not exist yet.
    """

    api: HfApi
    repo_id: str
    user: str
    private: bool | None

    @property
    def url(self) -> str:
        """The repository's page."""
        return f"{self.api.endpoint}/{self.repo_id}"


def check_push(
    repo_id: str,
    *,
    private: bool | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> WriteAccess:
    """Whether a push can work, before anything is trained or sent; nothing is created.

    Args:
        repo_id: ``USER/NAME``.
        private: what the repository shall be; None leaves it, or takes the account's default.
        endpoint: of the Hub; None takes ``HF_ENDPOINT``, or huggingface.co.
        token: None takes ``HF_TOKEN``, or the one of ``hf auth login``.

    Raises:
        UserError: the name is malformed, there is no token or it may not write, the Hub does not
            answer, or the repository exists with the other visibility.
    """
    check_repo_id(repo_id)
    api = connect(endpoint, token)
    if not api.token:
        raise UserError(
            f"there is no Hugging Face token to push to {repo_id} with: run `hf auth login`, or "
            f"set HF_TOKEN to a token with write permission from {TOKENS_PAGE}"
        )
    with one_sentence(api):
        who = api.whoami()
    _check_role(who, repo_id)
    existing = _visibility(api, repo_id)
    if existing is None:
        _check_namespace(who, repo_id)
    else:
        _check_writable(api, who, repo_id)
        _check_visibility(api, repo_id, private, existing)
    return WriteAccess(api, repo_id, who["name"], existing)


def connect(endpoint: str | None = None, token: str | None = None) -> HfApi:
    """The Hub and the token to use."""
    return HfApi(endpoint=endpoint, token=token or get_token() or False)


def check_repo_id(repo_id: str) -> None:
    """Refuses what cannot be a repository's name.

    Raises:
        UserError: it is not ``USER/NAME``.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"--repo_id={repo_id} is not of the form USER/NAME: {one_line(error)}"
        ) from None
    if "/" not in repo_id:
        raise UserError(f"--repo_id={repo_id} is not of the form USER/NAME")


@contextmanager
def one_sentence(api: HfApi) -> Iterator[None]:
    """Turns what the Hub or the way there did wrong into a UserError of one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(redacted(_sentence(api, error), api)) from None


def redacted(text: str, api: HfApi) -> str:
    """The text without the token, should a server have repeated it."""
    return text.replace(api.token, "***") if isinstance(api.token, str) else text


def _sentence(api: HfApi, error: BaseException) -> str:
    # The uploads of large files wrap what happened.
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    hub = f"the Hub at {api.endpoint}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing is asked of the Hub; unset it"
    if isinstance(error, RevisionNotFoundError):
        return f"{hub} knows no such revision of the repository"
    if isinstance(error, RepositoryNotFoundError):
        return f"{hub} shows no such repository to this token"
    if isinstance(error, HfHubHTTPError):
        return _of_status(hub, error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"a file could not be read or written: {_reason(error)}"
    if isinstance(error, httpx.TransportError):
        return f"{hub} does not answer ({type(error).__name__}: {_reason(error)})"
    hint = " (HF_HUB_DISABLE_XET=1 does without Xet)" if "xet" in str(error).lower() else ""
    return f"{hub} could not be worked with: {type(error).__name__}: {_reason(error)}{hint}"


def _of_status(hub: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = error.server_message or error.response.reason_phrase
    said = one_line(said)[:LONGEST_REASON]
    meaning = {
        401: f"does not know the token; make one with write permission at {TOKENS_PAGE}",
        403: "refuses: the token has no permission for this",
        429: "is asked too often; wait a while",
    }.get(status, "failed" if status >= 500 else "refuses")
    return f"{hub} {meaning} ({status}: {said})"


def _reason(error: BaseException) -> str:
    return one_line(error)[:LONGEST_REASON]


def _check_role(who: dict[str, Any], repo_id: str) -> None:
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(
            f"the Hugging Face token of {who['name']} may only read, so nothing can be pushed to "
            f"{repo_id}: make one with write permission at {TOKENS_PAGE}"
        )


def _visibility(api: HfApi, repo_id: str) -> bool | None:
    with one_sentence(api):
        try:
            return bool(api.model_info(repo_id).private)
        except RepositoryNotFoundError:
            return None


def _check_namespace(who: dict[str, Any], repo_id: str) -> None:
    mine = [who["name"], *(org["name"] for org in who.get("orgs", ()))]
    namespace, _, name = repo_id.partition("/")
    if namespace not in mine:
        choices = " or ".join(f"{each}/{name}" for each in mine)
        raise UserError(
            f"{repo_id} does not exist, and {who['name']} cannot create it under {namespace}: "
            f"choose --repo_id={choices}"
        )


def _check_writable(api: HfApi, who: dict[str, Any], repo_id: str) -> None:
    with one_sentence(api):
        try:
            api.auth_check(repo_id, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code != 403:
                raise
            raise UserError(
                f"{repo_id} exists and the token of {who['name']} may not write to it: choose a "
                f"repository of yours, or a token with that permission from {TOKENS_PAGE}"
            ) from None


def _check_visibility(api: HfApi, repo_id: str, private: bool | None, existing: bool) -> None:
    if private is not None and private != existing:
        raise UserError(
            f"{repo_id} exists and is {_word(existing)}, a push does not make it {_word(private)}: "
            f"change that at {api.endpoint}/{repo_id}/settings, or choose another --repo_id"
        )


def _word(private: bool) -> str:
    return "private" if private else "public"
