"""A small Hub on this machine: repositories with commits, large files, tokens, and faults on request.

It answers the routes that huggingface_hub calls to look up, download, create and commit to model repositories, the way
the Hub does, down to status codes and headers. What is served is what was pushed, addressed by its content.
"""

import base64
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field


TOKEN = "hf_loopback"


@dataclass(frozen=True)
class Blob:
    """A file: its content, and whether it is kept as a large file, which is served from elsewhere."""

    content: bytes
    is_large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.is_large else self.git_oid


@dataclass(frozen=True)
class Commit:
    """Files by name, and what was said of them."""

    files: Mapping[str, Blob]
    message: str
    parent: str | None = None

    @property
    def oid(self) -> str:
        told = [self.parent, self.message, sorted((name, blob.oid) for name, blob in self.files.items())]
        return hashlib.sha1(json.dumps(told).encode()).hexdigest()


@dataclass
class Repository:
    """Commits by id, and what branches, tags and pull requests point to."""

    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: Mapping[str, Blob], message: str, ref: str = "main") -> str:
        commit = Commit(dict(files), message, self.refs.get(ref))
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit.oid

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    @property
    def files(self) -> Mapping[str, Blob]:
        """Those of the main branch."""
        return self.commits[self.refs["main"]].files


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # with the query
    host: str
    token: str | None


