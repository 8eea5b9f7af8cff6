"""A stand-in for the Hugging Face Hub: its HTTP API as far as huggingface_hub uses it here.

It keeps repositories in memory, tells git blobs from large files as the Hub does, and can break
down from a given request on. What it received is there to be looked at.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Breakdown = Literal["500", "drop"]
LARGE = (".safetensors", ".png")


@dataclass
class User:
    """Whose token it is and what it may do."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()

    def may_write(self, repo_id: str) -> bool:
        return self.role == "write" and repo_id.split("/")[0] in (self.name, *self.orgs)


@dataclass
class Repository:
    """Every commit as the files it holds."""

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def sha(self, number: int = -1) -> str:
        number = number % len(self.commits)
        return hashlib.sha1(f"{id(self)}/{number}".encode()).hexdigest()

    def at(self, revision: str) -> int | None:
        """Number of the commit, None for an unknown revision."""
        if revision == "main":
            return len(self.commits) - 1
        shas = [self.sha(number) for number in range(len(self.commits))]
        return shas.index(revision) if revision in shas else None


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def blob_oid(path: str, content: bytes) -> str:
    """The name that the Hub gives to a content: SHA256 if large, else git's."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """Use as a context manager.

    Attributes:
        tokens: users by token.
        repos: repositories by name.
        large: large files by SHA256.
        requests: method and path of each request so far.
        uploaded: SHA256 of the large files that were sent, in order.
        break_down: from which request on (counted from 0) there are only failures, and which.
        echo_token: whether a refusal repeats the token, as a careless server might.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, User] = {}
        self.repos: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploaded: list[str] = []
        self.break_down: tuple[int, Breakdown] | None = None
        self.echo_token = False
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def note(self, method: str, path: str) -> Breakdown | None:
        """Records a request; says how it must fail, if it must."""
        with self._lock:
            self.requests.append((method, path))
            if self.break_down is not None and len(self.requests) > self.break_down[0]:
                return self.break_down[1]
        return None


