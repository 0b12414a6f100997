# SPDX-License-Identifier: Apache-2.0
"""
A Hub on this machine's loopback, of the standard library alone: what huggingface_hub and transformers ask of the real
one to create, upload, look at and download models. In memory; with switches for what goes wrong.

    with LoopbackHub() as hub:
        ...  # HF_ENDPOINT=hub.url HF_TOKEN=hf_owner
"""

import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


# Token -> user. The reader has no right to write anywhere.
USERS = {"hf_owner": "owner", "hf_other": "other", "hf_reader": "reader"}


class Repository:
    """Commits of files, and branches that point to them."""

    def __init__(self, owner: str, private: bool) -> None:
        self.owner, self.private = owner, private
        self.commits: dict[str, dict] = {}
        self.branches: dict[str, str] = {}
        self.pull_requests: list[str] = []
        self.add("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def add(self, branch: str, files: dict[str, bytes], title: str) -> str:
        parent = self.branches.get(branch)
        commit = hashlib.sha1(f"{parent}{title}{len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = {"files": files, "title": title, "parent": parent}
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]["files"]

    def history(self, revision: str = "main") -> list[str]:
        """The commits, the latest first."""
        commits, commit = [], self.resolve(revision)
        while commit is not None:
            commits.append(commit)
            commit = self.commits[commit]["parent"]
        return commits

    def titles(self, revision: str = "main") -> list[str]:
        """Of the commits, the latest first."""
        return [self.commits[commit]["title"] for commit in self.history(revision)]


class LoopbackHub:
    """The server. `repositories` is what it holds, `requests` what it was asked: (method, path)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        # What is lost next: (method, part of the path) -> how many times. "answer" loses it after it was acted upon.
        self.losses: dict[tuple[str, str], int] = {}
        self.lost_answers: dict[tuple[str, str], int] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, token: str | None = "hf_owner") -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", **({"HF_TOKEN": token} if token else {}),
        }  # fmt: skip


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.where, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append((self.command, self.where))
        # Spaces are kept beside the models, as spaces/USER/NAME.
        self.where = self.where.replace("/api/spaces/", "/api/models/spaces/", 1)
        if self._is_lost(self.hub.losses):
            if self.command in ("POST", "PUT"):
                self.rfile.read(1)  # in the middle of what is sent
            self._hang_up()
            return
        self.body = self._read()
        try:
            status, content, headers = self._answer()
        except _Refused as refused:
            status, content, headers = refused.status, b"", refused.headers
        if self._is_lost(self.hub.lost_answers):
            self._hang_up()
            return
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _hang_up(self) -> None:
        # Not close, which a process that was forked meanwhile, e.g. one that reads images, would delay.
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _is_lost(self, losses: dict[tuple[str, str], int]) -> bool:
        for (method, part), times in losses.items():
            if times > 0 and method == self.command and part in self.where:
                losses[method, part] -= 1
                return True
        return False

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # What is asked, by path

    def _answer(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user = USERS.get(token)
        if token and self.user is None:
            raise _Refused(401, message="Invalid credentials in Authorization header")
        for method, pattern, act in _ROUTES:
            match = re.fullmatch(pattern, self.where)
            if match and self.command in method:
                return act(self, **match.groupdict())
        raise _Refused(404, message=f"the loopback Hub does not know {self.command} {self.where}")

    def _find(self, name: str, revision: str | None = None, write: bool = False):
        repository = self.hub.repositories.get(name)
        visible = repository is not None and (not repository.private or repository.owner == self.user)
        if not visible:
            raise _Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and repository.owner != self.user:
            raise _Refused(403, message="you need write access")
        commit = None if revision is None else repository.resolve(revision)
        if revision is not None and commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def _whoami(self):
        if self.user is None:
            raise _Refused(401, message="Invalid username or password.")
        role = "read" if self.user == "reader" else "write"
        access = {"accessToken": {"displayName": "test", "role": role}, "type": "access_token"}
        return 200, {"type": "user", "id": "1", "name": self.user, "orgs": [], "auth": access}, {}

    def _create(self):
        wish = json.loads(self.body)
        owner = wish.get("organization") or self.user
        if self.user is None:
            raise _Refused(401, message="Invalid username or password.")
        if owner != self.user or self.user == "reader":
            raise _Refused(403, message=f"You don't have the rights to create a model under the namespace {owner}")
        name = f"{'spaces/' if wish.get('type') == 'space' else ''}{owner}/{wish['name']}"
        if name in self.hub.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, {}
        self.hub.repositories[name] = Repository(owner, wish.get("visibility") == "private")
        return 200, {"url": f"{self.hub.url}/{name}", "name": name}, {}

    def _validate(self):
        text = json.loads(self.body)["content"]
        head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        data = yaml.safe_load(head[1]) if head else {}
        errors = [] if isinstance(data, dict) else [{"message": '"metadata" must be an object'}]
        if isinstance(data, dict) and not isinstance(data.get("tags", []), list):
            errors.append({"message": '"tags" must be an array'})
        return (400 if errors else 200), {"errors": errors, "warnings": []}, {}

    def _info(self, name: str, revision: str | None = None):
        repository, commit = self._find(name, revision or "main")
        siblings = [{"rfilename": path} for path in repository.commits[commit]["files"]]
        found = {"_id": name, "id": name, "modelId": name, "sha": commit, "private": repository.private, "tags": [],
                 "downloads": 0, "likes": 0, "siblings": siblings}  # fmt: skip
        return 200, found, {}

    def _entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "oid": _git_oid(content), "size": len(content), "path": path}
        if path.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def _may_write(self, name: str):
        self._find(name, write=True)
        return 200, {}, {}

    def _tree(self, name: str, revision: str, path: str | None = None):
        repository, commit = self._find(name, revision)
        files = repository.commits[commit]["files"]
        found = [self._entry(file, content) for file, content in files.items() if file.startswith(path or "")]
        if path and not found:
            raise _Refused(404, "EntryNotFound", f"{path} does not exist")
        return 200, found, {}

    def _paths(self, name: str, revision: str):
        repository, commit = self._find(name, revision)
        files, form = repository.commits[commit]["files"], self.body.decode()
        paths = json.loads(form)["paths"] if form.startswith("{") else parse_qs(form)["paths"]
        return 200, [self._entry(path, files[path]) for path in paths if path in files], {}

    def _refs(self, name: str):
        repository, _ = self._find(name)
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit}
            for branch, commit in repository.branches.items()
        ]
        return 200, {"branches": branches, "tags": [], "converts": []}, {}

    def _log(self, name: str, revision: str):
        repository, commit = self._find(name, revision)
        found = []
        while commit is not None:
            facts = repository.commits[commit]
            found.append({"id": commit, "title": facts["title"], "message": "", "authors": [{"user": repository.owner}],
                          "date": "2026-01-01T00:00:00.000Z"})  # fmt: skip
            commit = facts["parent"]
        return 200, found, {}

    def _branch(self, name: str, branch: str):
        repository, _ = self._find(name, write=True)
        if branch in repository.branches:
            raise _Refused(409, message="Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return 200, {}, {}

    def _preupload(self, name: str, revision: str):
        repository, commit = self._find(name, revision, write=True)
        files, answers = repository.commits[commit]["files"], []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            large = path.endswith((".safetensors", ".bin", ".pt", ".pth", ".png"))
            content = files.get(path)
            oid = None if content is None else hashlib.sha256(content).hexdigest() if large else _git_oid(content)
            answers.append(
                {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        return 200, {"files": answers}, {}

    def _batch(self, name: str):
        self._find(name, write=True)
        objects = []
        for wish in json.loads(self.body)["objects"]:
            link = f"{self.hub.url}/lfs/{wish['oid']}"
            actions = {"upload": {"href": link}, "verify": {"href": f"{link}/verify", "header": {}}}
            objects.append(wish | ({} if wish["oid"] in self.hub.objects else {"actions": actions}))
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _store(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, message="the content is not that of the oid")
        self.hub.objects[oid] = self.body
        return 200, b"", {}

    def _verify(self, oid: str):
        return (200 if oid in self.hub.objects else 404), {}, {}

    def _commit(self, name: str, revision: str):
        repository, head = self._find(name, revision, write=True)
        files, title = dict(repository.commits[head]["files"]), ""
        for line in self.body.decode().splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    raise _Refused(412, message="A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile" and files.pop(value["path"], None) is None:
                raise _Refused(404, "EntryNotFound", "A file with this name doesn't exist")
        branch = revision
        if "create_pr" in self.query:
            branch = f"refs/pr/{len(repository.pull_requests) + 1}"
            repository.branches[branch] = head
            repository.pull_requests.append(branch)
        commit = repository.add(branch, files, title)
        link = f"{self.hub.url}/{name}"
        answer = {"success": True, "commitUrl": f"{link}/commit/{commit}", "commitOid": commit}
        if branch != revision:
            answer["pullRequestUrl"] = f"{link}/discussions/{len(repository.pull_requests)}"
        return 200, answer, {}

    def _resolve(self, name: str, revision: str, path: str):
        repository, commit = self._find(name, revision)
        content = repository.commits[commit]["files"].get(path)
        if content is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        sha = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_git_oid(content)}"', "Accept-Ranges": "bytes"}
        if path.endswith(".safetensors"):
            headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return 206, content[first : last + 1], headers
        return 200, content, headers


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"(?P<name>(?:spaces/)?[^/]+/[^/]+)"
_API = rf"/api/models/{_NAME}"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
_ROUTES = (
    ("GET", "/api/whoami-v2", _Handler._whoami),
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate),
    ("POST", rf"{_API}/preupload/{_REVISION}", _Handler._preupload),
    ("POST", rf"{_API}/commit/{_REVISION}", _Handler._commit),
    ("POST", rf"{_API}/branch/(?P<branch>.+)", _Handler._branch),
    ("POST", rf"{_API}/paths-info/{_REVISION}", _Handler._paths),
    ("GET", rf"{_API}/tree/{_REVISION}(/(?P<path>.+))?", _Handler._tree),
    ("GET", rf"{_API}/auth-check/write", _Handler._may_write),
    ("GET", rf"{_API}/refs", _Handler._refs),
    ("GET", rf"{_API}/commits/{_REVISION}", _Handler._log),
    ("GET", rf"{_API}(/revision/{_REVISION})?", _Handler._info),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler._store),
    ("POST", r"/lfs/(?P<oid>\w+)/verify", _Handler._verify),
    ("GET HEAD", rf"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", _Handler._resolve),
)  # fmt: skip
