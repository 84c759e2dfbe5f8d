"""A small Hugging Face Hub on this machine, with what ``huggingface_hub`` asks of one."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
LARGE = (".safetensors", ".bin", ".qmoe")  # kept by their hash in another place, like the Hub's

_INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_STORED = re.compile(r"/store/(\w+)")


class Hub:
    """A server while it is used as a context manager.

    Attributes:
        url: what ``HF_ENDPOINT`` has to be.
        fetched: the name of every file that was downloaded, and from which byte on.
        private: repositories that only ``TOKEN`` shows.
        gated: repositories whose files nobody may have.
        cut: after how many bytes of a file the connection drops, once.
        broken: files that cannot be downloaded.
        silent: whether it never answers.
    """

    def __init__(self) -> None:
        self.fetched: list[tuple[str, int]] = []
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.cut: dict[str, int] = {}
        self.broken: set[str] = set()
        self.silent = False
        self.commits: dict[tuple[str, str], str] = {}  # by repository and revision
        self.files: dict[str, dict[str, bytes]] = {}  # by commit
        self.store: dict[str, tuple[str, bytes]] = {}  # name and contents, by hash
        self.end = threading.Event()
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self})
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo: str, files: Path | Mapping[str, bytes], revision: str = "main") -> str:
        """Commit the files of a folder, or files by their paths.

        Returns:
            The commit's hash.
        """
        if isinstance(files, Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        hashes = {name: digest(data) for name, data in files.items()}
        commit = digest(json.dumps([repo, hashes]).encode())[:40]
        self.commits |= {(repo, revision): commit, (repo, commit): commit}
        self.files[commit] = dict(files)
        self.store |= {hashes[name]: (name, data) for name, data in files.items()}
        return commit

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        self._server.shutdown()
        self._server.server_close()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are written one after the other
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path  # a slash in a revision is quoted
        if self.hub.silent:
            self.hub.end.wait()
            self.close_connection = True
        elif match := _INFO.fullmatch(path):
            self._info(match[1], unquote(match[2] or "main"))
        elif match := _TREE.fullmatch(path):
            self._tree(match[1], unquote(match[2]), unquote(match[3] or ""))
        elif match := _FILE.fullmatch(path):
            self._file(*map(unquote, match.groups()))
        elif match := _STORED.fullmatch(path):
            assert "Authorization" not in self.headers, "a token must not leave the Hub"
            self._contents(match[1], {})
        else:
            self._answer(404, b"")

    do_HEAD = do_GET

    def _info(self, repo: str, revision: str) -> None:
        if commit := self._commit(repo, revision):
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": digest(data)[:40]}
                for name, data in self.hub.files[commit].items()
            ]
            info = {"id": repo, "sha": commit, "siblings": siblings}
            self._answer(200, json.dumps(info).encode())

    def _tree(self, repo: str, revision: str, folder: str) -> None:
        if commit := self._commit(repo, revision):
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": digest(data)[:40]}
                for name, data in self.hub.files[commit].items()
                if name.rpartition("/")[0] == folder
            ]
            self._answer(200, json.dumps(files).encode())

    def _file(self, repo: str, revision: str, name: str) -> None:
        commit = self._commit(repo, revision)
        if not commit:
            return
        if repo in self.hub.gated:
            self._refuse(403, "GatedRepo")
            return
        sha256 = digest(self.hub.files[commit][name])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{sha256}"'}
        if name.endswith(LARGE):
            headers["X-Linked-ETag"] = headers.pop("ETag")
            headers["X-Linked-Size"] = str(len(self.hub.files[commit][name]))
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
            self._answer(302, b"", headers | {"Location": f"{elsewhere}/store/{sha256}"})
        else:
            self._contents(sha256, headers)

    def _contents(self, sha256: str, headers: Mapping[str, str]) -> None:
        name, data = self.hub.store[sha256]
        if self.command == "HEAD":
            self._answer(200, data, headers)
            return
        start = 0
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if ranged:
            start = int(ranged[1])
            data = data[: int(ranged[2]) + 1] if ranged[2] else data
            headers = {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self.hub.fetched.append((name, start))
        if name in self.hub.broken:
            self._refuse(500, "")
        else:
            cut = self.hub.cut.pop(name, None)
            self._answer(206 if ranged else 200, data[start:], headers, cut)

    def _commit(self, repo: str, revision: str) -> str | None:
        """The commit, or None after an error was sent."""
        token = self.headers.get("Authorization")
        known = any(repo == each for each, _ in self.hub.commits)
        if token not in (None, f"Bearer {TOKEN}"):
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif not known or (repo in self.hub.private and not token):
            self._refuse(404 if token else 401, "RepoNotFound")
        elif (repo, revision) not in self.hub.commits:
            self._refuse(404, "RevisionNotFound")
        else:
            return self.hub.commits[repo, revision]
        return None

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _answer(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        self.close_connection = cut is not None
