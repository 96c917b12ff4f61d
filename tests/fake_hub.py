"""A Hugging Face hub in memory, enough to create, commit, open pull requests and load back; it can be made to fail.

`with FakeHub() as hub:` gives hub.url, hub.token, hub.repos; hub.faults holds the failures that are to come.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class File(NamedTuple):
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


class Commit(NamedTuple):
    sha: str
    files: dict[str, File]
    message: str


@dataclass
class Repo:
    private: bool = False
    refs: dict[str, list[Commit]] = field(default_factory=dict)  # a ref is its history, oldest first

    def __post_init__(self):
        self.commit("main", {".gitattributes": File(b"", False)}, "initial commit")

    def commit(self, ref: str, files: dict[str, File], message: str) -> Commit:
        history = self.refs.setdefault(ref, [])
        sha = hashlib.sha1(f"{ref} {len(history)} {message} {[item.sha for item in history]}".encode()).hexdigest()
        history.append(Commit(sha, files, message))
        return history[-1]

    def at(self, revision: str) -> Commit | None:
        if revision in self.refs:
            return self.refs[revision][-1]
        return next((item for history in self.refs.values() for item in history if item.sha == revision), None)


@dataclass
class Fault:
    """Fail the next `times` requests of this method and path: by a status, or by hanging up where it is None."""

    method: str
    path: str
    status: int | None = 503
    applied: bool = False  # hang up after the request was carried out
    times: int = 1


class FakeHub:
    def __init__(self):
        self.token = "hf_test"
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()

    def __enter__(self) -> FakeHub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self):
        self.hub: FakeHub = self.server.hub
        url = urlsplit(self.path)
        body = self.body()
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
            fault = self.hub.fault(self.command, url.path)
            self.mute = fault is not None and fault.status is None
            if fault is None or fault.applied:
                self.route([unquote(part) for part in url.path.split("/")[1:]], parse_qs(url.query), body)
            elif fault.status is not None:
                self.reply(fault.status, {"error": "injected"})
            if self.mute:
                self.close_connection = True

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, status: int = 200, value=None, headers=None, raw: bytes = b""):
        if self.mute:
            return
        raw = raw if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def missing(self, what: str):
        self.reply(404, {"error": f"{what} not found"}, {"X-Error-Code": f"{what}NotFound"})

    @property
    def welcome(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def route(self, parts: list[str], query: dict, body: bytes):
        writes = self.command == "POST" and ("create" in parts or "commit" in parts)
        if writes and not self.welcome:
            self.reply(401, {"error": "Invalid credentials in Authorization header"})
            return
        match self.command, parts:
            case "POST", ["api", "repos", "create"]:
                self.create(json.loads(body))
            case "POST", ["api", "validate-yaml"]:
                self.reply(value={"errors": [], "warnings": []})
            case "PUT", ["lfs", oid]:
                assert hashlib.sha256(body).hexdigest() == oid
                self.hub.blobs[oid] = body
                self.reply()
            case _, ["api", "models", owner, name, *rest]:
                self.with_repo(f"{owner}/{name}", self.api, rest, query, body)
            case "POST", [owner, name, "info", "lfs", "objects", "batch"]:
                self.with_repo(f"{owner}/{name.removesuffix('.git')}", self.batch, json.loads(body))
            case "GET" | "HEAD", [owner, name, "resolve", revision, *path]:
                self.with_repo(f"{owner}/{name}", self.resolve, revision, "/".join(path))
            case _:
                self.missing("Entry")

    def with_repo(self, id: str, method, *arguments):
        repo = self.hub.repos.get(id)
        if repo is None or (repo.private and not self.welcome):
            self.missing("Repo")
            return
        method(id, repo, *arguments)

    def create(self, wanted: dict):
        id = f"{wanted['organization'] or 'tester'}/{wanted['name']}"
        exists = id in self.hub.repos
        if not exists:
            self.hub.repos[id] = Repo(wanted.get("visibility") == "private")
        self.reply(409 if exists else 200, {"url": f"{self.hub.url}/{id}", "name": id, "id": id})

    def batch(self, id: str, repo: Repo, wanted: dict):
        def action(oid):
            return {} if oid in self.hub.blobs else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{oid}"}}}

        objects = [{"oid": item["oid"], "size": item["size"], **action(item["oid"])} for item in wanted["objects"]]
        self.reply(value={"transfer": "basic", "objects": objects})

    def api(self, id: str, repo: Repo, rest: list[str], query: dict, body: bytes):
        revision = rest[1] if len(rest) > 1 else "main"
        found = repo.at(revision)
        if found is None:
            self.missing("Revision")
            return
        match self.command, rest:
            case "GET", [] | ["revision", _]:
                names = [{"rfilename": name} for name in found.files]
                self.reply(value={"id": id, "sha": found.sha, "private": repo.private, "siblings": names, "tags": []})
            case "GET", ["tree", *_]:
                self.reply(value=[self.entry(name, file) for name, file in sorted(found.files.items())])
            case "GET", ["refs"]:
                tips = [{"name": ref, "ref": ref, "targetCommit": repo.at(ref).sha} for ref in repo.refs]
                pulls = [tip for tip in tips if tip["ref"] != "main"]
                self.reply(value={"branches": tips[:1], "tags": [], "converts": [], "pullRequests": pulls})
            case "POST", ["preupload", _]:
                files = [self.mode(file["path"], found) for file in json.loads(body)["files"]]
                self.reply(value={"files": files})
            case "POST", ["commit", _]:
                self.commit(id, repo, revision, [json.loads(line) for line in body.splitlines()], "create_pr" in query)
            case _:
                self.missing("Entry")

    def entry(self, name: str, file: File) -> dict:
        size = len(file.content)
        lfs = {"lfs": {"oid": file.oid, "size": size, "pointerSize": 134}} if file.lfs else {}
        return {"type": "file", "path": name, "size": size, "oid": file.oid, **lfs}

    def mode(self, path: str, found: Commit) -> dict:
        upload = "lfs" if path.endswith(".safetensors") else "regular"
        oid = found.files[path].oid if path in found.files else None
        return {"path": path, "uploadMode": upload, "shouldIgnore": False, "oid": oid}

    def commit(self, id: str, repo: Repo, ref: str, lines: list[dict], pr: bool):
        head, *operations = lines
        base = repo.at(ref)
        if not pr and head["value"].get("parentCommit", base.sha) != base.sha:
            self.reply(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files = dict(base.files)
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), False)
                case "lfsFile":
                    files[value["path"]] = File(self.hub.blobs[value["oid"]], True)
                case "deletedFile":
                    del files[value["path"]]
        number = len(repo.refs)  # main and the pull requests so far
        made = repo.commit(f"refs/pr/{number}" if pr else ref, files, head["value"]["summary"])
        url = f"{self.hub.url}/{id}/commit/{made.sha}"
        pull = f"{self.hub.url}/{id}/discussions/{number}" if pr else None
        self.reply(value={"success": True, "commitOid": made.sha, "commitUrl": url, "pullRequestUrl": pull})

    def resolve(self, id: str, repo: Repo, revision: str, path: str):
        found = repo.at(revision)
        if found is None or path not in found.files:
            self.missing("Revision" if found is None else "Entry")
            return
        file = found.files[path]
        self.reply(headers={"ETag": f'"{file.oid}"', "X-Repo-Commit": found.sha}, raw=file.content)
