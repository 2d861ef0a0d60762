"""An LRU cache of whole files on the local disk, under a strict limit.

Several processes may share a directory, and any may be killed at any point. The only state is the files themselves and
the kernel's locks on them, which end with their holder.

- `HASH`: a file. Readers pin it with a shared lock. Its modification time is its last use.
- `HASH.part`: a file being fetched. Its writer holds an exclusive lock, and it has its full size from the start, so the
  space is reserved before a byte is written.
- Any other `HASH.*`, and a `.part` without a lock: leftovers, removed by the next process that makes room.
- `lock`: held while one of these is made, found or removed, never while bytes are moved.

Locks are `flock`s, which work on one machine and on network file systems that support them (NFS 4, Lustre with flock).
"""

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from typing import IO, Protocol

from jaxtrain import cli
from jaxtrain.data.io import retry
from jaxtrain.errors import TransientError, UserError

_POLL = 0.05  # seconds between checks while waiting for room or for the fetch of another process
_WHOLE = re.compile(r"[0-9a-f]{40}")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Sink(Protocol):
    """Takes a file's bytes, in order."""

    def write(self, data: bytes, /) -> object: ...


class DiskCache:
    """An LRU cache of whole files. Safe for threads and processes. Creates no file before the first `open`.

    Attributes:
        directory: Where the files are.
        limit: The most bytes of all files together (`max_gb` x 1e9).
    """

    def __init__(self, directory: str | os.PathLike[str], max_gb: float):
        self.directory = os.path.abspath(directory)
        self.limit = round(max_gb * 1e9)

    def used_bytes(self) -> int:
        """Bytes of all files, including the space reserved for files being fetched."""
        return sum(size for _, size, _ in self._entries())

    def check(self, what: str, size: int) -> None:
        """Raises UserError if a file of `size` bytes can never fit."""
        if size > self.limit:
            raise UserError(
                f"{retry.redact(what)} has {cli.size(size)}, more than the disk cache in {self.directory} may hold "
                f"({cli.size(self.limit)}). Set data.max_disk_gb to {math.ceil(size / 1e5) / 1e4:g} or more, ideally "
                "to that for each file that is read at the same time, or split the file."
            )

    @contextlib.contextmanager
    def open(
        self, key: str, size: int, fetch: Callable[[Sink], object], what: str | None = None
    ) -> Iterator[IO[bytes]]:
        """Opens a file for reading, pinned while the context lasts; fetches it first if it is not cached.

        Waits while another thread or process fetches the same file, and while every file that could make room is
        pinned. So pin a file no longer than for a read, and open nothing else meanwhile.

        Args:
            key: Names the file and its version.
            size: Of the file, in bytes.
            fetch: Writes all bytes. Called by one thread of one process, after the space is reserved.
            what: Names the file in messages; by default the key.

        Raises:
            UserError: The file is larger than the limit, or the disk is full.
            Exception: Whatever `fetch` raises.
        """
        what = key if what is None else what
        self.check(what, size)
        name = _name(key)
        while True:
            with self._locked():
                pinned = self._pin(name, size)
                part = self._reserve(name, size) if pinned is None else None
            if part is not None:
                self._fill(part, size, fetch, what)
                pinned = self._publish(part, name, size)
            if pinned is not None:
                with pinned:
                    yield pinned
                return
            time.sleep(_POLL)

    @contextlib.contextmanager
    def find(self, key: str, size: int) -> Iterator[IO[bytes] | None]:
        """Like `open`, without fetching or waiting: None if the file is not cached."""
        with self._locked():
            pinned = self._pin(_name(key), size)
        with pinned or contextlib.nullcontext():
            yield pinned

    def drop(self, key: str) -> None:
        """Removes a file whose bytes are wrong. Readers keep it open; its space counts until they close it."""
        with self._locked():
            self._discard(os.path.join(self.directory, _name(key)))

    def trim(self) -> None:
        """Removes leftovers of killed processes, and what exceeds the limit if it was higher before."""
        with self._locked():
            self._make_room(0)

    # Everything below except `_fill` and `_publish` runs with the lock held.

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        os.makedirs(self.directory, exist_ok=True)
        with open(os.path.join(self.directory, "lock"), "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise UserError(
                    f"{self.directory}: its file system has no locks ({error}), which the disk cache needs. Use a "
                    "--workdir on another one, or set data.max_disk_gb=0."
                ) from error
            yield

    def _entries(self) -> list[tuple[str, int, int]]:
        """(path, bytes, last use) of every file but the lock."""
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.directory) as entries:
            for entry in entries:
                # `used_bytes` holds no lock, so another process may remove one meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    if entry.name != "lock" and entry.is_file(follow_symlinks=False):
                        stat = entry.stat(follow_symlinks=False)
                        found.append((entry.path, stat.st_size, stat.st_mtime_ns))
        return found

    def _pin(self, name: str, size: int) -> IO[bytes] | None:
        path = os.path.join(self.directory, name)
        file = _hold(path, fcntl.LOCK_SH)
        if file is None:
            return None
        if os.fstat(file.fileno()).st_size != size:
            file.close()
            self._discard(path)
            return None
        now = time.time_ns()
        os.utime(path, ns=(now, now))
        return file

    def _reserve(self, name: str, size: int) -> IO[bytes] | None:
        """A new, locked file of `size` bytes; None if another process is writing it or there is no room now."""
        if not self._make_room(size):
            return None
        path = os.path.join(self.directory, f"{name}.part")
        if os.path.exists(path):
            return None  # `_make_room` kept it, so it has a writer
        file = open(path, "x+b", buffering=0)  # noqa: SIM115 - closed by `_publish`
        fcntl.flock(file, fcntl.LOCK_EX)
        os.truncate(file.fileno(), size)
        return file

    def _make_room(self, size: int) -> bool:
        """Removes leftovers, then the least recently used files until `size` more bytes fit; none if they cannot."""
        used, whole = 0, []
        for path, held, last_use in self._entries():
            if _WHOLE.fullmatch(os.path.basename(path)):
                whole.append((last_use, path, held))
            elif os.path.basename(path)[40:41] == "." and (leftover := _hold(path, fcntl.LOCK_EX)) is not None:
                os.unlink(path)
                leftover.close()
                continue
            used += held
        with contextlib.ExitStack() as held_back:
            victims = []
            for _, path, held in sorted(whole):
                if used + size <= self.limit:
                    break
                if (victim := _hold(path, fcntl.LOCK_EX)) is not None:
                    held_back.enter_context(victim)
                    victims.append(path)
                    used -= held
            if used + size > self.limit and size:
                return False
            for path in victims:
                os.unlink(path)
        return True

    def _discard(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            file = _hold(path, fcntl.LOCK_EX)
            if file is None:
                os.rename(path, f"{path}.{secrets.token_hex(8)}")
                return
            os.unlink(path)
            file.close()

    def _fill(self, part: IO[bytes], size: int, fetch: Callable[[Sink], object], what: str) -> None:
        """Fetches into the reserved file; removes it on failure."""
        sink = _Bounded(part, size, what, self.directory)
        try:
            fetch(sink)
            if sink.written != size:
                raise TransientError(f"{what}: {sink.written} of {size} bytes arrived")
        except BaseException:
            os.unlink(part.name)
            part.close()
            raise

    def _publish(self, part: IO[bytes], name: str, size: int) -> IO[bytes]:
        with self._locked():
            os.rename(part.name, os.path.join(self.directory, name))
            part.close()
            pinned = self._pin(name, size)
        assert pinned is not None
        return pinned


class _Bounded:
    """A file that takes at most `size` bytes."""

    def __init__(self, file: IO[bytes], size: int, what: str, directory: str):
        self.file, self.size, self.what, self.directory = file, size, what, directory
        self.written = 0

    def write(self, data: bytes) -> int:
        if self.written + len(data) > self.size:
            raise TransientError(f"{self.what}: more than its {self.size} bytes arrived")
        view = memoryview(data)
        try:
            while view:
                view = view[self.file.write(view) :]
        except OSError as error:
            if error.errno in _FULL:
                raise UserError(
                    f"the disk of {self.directory} is full ({error.strerror}), though the disk cache is below its "
                    f"limit: free {cli.size(self.size - self.written)} there, set data.max_disk_gb to less, or "
                    "use a --workdir on a larger disk."
                ) from None
            raise
        self.written += len(data)
        return len(data)


def _name(key: str) -> str:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()


def _hold(path: str, kind: int) -> IO[bytes] | None:
    """The file, locked until it is closed; None if it does not exist or another lock conflicts."""
    try:
        file = open(path, "r+b", buffering=0)  # noqa: SIM115 - the caller closes it
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file
