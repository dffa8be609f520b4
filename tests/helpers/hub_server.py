"""A Hugging Face Hub on this machine: as much of its HTTP API as huggingface_hub asks for models.

    with HubServer(tokens={"hf_ann": "ann"}) as hub:
        ...  # run huggingface_hub with HF_ENDPOINT=hub.url and HF_HUB_DISABLE_XET=1
        hub.repos["ann/model"].files("main")["config.json"]

Repositories are kept in memory, every commit with all of its files. huggingface_hub reads its endpoint when it is
imported; `FreshProcesses` therefore runs functions in processes of their own, which were started with it.
"""

import base64
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import threading
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


PRELOAD = ["peft_bts", "pytest", "transformers.trainer", "transformers.models.llama.modeling_llama"]
TIMEOUT = 200  # seconds
LARGE = (".safetensors", ".bin")  # files that the Hub wants by LFS


@dataclass
class Repo:
    """A model repository: commits by hash, each a dict of path -> bytes, and branches by name."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Make `files` the newest state of a branch; return the commit's hash."""
        content = [(path, hashlib.sha1(data).hexdigest()) for path, data in sorted(files.items())]
        sha = hashlib.sha1(repr((len(self.commits), content)).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def files(self, revision: str) -> dict[str, bytes]:
        """All files at a branch or commit; `KeyError` if there is none."""
        return self.commits[self.sha(revision)]

    def sha(self, revision: str) -> str:
        return revision if revision in self.commits else self.branches[revision]


class HubServer:
    """Serves `repos` at `url` while it is entered.

    Args:
        tokens: Access tokens and their owners. Only the owner of a namespace may write to it and see its private
            repositories.

    Attributes:
        requests: What was asked for so far, as (method, path).
    """

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens, self.repos, self.large, self.requests = tokens, {}, {}, []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def upload(self, repo_id: str, folder: str | os.PathLike, branch: str = "main", **options) -> str:
        """Put a folder into a repository, as a new commit of its own; return the hash."""
        files = {
            str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
        }
        return self.repos.setdefault(repo_id, Repo(**options)).commit(branch, files)

    def downloaded(self) -> set[str]:
        """The files whose contents were asked for, as `owner/name/path`."""
        found = (re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", path) for method, path in self.requests if method == "GET")
        return {f"{match[1]}/{match[2]}" for match in found if match}


class _Error(Exception):
    def __init__(self, status: int, code: str, more: dict[str, str] = {}) -> None:  # noqa: B006
        super().__init__(code)
        self.status, self.code, self.more = status, code, more


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, self.path))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.user = self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        try:
            for method, pattern, answer in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, self.path)):
                    return self.reply(answer(self, **match.groupdict()))
            raise _Error(404, "EntryNotFound")
        except _Error as error:
            self.reply({"error": error.code, **error.more}, error.status, {"X-Error-Code": error.code})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def reply(self, content, status: int = 200, headers: dict[str, str] = {}) -> None:  # noqa: B006
        if isinstance(content, tuple):
            content, headers = content
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        """Be silent; `HubServer.requests` has it all."""

    def repo(self, repo: str, write: bool = False) -> Repo:
        found, owner = self.hub.repos.get(repo), self.user == repo.split("/")[0]
        if found is None or (found.private and not owner):
            raise _Error(401 if self.user is None else 404, "RepoNotFound")  # the Hub does not tell one from the other
        if write and not owner:
            raise _Error(403, "Forbidden")
        return found

    def at(self, repo: str, revision: str) -> tuple[Repo, str]:
        found = self.repo(repo)
        try:
            return found, found.sha(revision)
        except KeyError:
            raise _Error(404, "RevisionNotFound") from None

    # ------------------------------------------------------------------------------------------------------ reading

    def whoami(self):
        if self.user is None:
            raise _Error(401, "Unauthorized")
        return {"type": "user", "name": self.user, "orgs": []}

    def info(self, repo, revision=None):
        found, sha = self.at(repo, revision or "main")
        siblings = [{"rfilename": path} for path in found.commits[sha]]
        return {"_id": repo, "id": repo, "modelId": repo, "sha": sha, "private": found.private, "siblings": siblings}

    def tree(self, repo, revision, path):
        found, sha = self.at(repo, revision)
        path = path or ""
        inside = {name: data for name, data in found.commits[sha].items() if name.startswith(path and f"{path}/")}
        if not inside:
            raise _Error(404, "EntryNotFound")
        return [{"type": "file", "path": name, "size": len(d), "oid": _blob(d)} for name, d in inside.items()]

    def refs(self, repo):
        branches = self.repo(repo).branches.items()
        refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        return {"branches": refs, "tags": [], "converts": []}

    def resolve(self, repo, revision, path):
        found, sha = self.at(repo, revision)
        if path not in found.commits[sha]:
            raise _Error(404, "EntryNotFound")
        data = found.commits[sha][path]
        return data, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}

    # ------------------------------------------------------------------------------------------------------ writing

    def create(self):
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.user
        if self.user is None or owner != self.user:
            raise _Error(401 if self.user is None else 403, "Forbidden")
        repo = f"{owner}/{wanted['name']}"
        if repo in self.hub.repos:
            raise _Error(409, "RepoExists", {"url": f"{self.hub.url}/{repo}"})
        self.hub.repos[repo] = Repo(private=wanted.get("visibility") == "private")
        self.hub.repos[repo].commit("main", {".gitattributes": b""})
        return {"url": f"{self.hub.url}/{repo}", "id": repo}

    def branch(self, repo, branch):
        found = self.repo(repo, write=True)
        if branch in found.branches:
            raise _Error(409, "BranchExists")
        found.branches[branch] = found.branches["main"]
        return {}

    def preupload(self, repo, revision):
        self.repo(repo, write=True)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        return {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}

    def lfs_batch(self, repo):
        self.repo(repo, write=True)
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.large:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.large[oid] = self.body
        return {}

    def commit(self, repo, revision):
        found = self.repo(repo, write=True)
        files = dict(self.at(repo, revision)[0].files(revision))
        for line in map(json.loads, self.body.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        sha = found.commit(revision, files)
        return {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha}


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_REPO, _REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/validate-yaml", lambda handler: {"errors": [], "warnings": []}),
    ("POST", r"/api/repos/create", _Handler.create),
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/revision/{_REVISION}", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}(/(?P<path>.+))?", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}/refs", _Handler.refs),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.branch),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    *((method, rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve) for method in ("GET", "HEAD")),
]  # fmt: skip


