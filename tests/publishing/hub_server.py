"""
A Hub of one process on the loopback, for the unmodified client: what `huggingface_hub` asks for when it creates,
fills, lists and downloads a repository, with its errors, and with connections that break on demand.

As on the Hub, large files go to a second address under signed links, where no access token may be sent.
"""

import base64
import hashlib
import json
import secrets
import threading
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin")


@dataclass
class Repo:
    """A repository: the files of each commit, and the commit of each branch."""

    private: bool
    commits: dict[str, dict[str, "Blob"]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, files: dict[str, "Blob"]) -> str:
        sha = hashlib.sha1(secrets.token_bytes(20)).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


@dataclass(frozen=True)
class Blob:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", **body: str):
        self.status, self.message, self.code, self.body = status, message, code, body


class HubServer:
    """
    Args:
        tokens: Role ("write" or "read") and user by access token.

    Attributes:
        cut: SHA-256 of large files whose upload breaks in the middle, whenever it is tried.
        puts: How often each large file has arrived whole, by SHA-256; `broken_puts` how often it broke.
        requests: Method and path of everything asked for.
        leaks: Requests to the storage that carried an access token.
        echo_tokens: Whether refusals repeat the token they were sent, as a careless server might.
    """

    def __init__(self, tokens: dict[str, tuple[str, str]]):
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.signature = secrets.token_hex(8)
        self.cut: set[str] = set()
        self.puts: Counter[str] = Counter()
        self.broken_puts: Counter[str] = Counter()
        self.requests: list[str] = []
        self.leaks: list[str] = []
        self.echo_tokens = False
        self.lock = threading.RLock()
        self.servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), handler(self)) for handler in (api_handler, storage_handler)
        ]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    def __enter__(self) -> "HubServer":
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: Any):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository at a branch or commit."""
        repo = self.repos[repo_id]
        return {path: blob.content for path, blob in repo.commits[repo.branches.get(revision, revision)].items()}

    def put_files(self, repo_id: str, files: dict[str, bytes]) -> str:
        """Make a repository as if somebody else had."""
        repo = self.repos.setdefault(repo_id, Repo(private=False))
        blobs = {path: Blob(content, path.endswith(LFS_SUFFIXES)) for path, content in files.items()}
        self.stored |= {blob.sha256: blob.content for blob in blobs.values() if blob.is_lfs}
        return repo.add("main", blobs)

    def account(self, token: str | None) -> tuple[str, str] | None:
        if token is None:
            return None
        if token not in self.tokens:
            said = f"Invalid credentials in Authorization header{f': {token}' if self.echo_tokens else ''}"
            raise Refused(401, said)
        return self.tokens[token]

    def readable(self, repo_id: str, token: str | None) -> Repo:
        account = self.account(token)
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and (account is None or account[0] != repo_id.split("/")[-2])):
            raise Refused(404 if account else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, repo_id: str, token: str | None) -> Repo:
        repo = self.readable(repo_id, token)
        self.check_right(repo_id.split("/")[-2], token)
        return repo

    def check_right(self, owner: str, token: str | None):
        account = self.account(token)
        if account is None:
            raise Refused(401, "Invalid username or password.")
        if account != (owner, "write"):
            said = f"You don't have the rights to write to {owner}{f' with {token}' if self.echo_tokens else ''}"
            raise Refused(403, said)

    def at(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]]:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        return sha, repo.commits[sha]

    def whoami(self, token: str | None) -> dict:
        account = self.account(token)
        if account is None:
            raise Refused(401, "Invalid username or password.")
        return {"type": "user", "name": account[0], "orgs": [], "auth": {"accessToken": {"role": account[1]}}}

    def create_repo(self, body: dict, token: str | None) -> dict:
        account = self.account(token)
        owner = body.get("organization") or (account[0] if account else "")
        self.check_right(owner, token)
        kind = "spaces/" if body.get("type") == "space" else ""
        repo_id = f"{kind}{owner}/{body['name']}"
        if repo_id in self.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.endpoint}/{repo_id}")
        repo = self.repos[repo_id] = Repo(body.get("visibility") == "private" or bool(body.get("private")))
        repo.add("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}

    def create_branch(self, repo_id: str, branch: str, body: dict, token: str | None) -> dict:
        repo = self.writable(repo_id, token)
        if branch in repo.branches:
            raise Refused(409, "Reference already exists")
        repo.branches[branch] = self.at(repo, body.get("startingPoint", "main"))[0]
        return {}

    def preupload(self, repo_id: str, revision: str, body: dict, token: str | None) -> dict:
        _, files = self.at(self.writable(repo_id, token), revision)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": files[file["path"]].etag if file["path"] in files else None,
                }
                for file in body["files"]
            ]
        }

    def batch(self, repo_id: str, body: dict, token: str | None) -> dict:
        self.writable(repo_id, token)
        objects = []
        for wanted in body["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.stored:
                answer["actions"] = {
                    "upload": {"href": f"{self.storage}/{wanted['oid']}?signature={self.signature}"},
                    "verify": {"href": f"{self.endpoint}/{repo_id}.git/info/lfs/verify"},
                }
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def verify(self, repo_id: str, body: dict, token: str | None) -> dict:
        self.writable(repo_id, token)
        if len(self.stored.get(body["oid"], b"")) != body["size"]:
            raise Refused(400, "The file did not arrive")
        return {}

    def commit(self, repo_id: str, revision: str, lines: list[dict], token: str | None) -> dict:
        repo = self.writable(repo_id, token)
        if revision not in repo.branches:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        files = dict(self.at(repo, revision)[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.stored:
                    raise Refused(400, f"{value['path']} has not been uploaded")
                files[value["path"]] = Blob(self.stored[value["oid"]], True)
            elif line["key"] == "deletedFile":
                if value["path"] not in files:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
            elif line["key"] != "header":
                raise Refused(400, f"unknown operation {line['key']}")
        sha = repo.add(revision, files)
        return {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{self.endpoint}/{repo_id}/commit/{sha}",
            "hookOutput": "",
        }

    def info(self, repo_id: str, revision: str, token: str | None) -> dict:
        repo = self.readable(repo_id, token)
        sha, files = self.at(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {
            "id": repo_id,
            "modelId": repo_id,
            "sha": sha,
            "private": repo.private,
            "siblings": siblings,
            "tags": [],
        }

    def tree(self, repo_id: str, revision: str, inside: str, recursive: bool, token: str | None) -> list[dict]:
        _, files = self.at(self.readable(repo_id, token), revision)
        entries: dict[str, dict] = {}
        for path, blob in sorted(files.items()):
            if inside and not path.startswith(f"{inside}/"):
                continue
            below = [str(parent) for parent in PurePosixPath(path).parents][:-1]
            folders = [name for name in reversed(below) if name != inside and not inside.startswith(f"{name}/")]
            entries |= {name: {"type": "directory", "path": name, "oid": "0" * 40} for name in folders}
            if not folders or recursive:
                lfs = (
                    {"lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}} if blob.is_lfs else {}
                )
                entries[path] = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.content)} | lfs
        if inside and not entries:
            raise Refused(404, f"{inside} does not exist", "EntryNotFound")
        return list(entries.values())

    def file(self, repo_id: str, revision: str, path: str, token: str | None) -> tuple[str, Blob]:
        sha, files = self.at(self.readable(repo_id, token), revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        return sha, files[path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *arguments: Any):
        pass

    def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def as_models(parts: list[str]) -> list[str]:
    """The parts of an address, where a Space stands as a model of the owner `spaces/owner`."""
    if parts[:2] == ["api", "spaces"]:
        return ["api", "models", f"spaces/{parts[2]}", *parts[3:]]
    return [f"spaces/{parts[1]}", *parts[2:]] if parts[0] == "spaces" else parts


def api_handler(hub: HubServer) -> type[Handler]:
    """The Hub's API and its links to files."""

    class Api(Handler):
        def respond(self):
            url = urlsplit(self.path)
            with hub.lock:
                hub.requests.append(f"{self.command} {url.path}")
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                scheme, _, token = self.headers.get("Authorization", "").partition(" ")
                try:
                    self.route(url, body, token if scheme == "Bearer" else None)
                except Refused as refused:
                    headers = {"X-Error-Message": refused.message} | (
                        {"X-Error-Code": refused.code} if refused.code else {}
                    )
                    self.answer(
                        refused.status, json.dumps({"error": refused.message} | refused.body).encode(), headers
                    )

        do_GET = do_HEAD = do_POST = respond

        def route(self, url: Any, body: bytes, token: str | None):
            parts = as_models([unquote(part) for part in url.path.strip("/").split("/")])
            match self.command, parts:
                case "GET", ["api", "whoami-v2"]:
                    result: Any = hub.whoami(token)
                case "POST", ["api", "validate-yaml"]:
                    result = {"errors": [], "warnings": []}
                case "POST", ["api", "repos", "create"]:
                    result = hub.create_repo(json.loads(body), token)
                case "POST", ["api", "models", owner, name, "branch", branch]:
                    result = hub.create_branch(f"{owner}/{name}", branch, json.loads(body or b"{}"), token)
                case "POST", ["api", "models", owner, name, "preupload", revision]:
                    result = hub.preupload(f"{owner}/{name}", revision, json.loads(body), token)
                case "POST", ["api", "models", owner, name, "commit", revision]:
                    lines = [json.loads(line) for line in body.splitlines()]
                    result = hub.commit(f"{owner}/{name}", revision, lines, token)
                case "POST", [owner, name, "info", "lfs", "objects", "batch"]:
                    result = hub.batch(f"{owner}/{name.removesuffix('.git')}", json.loads(body), token)
                case "POST", [owner, name, "info", "lfs", "verify"]:
                    result = hub.verify(f"{owner}/{name.removesuffix('.git')}", json.loads(body), token)
                case "GET", ["api", "models", owner, name]:
                    result = hub.info(f"{owner}/{name}", "main", token)
                case "GET", ["api", "models", owner, name, "revision", revision]:
                    result = hub.info(f"{owner}/{name}", revision, token)
                case "GET", ["api", "models", owner, name, "tree", revision, *inside]:
                    recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
                    result = hub.tree(f"{owner}/{name}", revision, "/".join(inside), recursive, token)
                case "GET" | "HEAD", [owner, name, "resolve", revision, *path] if path:
                    self.resolve(*hub.file(f"{owner}/{name}", revision, "/".join(path), token))
                    return
                case _:
                    raise Refused(404, f"no such address: {self.command} {url.path}")
            self.answer(HTTPStatus.OK, json.dumps(result).encode(), {"Content-Type": "application/json"})

        def resolve(self, sha: str, blob: Blob):
            headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"'}
            if not blob.is_lfs:
                self.answer(HTTPStatus.OK, blob.content, headers)
                return
            headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-Etag": f'"{blob.etag}"'}
            link = f"{hub.storage}/{blob.sha256}?signature={hub.signature}"
            self.answer(HTTPStatus.FOUND, headers=headers | {"Location": link})

    return Api


