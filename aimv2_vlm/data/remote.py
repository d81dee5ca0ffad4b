"""Shards in an object store or on a web server, read through a bounded folder of local copies.

A shard is fetched whole (its samples are wanted within one window of the order anyway), becomes visible only when
complete, and is removed again, least recently used first, when the folder is over its limit. Its index stays. Processes
of one machine share the folder. URLs are opened by fsspec; only stores are (`PROTOCOLS`), nothing that runs a command or
hides one URL in another.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimv2_vlm.config import UserError

PROTOCOLS = ("s3", "gs", "gcs", "az", "abfs", "hf", "https", "http", "memory")
RETRY_WAITS = (0.5, 2.0, 8.0)  # seconds before a request that failed is made again
STALE_SECONDS = 3600  # an unfinished download untouched for so long belongs to a process that was killed
# What stores call the version of a file; which of them there are depends on the store.
_VERSION_KEYS = ("ETag", "etag", "generation", "md5Hash", "crc32c", "content_md5", "Content-MD5", "blob_id", "LastModified",
                 "last_modified", "Last-Modified", "updated", "mtime", "created")  # fmt: skip


def is_url(name: str) -> bool:
    """Whether a shard's name is a URL of any kind, `pipe:` included."""
    return re.match(r"\s*(?:\||[A-Za-z][A-Za-z0-9+.-]*:)", name) is not None


def check_url(url: str) -> str:
    """The URL of a store. Raises UserError for `pipe:`, chained URLs and protocols that are not in PROTOCOLS."""
    if re.match(r"\s*(?:\||pipe:)", url, re.IGNORECASE):
        raise UserError(f"shards '{url}': pipe: URLs run a command and are refused; give the path or URL of a tar file")
    if "::" in url:
        raise UserError(f"shards '{url}': chained URLs (::) are refused; give the URL of a tar file")
    protocol, separator, rest = url.partition("://")
    if protocol not in PROTOCOLS or not separator or not rest:
        raise UserError(f"shards '{url}': only local paths and {'://, '.join(PROTOCOLS)}:// can be read; copy the shards to one of these")
    return url


def _opened(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it)."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(check_url(url))
    except ImportError as error:
        raise UserError(f"{url}: {str(error).splitlines()[0]}; install it") from error


def _retried(url: str, what: str, act: Any) -> Any:
    """`act()`, again after a while when it fails. Raises UserError with URL and reason after the last time."""
    for wait in (*RETRY_WAITS, None):
        try:
            return act()
        except UserError:
            raise
        except Exception as error:  # every store has its own kinds of errors
            if wait is None:
                reason = str(error) or type(error).__name__
                raise UserError(f"{url}: {what} ({type(error).__name__}: {reason}; tried {len(RETRY_WAITS) + 1} times); "
                                "see that it is there and reachable, and start the same command again") from error  # fmt: skip
            time.sleep(wait)
    raise AssertionError("unreachable")


def find(pattern: str) -> list[str]:
    """URLs of a pattern with * ? [ ] in a store that can list its files. Raises UserError when there are none."""
    system, path = _opened(pattern)
    found = _retried(pattern, "cannot be listed", lambda: sorted(system.glob(path)))
    if not found:
        raise UserError(f"shards '{pattern}': no such file; check the URL")
    return [system.unstrip_protocol(name) for name in found]


# ----------------------------------------------------------------------------------------------------------------- cache


@dataclass(frozen=True)
class ShardCache:
    """A folder of local copies of at most `limit` bytes, shared by the processes of a machine."""

    folder: Path
    limit: int

    def shards(self, urls: Sequence[str]) -> list[RemoteShard]:
        """The shards behind `urls` as they are now. Raises UserError for one that is missing or above the limit."""
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(self._shard, urls))
        biggest = max(found, key=lambda shard: shard.size)
        if biggest.size > self.limit:
            raise UserError(f"{biggest.url}: {biggest.size} bytes do not fit the shard cache of {self.limit}; raise data.shard_cache_gb")
        return found

    def _shard(self, url: str) -> RemoteShard:
        system, path = _opened(url)
        info = _retried(url, "cannot be found", lambda: system.info(path))
        if not isinstance(info.get("size"), int):
            raise UserError(f"{url}: the server does not say how long the file is; download the shards first")
        facts = json.dumps([url, info["size"], *(str(info.get(key)) for key in _VERSION_KEYS)])
        digest = hashlib.sha256(facts.encode()).hexdigest()
        # The version stands where a local file's time stands: another version is another shard, with its own index.
        return RemoteShard(url, info["size"], int(digest[:12], 16), self.folder / digest[:24] / url.rpartition("/")[2], self)

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """One process at a time; there are few lock files, whatever is locked."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f".{name}.lock", "w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def make_room(self, keep: Path) -> None:
        """Remove the copies that were used longest ago until the rest fits, and what killed processes left."""
        with self.locked("room"):
            copies = []
            for path in self.folder.glob("*/*.tar*"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    if path.name.endswith(".partial"):
                        if time.time() - status.st_mtime > STALE_SECONDS:
                            path.unlink()
                    elif not path.name.endswith(".json") and path != keep:
                        copies.append((status.st_atime_ns, status.st_size, path))
            total = sum(size for _, size, _ in copies) + keep.stat().st_size
            for _, size, path in sorted(copies):
                if total <= self.limit:
                    break
                path.unlink(missing_ok=True)  # a process that has it open goes on reading
                total -= size


@dataclass(frozen=True)
class RemoteShard:
    """One remote tar: its size in bytes, its version (in place of a file's mtime_ns) and where its copy stands."""

    url: str
    size: int
    mtime_ns: int
    path: Path
    cache: ShardCache

    def open(self) -> io.FileIO:
        """The copy, open for reading; fetched first if it is not there. Raises UserError when it cannot be fetched."""
        for _ in range(10):
            with contextlib.suppress(FileNotFoundError):
                file = open(self.path, "rb", buffering=0)
                with contextlib.suppress(OSError):  # removed just now: open it is all the same
                    os.utime(self.path, ns=(time.time_ns(), self.mtime_ns))
                return file
            self.fetch()
        raise UserError(f"{self.url}: its copy in {self.cache.folder} is removed as fast as it is made; raise data.shard_cache_gb")

    def fetch(self) -> None:
        """Make the copy unless it is there."""
        with self.cache.locked(f"fetch{self.mtime_ns % 64}"):
            if not self.path.exists():
                _retried(self.url, "cannot be fetched", self._download)
                self.cache.make_room(self.path)

    def _download(self) -> None:
        system, path = _opened(self.url)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.name}.", suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                with system.open(path, "rb") as source:
                    shutil.copyfileobj(source, file, 2**20)
                if file.tell() != self.size:
                    raise OSError(f"{file.tell()} of {self.size} bytes came")
                file.flush()
                os.fsync(file.fileno())
            os.utime(temporary, ns=(time.time_ns(), self.mtime_ns))
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