class _RefusalError(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


Answer = tuple[int, bytes, dict[str, str]]


def _json(value: Any, status: int = 200) -> Answer:
    return status, json.dumps(value).encode(), {"Content-Type": "application/json"}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet, or every answer waits 40 ms for the other's ack

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        body = self._body()
        failure = self.hub.note(self.command, unquote(url.path))
        if failure == "drop":
            self.close_connection = True
            return
        if failure == "500":
            self._send(_json({"error": "internal error"}, 500))
            return
        try:
            self._send(self._route(unquote(url.path), body))
        except _RefusalError as refusal:
            message = refusal.message
            if self.hub.echo_token:
                message += f" (you sent {self.headers.get('Authorization')})"
            status, content, headers = _json({"error": message}, refusal.status)
            headers["X-Error-Message"] = message
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._send((status, content, headers))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: Answer) -> None:
        status, content, headers = answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, path: str, body: bytes) -> Answer:
        for method, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                answer: Callable[..., Answer] = getattr(self, name)
                return answer(body, **found.groupdict())
        raise _RefusalError(404, f"no such page: {self.command} {path}")

    # Who asks, and what for.

    def _user(self) -> User | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise _RefusalError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _readable(self, repo_id: str) -> Repository:
        user, repo = self._user(), self.hub.repos.get(repo_id)
        owner = repo_id.split("/")[0]
        if repo is None or (
            repo.private and (user is None or owner not in (user.name, *user.orgs))
        ):
            raise _RefusalError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, repo_id: str) -> Repository:
        repo, user = self._readable(repo_id), self._user()
        if user is None or not user.may_write(repo_id):
            raise _RefusalError(403, "you need write access to this repository")
        return repo

    def _commit_number(self, repo: Repository, revision: str) -> int:
        number = repo.at(revision)
        if number is None:
            raise _RefusalError(404, f"no revision {revision}", "RevisionNotFound")
        return number

    # The pages.

    def whoami(self, _: bytes) -> Answer:
        user = self._user()
        if user is None:
            raise _RefusalError(401, "not logged in")
        orgs = [{"name": name} for name in user.orgs]
        token = {"accessToken": {"role": user.role, "displayName": "test"}}
        return _json({"type": "user", "name": user.name, "orgs": orgs, "auth": token})

    def create(self, body: bytes) -> Answer:
        user, wish = self._user(), json.loads(body)
        name = f"{wish['organization'] or (user and user.name)}/{wish['name']}"
        if user is None or not user.may_write(name):
            raise _RefusalError(403, f"you may not create {name}")
        if name in self.hub.repos:
            raise _RefusalError(409, f"{name} exists")
        self.hub.repos[name] = Repository(private=wish.get("visibility") == "private")
        return _json({"url": f"{self.hub.endpoint}/{name}"})

    def info(self, _: bytes, repo_id: str, revision: str | None = None) -> Answer:
        repo = self._readable(repo_id)
        number = self._commit_number(repo, revision or "main")
        files = repo.commits[number]
        card = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), re.DOTALL)
        return _json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": repo.sha(number),
                "private": repo.private,
                "siblings": [{"rfilename": path} for path in files],
                "cardData": yaml.safe_load(card[1]) if card else None,
            }
        )

    def auth_check(self, _: bytes, repo_id: str, write: str | None) -> Answer:
        (self._writable if write else self._readable)(repo_id)
        return _json({})

    def tree(self, _: bytes, repo_id: str, revision: str) -> Answer:
        repo = self._readable(repo_id)
        files = repo.commits[self._commit_number(repo, revision)]
        return _json([_tree_entry(path, content) for path, content in files.items()])

    def validate(self, body: bytes) -> Answer:
        card = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        if card is None or not isinstance(yaml.safe_load(card[1]), dict):
            return _json({"errors": [{"message": "no metadata"}], "warnings": []}, 400)
        return _json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> Answer:
        repo = self._writable(repo_id)
        present = repo.commits[self._commit_number(repo, revision)]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": blob_oid(file["path"], present[file["path"]])
                if file["path"] in present
                else None,
            }
            for file in json.loads(body)["files"]
        ]
        return _json({"files": modes})

    def batch(self, body: bytes, repo_id: str) -> Answer:
        self._writable(repo_id)
        objects = []
        for item in json.loads(body)["objects"]:
            if item["oid"] not in self.hub.large:
                upload = {"href": f"{self.hub.endpoint}/store/{item['oid']}"}
                item["actions"] = {"upload": upload}
            objects.append(item)
        return _json({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _RefusalError(400, "the content has another SHA256")
        self.hub.large[oid] = body
        self.hub.uploaded.append(oid)
        return _json({})

    def commit(self, body: bytes, repo_id: str, revision: str) -> Answer:
        repo = self._writable(repo_id)
        files = dict(repo.commits[self._commit_number(repo, revision)])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise _RefusalError(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        repo.commits.append(files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{repo.sha()}"
        return _json({"commitUrl": url, "commitOid": repo.sha()})

    def resolve(self, _: bytes, repo_id: str, revision: str, path: str) -> Answer:
        repo = self._readable(repo_id)
        number = self._commit_number(repo, revision)
        if path not in repo.commits[number]:
            raise _RefusalError(404, f"no file {path}", "EntryNotFound")
        content = repo.commits[number][path]
        headers = {"ETag": f'"{blob_oid(path, content)}"', "X-Repo-Commit": repo.sha(number)}
        return 200, content, headers


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = hashlib.sha1(content).hexdigest()
    if is_large(path):
        sha = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
    return entry


REPO = r"(?P<repo_id>[^/]+/[^/]+?)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", f"/api/models/{REPO}(/revision/{REVISION})?", "info"),
    ("GET", f"/api/models/{REPO}/auth-check(?P<write>/write)?", "auth_check"),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}", "tree"),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", "preupload"),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", "commit"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/store/(?P<oid>[0-9a-f]{64})", "store"),
    ("GET HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
]