class LoopbackHub:
    """The server, in a thread of its own while the ``with`` block lasts.

    Attributes:
        url: What HF_ENDPOINT must be.
        repositories: By id.
        renamed: Old id -> new id.
        requests: All that were answered, in order.
        faults: Method and part of a path -> the status that is answered instead.
        replaced: SHA-256 of a large file -> what is sent in its place.
        cut: SHA-256 of a large file -> after how many bytes the connection breaks, once.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}
        self.uploaded: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: dict[tuple[str, str], int] = {}
        self.replaced: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.lock = threading.Lock()

        class Handler(_Handler):
            hub = self

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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

    # ------------------------------------------------------------------ requests and answers

    def _handle(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command != "HEAD" else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._read_chunks()
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        hub = self.hub
        hub.requests.append(Request(self.command, self.path, self.headers.get("Host", ""), self.token))
        for (method, part), status in hub.faults.items():
            if method == self.command and part in url.path:
                return self._answer(status, {"error": "out of order"})

        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        match self.command, parts:
            case "GET", ["api", "whoami-v2"]:
                return self._json({"type": "user", "name": "me"}) if self._may_write() else None
            case "POST", ["api", "validate-yaml"]:
                return self._json({"errors": [], "warnings": []})
            case "POST", ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case "GET", ["cdn", digest]:
                return self._send_large(digest)
            case "PUT", ["upload", digest]:
                return self._take_large(digest, body)
            case "POST", [namespace, name, "info", "lfs", "objects", "batch"]:
                repo_id = f"{namespace}/{name.removesuffix('.git')}"
                return self._lfs_batch(json.loads(body)) if self._repository(repo_id, writes=True) else None
            case _, ["api", "models", namespace, name, *rest]:
                repo_id = f"{namespace}/{name}"
            case "GET" | "HEAD", [namespace, name, "resolve", revision, *rest]:
                repo_id = f"{namespace}/{name}"
                rest = ["resolve", revision, *rest]
            case _:
                return self._answer(404, {"error": "no such route"})

        if repo_id in hub.renamed:
            place = self.path.replace(f"/{repo_id}", f"/{hub.renamed[repo_id]}", 1)
            return self._answer(307, {}, {"Location": place})
        repository = self._repository(repo_id, writes=self.command == "POST")
        if repository is None:
            return None
        match self.command, rest:
            case "GET", [] | ["revision", _]:
                return self._info(repo_id, repository, rest[1] if rest else "main")
            case "GET", ["tree", revision]:
                return self._tree(repository, revision)
            case _, ["resolve", revision, *path]:
                return self._resolve(repository, revision, "/".join(path))
            case "POST", ["preupload", revision]:
                return self._preupload(repository, revision, json.loads(body))
            case "POST", ["commit", revision]:
                lines = [json.loads(line) for line in body.splitlines() if line]
                return self._commit(repo_id, repository, revision, lines)
        return self._answer(404, {"error": "no such route"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _read_chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, status: int, content: object, headers: Mapping[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: object) -> None:
        self._answer(200, content)

    def log_message(self, *_) -> None:
        """Keeps the requests out of the output of the tests."""

    # ------------------------------------------------------------------ who may do what

    def _may_write(self) -> bool:
        if self.token == TOKEN:
            return True
        self._answer(401, {"error": "Invalid username or password."})
        return False

    def _repository(self, repo_id: str, writes: bool) -> Repository | None:
        """The repository, if it exists for who asks; otherwise the answer has been given."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.token != TOKEN):
            # the Hub does not tell strangers which private repositories there are
            status = 404 if self.token == TOKEN else 401
            self._answer(status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository if not writes or self._may_write() else None

    def _find(self, repository: Repository, revision: str) -> Commit | None:
        commit = repository.find(revision)
        if commit is None:
            self._answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        return commit

    # ------------------------------------------------------------------ reading

    def _info(self, repo_id: str, repository: Repository, revision: str) -> None:
        if commit := self._find(repository, revision):
            siblings = [{"rfilename": name} for name in sorted(commit.files)]
            about = {"id": repo_id, "modelId": repo_id, "sha": commit.oid, "private": repository.private}
            self._json({**about, "gated": "auto" if repository.gated else False, "tags": [], "siblings": siblings})

    def _tree(self, repository: Repository, revision: str) -> None:
        commit = self._find(repository, revision)
        if commit is None:
            return
        entries = []
        for name, blob in sorted(commit.files.items()):
            entry = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.git_oid}
            if blob.is_large:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 132}
            entries.append(entry)
        self._json(entries)

    def _resolve(self, repository: Repository, revision: str, name: str) -> None:
        if repository.gated and self.token != TOKEN:
            return self._answer(401, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
        commit = self._find(repository, revision)
        if commit is None:
            return None
        headers = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(name)
        if blob is None:
            return self._answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
        if not blob.is_large:
            return self._send(blob.content, {**headers, "ETag": f'"{blob.oid}"'})
        # another name of this machine: the token must not follow there
        headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.oid}"'}
        return self._answer(302, {}, {**headers, "Location": f"http://localhost:{self.hub.port}/cdn/{blob.oid}"})

    def _send_large(self, digest: str) -> None:
        blobs = [
            blob
            for repository in self.hub.repositories.values()
            for commit in repository.commits.values()
            for blob in commit.files.values()
            if blob.is_large and blob.sha256 == digest
        ]
        if not blobs:
            return self._answer(404, {"error": "no such object"})
        return self._send(self.hub.replaced.get(digest, blobs[0].content), {"ETag": f'"{digest}"'}, digest)

    def _send(self, content: bytes, headers: Mapping[str, str], digest: str | None = None) -> None:
        """Sends a file, or the range of it that is asked for."""
        total, start, status = len(content), 0, 200
        if (ranged := self.headers.get("Range")) is not None:
            start = int(ranged.removeprefix("bytes=").split("-")[0])
            if start >= total:
                return self._answer(416, {"error": "out of range"}, {"Content-Range": f"bytes */{total}"})
            status = 206
            headers = {**headers, "Content-Range": f"bytes {start}-{total - 1}/{total}"}
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if digest in self.hub.cut and self.command == "GET":
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(total - start)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[start : start + self.hub.cut.pop(digest)])
            self.close_connection = True
            return None
        return self._answer(status, content[start:], headers)

    # ------------------------------------------------------------------ writing

    def _create(self, request: dict) -> None:
        if not self._may_write():
            return
        repo_id = f"{request.get('organization') or 'me'}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "0" * 24}
        with self.hub.lock:
            if repo_id in self.hub.repositories:
                return self._answer(409, {**answer, "error": "You already created this model repo"})
            private = request.get("visibility") == "private" or bool(request.get("private"))
            repository = self.hub.repositories[repo_id] = Repository(private=private)
            rules = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
            repository.commit({".gitattributes": Blob(rules)}, "initial commit")
        return self._json(answer)

    def _preupload(self, repository: Repository, revision: str, request: dict) -> None:
        commit = self._find(repository, revision)
        if commit is None:
            return
        answers = []
        for file in request["files"]:
            large = file["path"].endswith((".safetensors", ".bin", ".png"))
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if (present := commit.files.get(file["path"])) is not None:
                answer["oid"] = present.oid
            answers.append(answer)
        self._json({"files": answers})

    def _lfs_batch(self, request: dict) -> None:
        objects = []
        for wanted in request["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.uploaded:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{wanted['oid']}"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _take_large(self, digest: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != digest:
            return self._answer(400, {"error": "The content has another SHA-256"})
        self.hub.uploaded[digest] = body
        return self._answer(200, b"")

    def _commit(self, repo_id: str, repository: Repository, revision: str, lines: list[dict]) -> None:
        commit = self._find(repository, revision)
        if commit is None:
            return None
        header = next(line["value"] for line in lines if line["key"] == "header")
        files = dict(commit.files)
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]))
                case "lfsFile":
                    if value["oid"] not in self.hub.uploaded:
                        return self._answer(400, {"error": f"{value['path']}: the object was never uploaded"})
                    files[value["path"]] = Blob(self.hub.uploaded[value["oid"]], is_large=True)
                case "deletedFile":
                    files.pop(value["path"], None)
        pull_request = None
        with self.hub.lock:
            if self.query.get("create_pr") == "1":
                number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
                revision = f"refs/pr/{number}"
                repository.refs[revision] = commit.oid
                pull_request = f"{self.hub.url}/{repo_id}/discussions/{number}"
            oid = repository.commit(files, header["summary"], revision)
        url = f"{self.hub.url}/{repo_id}/commit/{oid}"
        return self._json(
            {"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": pull_request, "hookOutput": ""}
        )