class FreshProcesses:
    """Runs functions in new processes that know the server as the Hub.

    They are forked from one that has imported everything with the right environment and has done nothing else, so
    that a process costs no import. Python keeps one such server of forks: make one of these per test session.
    """

    def __init__(self, server: HubServer, home: Path) -> None:
        self.home = home
        environment = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        }
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            self.context = multiprocessing.get_context("forkserver")
            self.context.set_forkserver_preload(PRELOAD)
            process = self.context.Process(target=int)  # the first starts the server of forks, with this environment
            process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        process.join()

    def __call__(self, function, *args, token=None, empty_cache=False, offline=False):
        """Return `function(*args)`, or raise `ChildError` with the traceback."""
        if empty_cache:
            shutil.rmtree(self.home, ignore_errors=True)
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_run, args=(sender, token, offline, function, args))
        process.start()
        sender.close()
        if not receiver.poll(TIMEOUT):
            process.kill()
            raise ChildError(f"{function.__name__} has not answered within {TIMEOUT} seconds")
        result, error = pickle.loads(receiver.recv_bytes())
        process.join()
        if error is not None:
            raise ChildError(error)
        return result


class ChildError(Exception):
    """An exception in a fresh process; the text is its traceback."""


def _run(sender, token, offline, function, args) -> None:
    import huggingface_hub.constants
    import torch

    torch.set_num_threads(1)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    os.environ["HF_HUB_OFFLINE"] = str(int(offline))  # PEFT looks there
    try:
        answer = function(*args), None
    except Exception:
        answer = None, traceback.format_exc()
    sender.send_bytes(pickle.dumps(answer))  # plain bytes: torch would share tensors' memory with a process that ends
