"""What the test Hub keeps: repositories with commits, branches, tags and pull request refs, all in memory."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from typing import Any

LFS_SUFFIXES = ('.safetensors', '.bin', '.pt', '.pth', '.png', '.parquet', '.onnx', '.wasm')
LFS_SIZE = 10 * 2**20


class HubReply(Exception):
    """An answer other than 200, raised from anywhere inside a handler."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.body = body if body is not None else {'error': message}


@dataclass(frozen=True)
class Blob:
    """One file's content; `lfs` files are named by sha256, the others by git's sha1."""

    data: bytes
    lfs: bool

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @functools.cached_property
    def git_sha1(self) -> str:
        return hashlib.sha1(b'blob %d\0' % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_sha1

    def describe(self) -> dict[str, Any]:
        lfs = {'lfs': {'oid': self.sha256, 'sha256': self.sha256, 'size': len(self.data), 'pointerSize': 135}}
        return {'size': len(self.data), 'oid': self.git_sha1, 'blobId': self.git_sha1, **(lfs if self.lfs else {})}


@dataclass
class Commit:
    oid: str
    title: str
    user: str
    files: dict[str, Blob]


@dataclass
class Repo:
    repo_id: str
    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)  # full ref name -> commit oid

    def commit(self, ref: str, files: dict[str, Blob], title: str, user: str) -> Commit:
        seed = f'{self.repo_id}:{len(self.commits)}:{title}'
        made = Commit(hashlib.sha1(seed.encode()).hexdigest(), title, user, files)
        self.commits.append(made)
        self.refs[ref] = made.oid
        return made

    def ref_of(self, revision: str) -> str | None:
        candidates = (revision, f'refs/heads/{revision}', f'refs/tags/{revision}')
        return next((name for name in candidates if name in self.refs), None)

    def at(self, revision: str) -> Commit:
        ref = self.ref_of(revision)
        oid = self.refs[ref] if ref else revision
        for made in self.commits:
            if made.oid == oid:
                return made
        raise HubReply(404, f'Invalid rev id: {revision}', 'RevisionNotFound')


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE)
