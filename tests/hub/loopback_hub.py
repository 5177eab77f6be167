"""A small Hub on this machine: the routes that huggingface_hub calls for models, answered as the Hub does.

A dataset is found by the name of a model.
"""

import base64
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


TOKEN = "hf_loopback"


class Blob(NamedTuple):
    content: bytes
    is_large: bool = False  # served from elsewhere then

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.is_large else self.git_oid


@dataclass(frozen=True)
class Commit:
    files: Mapping[str, Blob]
    message: str
    parent: str | None = None

    @property
    def oid(self) -> str:
        told = [self.parent, self.message, sorted((name, blob.oid) for name, blob in self.files.items())]
        return hashlib.sha1(json.dumps(told).encode()).hexdigest()


@dataclass
class Repository:
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branches and pull requests -> commits
    private: bool = False
    gated: bool = False

    def commit(self, files: Mapping[str, Blob], message: str, ref: str = "main") -> str:
        commit = Commit(dict(files), message, self.refs.get(ref))
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit.oid

    @property
    def files(self) -> Mapping[str, Blob]:
        return self.commits[self.refs["main"]].files


class Request(NamedTuple):
    method: str
    path: str  # with the query
    host: str
    token: str | None


@dataclass
class LoopbackHub:
    """The server, in a thread of its own while the ``with`` block lasts; ``url`` is what HF_ENDPOINT must be."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)  # old id -> new id
    uploaded: dict[str, bytes] = field(default_factory=dict)  # SHA-256 -> large files, as they came
    requests: list[Request] = field(default_factory=list)  # that were answered, in order
    faults: dict[tuple[str, str], int] = field(default_factory=dict)  # method, part of a path -> the answered status
    replaced: dict[str, bytes] = field(default_factory=dict)  # SHA-256 of a large file -> what is sent in its place
    cut: dict[str, int] = field(default_factory=dict)  # likewise, after how many bytes the connection breaks, once

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked(self, method: str, part: str) -> list[Request]:
        return [request for request in self.requests if request.method == method and part in request.path]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def _handle(self) -> None:
        url, hub = urllib.parse.urlsplit(self.path), self.hub
        self.query = dict(urllib.parse.parse_qsl(url.query))
        body = self._read_body()
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        hub.requests.append(Request(self.command, self.path, self.headers.get("Host", ""), self.token))
        for (method, part), status in hub.faults.items():
            if method == self.command and part in url.path:
                return self._answer({"error": "out of order"}, status)

        path = url.path.replace("/api/datasets/", "/api/models/").removeprefix("/datasets").strip("/")
        parts = [urllib.parse.unquote(part) for part in path.split("/")]
        match self.command, parts:
            case "GET", ["api", "whoami-v2"]:
                return self._may_write() and self._answer({"type": "user", "name": "me"})
            case "POST", ["api", "validate-yaml"]:
                return self._answer({"errors": [], "warnings": []})
            case "POST", ["api", "repos", "create"]:
                return self._may_write() and self._create(json.loads(body))
            case "GET", ["cdn", digest]:
                return self._send_large(digest)
            case "PUT", ["upload", digest]:
                assert hashlib.sha256(body).hexdigest() == digest
                hub.uploaded[digest] = body
                return self._answer(b"")
            case "POST", [namespace, name, "info", "lfs", "objects", "batch"]:
                found = self._repository(f"{namespace}/{name.removesuffix('.git')}", writes=True)
                return found and self._lfs_batch(json.loads(body))
            case _, ["api", "models", namespace, name, *rest]:
                repo_id = f"{namespace}/{name}"
            case "GET" | "HEAD", [namespace, name, "resolve", *rest]:
                repo_id = f"{namespace}/{name}"
                rest = ["resolve", *rest]
            case _:
                return self._answer({"error": "no such route"}, 404)

        if repo_id in hub.renamed:
            place = self.path.replace(f"/{repo_id}", f"/{hub.renamed[repo_id]}", 1)
            return self._answer({}, 307, {"Location": place})
        repository = self._repository(repo_id, writes=self.command == "POST")
        if repository is None:
            return None
        action, revision, *path = rest or ["info", "main"]
        if action == "resolve" and repository.gated and self.token != TOKEN:
            return self._answer({"error": "Access is restricted"}, 401, {"X-Error-Code": "GatedRepo"})
        commit = repository.commits.get(repository.refs.get(revision, revision))
        if commit is None:
            return self._answer({"error": f"no revision {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"})
        match self.command, action:
            case "GET", "info" | "revision":
                siblings = [{"rfilename": name} for name in sorted(commit.files)]
                about = {"id": repo_id, "modelId": repo_id, "sha": commit.oid, "private": repository.private}
                gated = "auto" if repository.gated else False
                return self._answer({**about, "gated": gated, "tags": [], "siblings": siblings})
            case "GET", "tree":
                return self._answer([self._entry(name, blob) for name, blob in sorted(commit.files.items())])
            case _, "resolve":
                return self._resolve(commit, "/".join(path))
            case "POST", "preupload":
                return self._preupload(commit, json.loads(body))
            case "POST", "commit":
                lines = [json.loads(line) for line in body.splitlines() if line]
                return self._commit(repo_id, repository, commit, revision, lines)
        return self._answer({"error": "no such route"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command != "HEAD" else b""
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: int(headers.get("X-Cut", len(body)))])

    def log_message(self, *_) -> None: ...

    def _may_write(self) -> bool:
        if self.token != TOKEN:
            self._answer({"error": "Invalid username or password."}, 401)
        return self.token == TOKEN

    def _repository(self, repo_id: str, writes: bool) -> Repository | None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.token != TOKEN):
            # the Hub does not tell strangers which private repositories there are
            status = 404 if self.token == TOKEN else 401
            return self._answer({"error": "Repository not found"}, status, {"X-Error-Code": "RepoNotFound"})
        return repository if not writes or self._may_write() else None

    @staticmethod
    def _entry(name: str, blob: Blob) -> dict:
        entry = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.git_oid}
        lfs = {"oid": blob.oid, "size": len(blob.content), "pointerSize": 132}
        return {**entry, "lfs": lfs} if blob.is_large else entry

    def _resolve(self, commit: Commit, name: str) -> None:
        headers, blob = {"X-Repo-Commit": commit.oid}, commit.files.get(name)
        if blob is None:
            return self._answer({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        if not blob.is_large:
            return self._send(blob.content, {**headers, "ETag": f'"{blob.oid}"'})
        # another name of this machine: the token must not follow there
        headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.oid}"'}
        return self._answer({}, 302, {**headers, "Location": f"http://localhost:{self.hub.port}/cdn/{blob.oid}"})

    def _send_large(self, digest: str) -> None:
        commits = [commit for repository in self.hub.repositories.values() for commit in repository.commits.values()]
        blobs = (blob for commit in commits for blob in commit.files.values())
        content = next(blob.content for blob in blobs if blob.is_large and blob.oid == digest)
        self._send(self.hub.replaced.get(digest, content), {"ETag": f'"{digest}"'}, digest)

    def _send(self, content: bytes, headers: Mapping[str, str], digest: str | None = None) -> None:
        total, start = len(content), 0
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if (ranged := self.headers.get("Range")) is not None:
            start = int(ranged.removeprefix("bytes=").split("-")[0])
            if start >= total:
                return self._answer({"error": "out of range"}, 416, {"Content-Range": f"bytes */{total}"})
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        if digest in self.hub.cut and self.command == "GET":
            headers["X-Cut"] = str(self.hub.cut.pop(digest))
            self.close_connection = True
        return self._answer(content[start:], 200 if ranged is None else 206, headers)

    def _create(self, request: dict) -> None:
        repo_id = f"{request.get('organization') or 'me'}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "0" * 24}
        with self.hub.lock:
            if repo_id in self.hub.repositories:
                return self._answer({**answer, "error": "You already created this model repo"}, 409)
            private = request.get("visibility") == "private" or bool(request.get("private"))
            repository = self.hub.repositories[repo_id] = Repository(private=private)
            rules = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
            repository.commit({".gitattributes": Blob(rules)}, "initial commit")
        return self._answer(answer)

    def _preupload(self, commit: Commit, request: dict) -> None:
        answers = []
        for path in (file["path"] for file in request["files"]):
            mode = "lfs" if path.endswith((".safetensors", ".bin", ".png")) else "regular"
            present = {"oid": commit.files[path].oid} if path in commit.files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **present})
        self._answer({"files": answers})

    def _lfs_batch(self, request: dict) -> None:
        objects = []
        for oid, size in ((wanted["oid"], wanted["size"]) for wanted in request["objects"]):
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/upload/{oid}"}}}
            objects.append({"oid": oid, "size": size, **({} if oid in self.hub.uploaded else upload)})
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, repo_id: str, repository: Repository, parent: Commit, revision: str, lines: list[dict]) -> None:
        files, message = dict(parent.files), ""
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            else:
                files[value["path"]] = Blob(self.hub.uploaded[value["oid"]], is_large=True)
        pull_request = None
        with self.hub.lock:
            if self.query.get("create_pr") == "1":
                number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
                revision, pull_request = f"refs/pr/{number}", f"{self.hub.url}/{repo_id}/discussions/{number}"
                repository.refs[revision] = parent.oid
            oid = repository.commit(files, message, revision)
        url = f"{self.hub.url}/{repo_id}/commit/{oid}"
        answer = {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}
        return self._answer({**answer, "pullRequestUrl": pull_request})
