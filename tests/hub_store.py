"""The content of the loopback Hub: repositories with their commits, and the responses of the Hub's routes.

This module maps a request to an `Answer` and knows nothing of sockets, ranges or faults (tests/hub.py). Responses have
the real Hub's format as huggingface_hub reads it (status codes, X-Error-Code headers, pagination by Link).
"""

import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

TOKEN = "hf_loopback_valid"  # accepted everywhere; any other token is refused with 401
SECRET = "loopback-signature"  # part of every signed address; must never appear in a message


def parquet_bytes(texts: Sequence[str | None], row_group_size: int | None = None, **columns: Sequence[Any]) -> bytes:
    """A parquet file with a column `text`, further columns of the same length, and page checksums."""
    sink = io.BytesIO()
    table = pa.table({"text": pa.array(texts, pa.string()), **columns})
    pq.write_table(table, sink, row_group_size=row_group_size, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def jsonl_bytes(texts: Sequence[str | None], compress: bool = False, **columns: Sequence[Any]) -> bytes:
    """JSON lines, optionally gzipped, with `text` and further columns."""
    names = ["text", *columns]
    rows = zip(texts, *columns.values(), strict=True)
    data = "".join(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in rows).encode()
    return gzip.compress(data, mtime=0) if compress else data


def csv_bytes(texts: Sequence[str], **columns: Sequence[Any]) -> bytes:
    """CSV with a header, with `text` and further columns."""
    sink = io.StringIO(newline="")
    writer = csv.writer(sink)
    writer.writerow(["text", *columns])
    writer.writerows(zip(texts, *columns.values(), strict=True))
    return sink.getvalue().encode()


def text_bytes(lines: Iterable[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


@dataclasses.dataclass
class Request:
    """One line of the log. `sent` counts the body bytes written to the socket."""

    method: str
    path: str
    status: int = 0
    sent: int = 0
    range: str | None = None
    token: str | None = None


@dataclasses.dataclass
class Repo:
    """Commits (sha → path → bytes) and branches (name → sha) of one repository."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    access: str = (
        "public"  # or "gated" (metadata is public, files are not), "refused" (gated, for any token), "private"
    )


@dataclasses.dataclass
class Answer:
    """The response of a route."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


class AnswerError(Exception):
    """A response raised from within a route."""

    def __init__(self, answer: Answer):
        super().__init__(answer.status)
        self.answer = answer


@functools.lru_cache(maxsize=1024)
def _etag(data: bytes) -> str:
    """SHA-256, computed once per file: 40 MB take 20 ms."""
    return hashlib.sha256(data).hexdigest()


def _json(value: Any, status: int = 200, **headers: str) -> Answer:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **named})


def _error(status: int, code: str, message: str) -> Answer:
    return _json({"error": message}, status, X_Error_Code=code, X_Error_Message=message)


class Store:
    """Repositories by (type, name), and the routes that serve them."""

    endpoint: str

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.signature = 0
        self.redirect = (
            False  # answer `resolve` with a redirect to a signed address, as the real Hub does for large files
        )
        self.page_size = 1000  # entries per page of `tree`

    # Repositories

    def commit(
        self,
        name: str,
        files: Mapping[str, bytes],
        *,
        repo_type: str = "dataset",
        branch: str = "main",
        delete: Iterable[str] = (),
    ) -> str:
        """Adds a commit with `files` to the branch (created if new), moves the branch, returns the commit's sha."""
        with self.lock:
            repo = self.repos.setdefault((repo_type, name), Repo())
            parent = repo.branches.get(branch, "")
            tree = {**repo.commits.get(parent, {}), **files}
            for path in delete:
                del tree[path]
            digest = hashlib.sha1(f"{repo_type} {name} {parent} {len(repo.commits)}".encode())
            for path in sorted(tree):
                digest.update(path.encode() + hashlib.sha1(tree[path]).digest())
            sha = digest.hexdigest()
            repo.commits[sha] = tree
            repo.branches[branch] = sha
            return sha

    def forget(self, name: str, sha: str, *, repo_type: str = "dataset") -> None:
        """Removes a commit, as squashing a repository's history does."""
        with self.lock:
            del self.repos[repo_type, name].commits[sha]

    def access(self, name: str, access: str, *, repo_type: str = "dataset") -> None:
        """Sets `access`: "public", "gated" (files need a token), "refused" (gated for any token) or "private"."""
        self.repos[repo_type, name].access = access

    def expire_signatures(self) -> None:
        """Makes signed addresses issued so far answer 403."""
        self.signature += 1

    # Routes

    def answer(self, request: Request, query: dict[str, list[str]], body: bytes) -> Answer:
        parts = [part for part in request.path.split("/") if part]
        if parts[:1] == ["cdn"]:
            return self._signed(parts[1], query)
        if parts[:2] == ["api", "whoami-v2"]:
            return (
                _json({"name": "loopback", "type": "user"}) if request.token == TOKEN else _error(401, "", "no token")
            )
        if parts[:1] == ["api"] and len(parts) == 2 and parts[1] in ("datasets", "models"):
            return self._search(parts[1][:-1], query)
        if parts[:1] == ["api"] and len(parts) >= 4 and parts[1] in ("datasets", "models"):
            return self._api(parts[1][:-1], "/".join(parts[2:4]), parts[4:], query, body, request)
        repo_type = "dataset" if parts[:1] == ["datasets"] else "model"
        parts = parts[1:] if repo_type == "dataset" else parts
        if len(parts) > 4 and parts[2] in ("resolve", "raw"):
            return self._resolve(repo_type, "/".join(parts[:2]), unquote(parts[3]), "/".join(parts[4:]), request)
        return _error(404, "", f"no such page: {request.path}")

    def _repo(self, repo_type: str, name: str, token: str | None) -> Repo:
        if token not in (None, "", TOKEN):
            raise AnswerError(_error(401, "", "Invalid credentials in Authorization header"))
        repo = self.repos.get((repo_type, name))
        if repo is None or (repo.access == "private" and token != TOKEN):
            # The real Hub answers 401 to unauthorized clients, so that private names do not leak.
            raise AnswerError(_error(404 if token else 401, "RepoNotFound", "Repository not found"))
        return repo

    def _tree(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = repo.branches.get(unquote(revision), unquote(revision))
        if sha not in repo.commits:
            raise AnswerError(_error(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}"))
        return sha, repo.commits[sha]

    def _search(self, repo_type: str, query: dict[str, list[str]]) -> Answer:
        wanted = query.get("search", [""])[0].lower()
        limit = int(query.get("limit", ["1000"])[0])
        names = [name for kind, name in self.repos if kind == repo_type and wanted in name.lower()]
        return _json([{"_id": name, "id": name, "tags": [], "private": False} for name in names[:limit]])

    def _api(self, repo_type: str, name: str, rest: list[str], query: dict, body: bytes, request: Request) -> Answer:
        repo = self._repo(repo_type, name, request.token)
        page = rest[0] if rest else "revision"
        if page == "refs":
            branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": s} for b, s in repo.branches.items()]
            return _json({"branches": branches, "converts": [], "tags": []})
        sha, tree = self._tree(repo, rest[1] if len(rest) > 1 else "main")
        if page == "revision":
            gated = "auto" if repo.access in ("gated", "refused") else False
            about = {"_id": name, "id": name, "sha": sha, "private": repo.access == "private", "gated": gated}
            files = [{"rfilename": path, "size": len(tree[path])} for path in sorted(tree)]
            return _json({**about, "disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": files})
        if page == "tree":
            return self._list(tree, unquote("/".join(rest[2:])), query, request.path)
        if page == "paths-info":
            form = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            entries = {entry["path"]: entry for entry in _entries(tree, "", recursive=True)}
            return _json([entries[path] for path in form["paths"] if path in entries])
        return _error(404, "", f"no such page: {page}")

    def _list(self, tree: dict[str, bytes], folder: str, query: dict[str, list[str]], path: str) -> Answer:
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = _entries(tree, folder, recursive)
        if not entries and folder:
            raise AnswerError(_error(404, "EntryNotFound", f"{folder} does not exist"))
        start = int(query.get("cursor", ["0"])[0])
        answer = _json(entries[start : start + self.page_size])
        if start + self.page_size < len(entries):
            cursor = f"recursive={recursive}&cursor={start + self.page_size}"
            answer.headers["Link"] = f'<{self.endpoint}{quote(path)}?{cursor}>; rel="next"'
        return answer

    def _resolve(self, repo_type: str, name: str, revision: str, path: str, request: Request) -> Answer:
        repo = self._repo(repo_type, name, request.token)
        sha, tree = self._tree(repo, revision)
        if repo.access == "refused" or (repo.access == "gated" and request.token != TOKEN):
            status = 401 if not request.token else 403
            raise AnswerError(_error(status, "GatedRepo", f"Access to dataset {name} is restricted."))
        if path not in tree:
            answer = _error(404, "EntryNotFound", "Entry not found")
            answer.headers["X-Repo-Commit"] = sha
            raise AnswerError(answer)
        etag = _etag(tree[path])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if self.redirect:
            headers |= {"X-Linked-Size": str(len(tree[path])), "X-Linked-ETag": f'"{etag}"'}
            # A different origin from 127.0.0.1, like the real store: the client must not send its token there.
            store = self.endpoint.replace("127.0.0.1", "localhost")
            headers["Location"] = f"{store}/cdn/{etag}?X-Signature={SECRET}-{self.signature}&Expires=3600"
            return Answer(302, b"", headers)
        return Answer(200, tree[path], headers)

    def _signed(self, etag: str, query: dict[str, list[str]]) -> Answer:
        if query.get("X-Signature") != [f"{SECRET}-{self.signature}"]:
            return Answer(403, b"<Error><Code>AccessDenied</Code></Error>", {"Content-Type": "application/xml"})
        for repo in self.repos.values():
            for tree in repo.commits.values():
                for data in tree.values():
                    if _etag(data) == etag:
                        return Answer(200, data, {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"})
        return Answer(404)


def _entries(tree: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """A folder's listing in the format of the `tree` API."""
    prefix = folder + "/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(tree):
        if not path.startswith(prefix):
            continue
        inner = path[len(prefix) :].split("/")
        for depth in range(1, len(inner) if recursive else min(len(inner), 2)):
            directory = prefix + "/".join(inner[:depth])
            found.setdefault(directory, {"type": "directory", "oid": "0" * 40, "size": 0, "path": directory})
        if recursive or len(inner) == 1:
            oid = hashlib.sha1(tree[path]).hexdigest()
            found[path] = {"type": "file", "oid": oid, "size": len(tree[path]), "path": path}
    return list(found.values())