def storage_handler(hub: HubServer) -> type[Handler]:
    """Where large files lie, under links that only the Hub can sign."""

    class Storage(Handler):
        def signed(self) -> str | None:
            """The name of the file, if the link is signed; else it is refused."""
            url = urlsplit(self.path)
            if "Authorization" in self.headers:
                hub.leaks.append(f"{self.command} {url.path}")
            if parse_qs(url.query).get("signature") == [hub.signature]:
                return url.path.strip("/")
            self.close_connection = True
            self.answer(HTTPStatus.FORBIDDEN)
            return None

        def do_PUT(self):
            oid = self.signed()
            if oid is None:
                return
            size = int(self.headers["Content-Length"])
            if oid in hub.cut:
                self.rfile.read(size // 2)
                hub.broken_puts[oid] += 1
                self.close_connection = True
                return
            content = self.rfile.read(size)
            if hashlib.sha256(content).hexdigest() != oid:
                self.answer(HTTPStatus.BAD_REQUEST)
                return
            with hub.lock:
                hub.stored[oid] = content
                hub.puts[oid] += 1
            self.answer(HTTPStatus.OK)

        def do_GET(self):
            oid = self.signed()
            if oid is not None:
                self.answer(HTTPStatus.OK if oid in hub.stored else HTTPStatus.NOT_FOUND, hub.stored.get(oid, b""))

        do_HEAD = do_GET

    return Storage
