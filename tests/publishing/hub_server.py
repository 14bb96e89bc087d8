"""
A Hub of one process on the loopback, for the unmodified client: what `huggingface_hub` asks for when it creates,
fills and downloads a repository, with its errors, and with connections that break on demand.

As on the Hub, large files go to a second address under signed links, where no access token may be sent.
"""

import base64
import hashlib
import json
import secrets
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True)
class Blob:
    content: bytes
    is_lfs: bool

    @property
    def etag(self) -> str:
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """A repository: the files of each commit, and the commit of each branch."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, files: dict[str, Blob]) -> str:
        sha = secrets.token_hex(20)
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, Blob]]:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        return sha, self.commits[sha]


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
        self.collections: dict[str, list[str]] = {}
        self.stored: dict[str, bytes] = {}
        self.signature = secrets.token_hex(8)
        self.cut: set[str] = set()
        self.puts: Counter[str] = Counter()
        self.broken_puts: Counter[str] = Counter()
        self.requests: list[str] = []
        self.leaks: list[str] = []
        self.echo_tokens = False
        self.lock = threading.RLock()
        kinds = [type(kind.__name__, (kind,), {"hub": self}) for kind in (Api, Storage)]
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in kinds]
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
        return {path: blob.content for path, blob in self.repos[repo_id].at(revision)[1].items()}

    def put_files(self, repo_id: str, files: dict[str, bytes]) -> str:
        """Make a repository as if somebody else had."""
        blobs = {path: Blob(content, path.endswith(LFS_SUFFIXES)) for path, content in files.items()}
        self.stored |= {blob.etag: blob.content for blob in blobs.values() if blob.is_lfs}
        return self.repos.setdefault(repo_id, Repo(private=False)).add("main", blobs)

    def account(self, token: str | None) -> tuple[str, str] | None:
        if token is not None and token not in self.tokens:
            said = f"Invalid credentials in Authorization header{f': {token}' if self.echo_tokens else ''}"
            raise Refused(401, said)
        return None if token is None else self.tokens[token]

    def readable(self, repo_id: str, token: str | None) -> Repo:
        account, repo = self.account(token), self.repos.get(repo_id)
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

    def whoami(self, token: str | None) -> dict:
        account = self.account(token)
        if account is None:
            raise Refused(401, "Invalid username or password.")
        return {"type": "user", "name": account[0], "orgs": [], "auth": {"accessToken": {"role": account[1]}}}

    def create_repo(self, body: dict, token: str | None) -> dict:
        account = self.account(token)
        owner = body.get("organization") or (account[0] if account else "")
        self.check_right(owner, token)
        repo_id = f"{'spaces/' if body.get('type') == 'space' else ''}{owner}/{body['name']}"
        if repo_id in self.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.endpoint}/{repo_id}")
        repo = self.repos[repo_id] = Repo(body.get("visibility") == "private" or bool(body.get("private")))
        repo.add("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}

    def create_collection(self, body: dict, token: str | None) -> dict:
        self.check_right(body["namespace"], token)
        slug = f"{body['namespace']}/{body['title'].lower().replace(' ', '-')}-{'0' * 24}"
        if slug in self.collections:
            raise Refused(409, "This collection already exists", slug=slug)
        self.collections[slug] = []
        return self.collection(slug)

    def collection(self, slug: str) -> dict:
        there = enumerate(self.collections[slug])
        items = [{"_id": str(place), "id": each, "type": "model", "position": place} for place, each in there]
        about = {"slug": slug, "title": slug, "owner": {"name": slug.split("/")[0]}, "items": items}
        return about | {
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "position": 0,
            "private": False,
            "theme": "blue",
            "upvotes": 0,
        }

    def add_to_collection(self, slug: str, body: dict, token: str | None) -> dict:
        self.check_right(slug.split("/")[0], token)
        item = body["item"]["id"]
        self.readable(item, token)
        if item in self.collections[slug]:
            raise Refused(409, "Item already in collection")
        self.collections[slug].append(item)
        return self.collection(slug)

    def create_branch(self, repo: Repo, branch: str, body: dict) -> dict:
        if branch in repo.branches:
            raise Refused(409, "Reference already exists")
        repo.branches[branch] = repo.at(body.get("startingPoint", "main"))[0]
        return {}

    def preupload(self, repo: Repo, revision: str, body: dict) -> dict:
        there, paths = repo.at(revision)[1], [file["path"] for file in body["files"]]
        modes = {path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths}
        oids = {path: there[path].etag if path in there else None for path in paths}
        answers = (
            {"path": path, "uploadMode": modes[path], "shouldIgnore": False, "oid": oids[path]} for path in paths
        )
        return {"files": list(answers)}

    def batch(self, repo_id: str, body: dict) -> dict:
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

    def verify(self, body: dict) -> dict:
        if len(self.stored.get(body["oid"], b"")) != body["size"]:
            raise Refused(400, "The file did not arrive")
        return {}

    def commit(self, repo_id: str, repo: Repo, revision: str, lines: list[dict]) -> dict:
        if revision not in repo.branches:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        files = dict(repo.at(revision)[1])
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
                case "lfsFile":
                    if value["oid"] not in self.stored:
                        raise Refused(400, f"{value['path']} has not been uploaded")
                    files[value["path"]] = Blob(self.stored[value["oid"]], True)
                case "deletedFile":
                    if value["path"] not in files:
                        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                    del files[value["path"]]
                case "header":
                    pass
                case other:
                    raise Refused(400, f"unknown operation {other}")
        sha = repo.add(revision, files)
        url = f"{self.endpoint}/{repo_id}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}

    def info(self, repo_id: str, revision: str, token: str | None) -> dict:
        repo = self.readable(repo_id, token)
        sha, files = repo.at(revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        known = {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private}
        return known | {"siblings": siblings, "tags": []}

    def tree(self, repo_id: str, revision: str, token: str | None) -> list[dict]:
        """All files, which is what the client asks for."""
        files = self.readable(repo_id, token).at(revision)[1]
        sizes = {path: {"oid": blob.etag, "size": len(blob.content)} for path, blob in sorted(files.items())}
        lfs = {path: {"lfs": size | {"pointerSize": 130}} for path, size in sizes.items() if files[path].is_lfs}
        return [{"type": "file", "path": path} | size | lfs.get(path, {}) for path, size in sizes.items()]

    def file(self, repo_id: str, revision: str, path: str, token: str | None) -> tuple[str, Blob]:
        sha, files = self.readable(repo_id, token).at(revision)
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
        for name, value in ((headers or {}) | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class Api(Handler):
    """The Hub's API and its links to files."""

    def respond(self):
        url, hub = urlsplit(self.path), self.hub
        with hub.lock:
            hub.requests.append(f"{self.command} {url.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            scheme, _, token = self.headers.get("Authorization", "").partition(" ")
            try:
                self.route(url.path, body, token if scheme == "Bearer" else None)
            except Refused as refused:
                headers = {"X-Error-Message": refused.message, "X-Error-Code": refused.code}
                content = json.dumps({"error": refused.message} | refused.body).encode()
                self.answer(refused.status, content, {name: value for name, value in headers.items() if value})

    do_GET = do_HEAD = do_POST = respond

    def route(self, address: str, body: bytes, token: str | None):
        hub, parts = self.hub, as_models([unquote(part) for part in address.strip("/").split("/")])
        match self.command, parts:
            case "GET", ["api", "whoami-v2"]:
                result: Any = hub.whoami(token)
            case "POST", ["api", "validate-yaml"]:
                result = {"errors": [], "warnings": []}
            case "POST", ["api", "repos", "create"]:
                result = hub.create_repo(json.loads(body), token)
            case "POST", ["api", "collections"]:
                result = hub.create_collection(json.loads(body), token)
            case "GET", ["api", "collections", owner, name]:
                result = hub.collection(f"{owner}/{name}")
            case "POST", ["api", "collections", owner, name, "items"]:
                result = hub.add_to_collection(f"{owner}/{name}", json.loads(body), token)
            case "POST", ["api", "models", owner, name, "branch", branch]:
                result = hub.create_branch(hub.writable(f"{owner}/{name}", token), branch, json.loads(body or b"{}"))
            case "POST", ["api", "models", owner, name, "preupload", revision]:
                result = hub.preupload(hub.writable(f"{owner}/{name}", token), revision, json.loads(body))
            case "POST", ["api", "models", owner, name, "commit", revision]:
                lines, repo_id = [json.loads(line) for line in body.splitlines()], f"{owner}/{name}"
                result = hub.commit(repo_id, hub.writable(repo_id, token), revision, lines)
            case "POST", [owner, name, "info", "lfs", *what]:
                repo_id = f"{owner}/{name.removesuffix('.git')}"
                hub.writable(repo_id, token)
                asked = json.loads(body)
                result = hub.verify(asked) if what == ["verify"] else hub.batch(repo_id, asked)
            case "GET", ["api", "models", owner, name]:
                result = hub.info(f"{owner}/{name}", "main", token)
            case "GET", ["api", "models", owner, name, "revision", revision]:
                result = hub.info(f"{owner}/{name}", revision, token)
            case "GET", ["api", "models", owner, name, "tree", revision]:
                result = hub.tree(f"{owner}/{name}", revision, token)
            case "GET" | "HEAD", [owner, name, "resolve", revision, *path] if path:
                return self.resolve(*hub.file(f"{owner}/{name}", revision, "/".join(path), token))
            case _:
                raise Refused(404, f"no such address: {self.command} {address}")
        self.answer(200, json.dumps(result).encode(), {"Content-Type": "application/json"})

    def resolve(self, sha: str, blob: Blob):
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"'}
        if not blob.is_lfs:
            return self.answer(200, blob.content, headers)
        headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-Etag": f'"{blob.etag}"'}
        link = f"{self.hub.storage}/{blob.etag}?signature={self.hub.signature}"
        self.answer(302, headers=headers | {"Location": link})


class Storage(Handler):
    """Where large files lie, under links that only the Hub can sign."""

    def signed(self) -> str | None:
        """The name of the file, if the link is signed; else it is refused."""
        url = urlsplit(self.path)
        if "Authorization" in self.headers:
            self.hub.leaks.append(f"{self.command} {url.path}")
        if parse_qs(url.query).get("signature") == [self.hub.signature]:
            return url.path.strip("/")
        self.close_connection = True
        self.answer(403)
        return None

    def do_PUT(self):
        hub, oid, size = self.hub, self.signed(), int(self.headers["Content-Length"])
        if oid is None:
            return
        if oid in hub.cut:
            self.rfile.read(size // 2)
            hub.broken_puts[oid] += 1
            self.close_connection = True
            return
        content = self.rfile.read(size)
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400)
        with hub.lock:
            hub.stored[oid] = content
            hub.puts[oid] += 1
        self.answer(200)

    def do_GET(self):
        oid, stored = self.signed(), self.hub.stored
        if oid is not None:
            self.answer(200 if oid in stored else 404, stored.get(oid, b""))

    do_HEAD = do_GET


def as_models(parts: list[str]) -> list[str]:
    """The parts of an address, where a Space stands as a model of the owner `spaces/owner`."""
    if parts[:2] == ["api", "spaces"]:
        return ["api", "models", f"spaces/{parts[2]}", *parts[3:]]
    return [f"spaces/{parts[1]}", *parts[2:]] if parts[0] == "spaces" else parts
