"""Files read through the disk cache: a read brings the whole file there first, and then reads are local.

A file may be evicted between two reads, as more of them may be in use than the limit has room for (a lane each, say).
If each read then brought its file back, every 4 MB would cost a whole file, for ever. So a file that went while it was
read is read past the cache, in ranges, until those have cost as much as the file; then it is fetched again. Whatever
the order of reads, that is at most twice what the best decision would have cost.
"""

import threading

from jaxtrain.data.io import retry
from jaxtrain.data.io.byte_ranges import Bytes
from jaxtrain.data.io.disk_cache import DiskCache, Sink
from jaxtrain.errors import TransientError
from jaxtrain.interfaces import Json

_PIECE = 1 << 23  # bytes of a request: 8 MB, at 200 ms a request 40 MB/s for each file


class CachedBytes:
    """The bytes of another `Bytes`, through a DiskCache. Implements ranges.Bytes; safe for several threads.

    key: names the file and its version for ever, the same in all processes of all runs. retry_seconds: how long an
    outage may last while the file is fetched. It is waited out in place, so what has arrived is not fetched again.
    """

    def __init__(self, inner: Bytes, key: str, cache: DiskCache, retry_seconds: float):
        self.what = inner.what
        self._inner, self._key, self._cache = inner, key, cache
        self._retry_seconds = retry_seconds
        self._lock = threading.Lock()
        self._was_here = False
        self._past_cache = 0  # bytes read past the cache since the file was evicted
        self._size: int | None = None

    def size(self) -> int:
        if self._size is None:
            self._size = self._inner.size()
        return self._size

    def fetch(self, start: int, stop: int) -> bytes:
        size = self.size()
        stop = min(stop, size)
        if start >= stop:
            return b""
        with self._cache.find(self._key, size) as file:
            if file is not None:
                self._note(None)
                file.seek(start)
                return _exactly(file.read(stop - start), stop - start, self.what)
        if self._was_here and self._past_cache + stop - start <= size:
            data = self._inner.fetch(start, stop)
            self._note(len(data))
            return data
        with self._cache.open(self._key, size, self._bring, self.what) as file:
            self._note(None)
            file.seek(start)
            return _exactly(file.read(stop - start), stop - start, self.what)

    def tail(self, count: int) -> bytes:
        return self.fetch(max(self.size() - count, 0), self.size())

    def stamp(self) -> Json:
        return self._inner.stamp()

    def refresh(self) -> None:
        """Drop the file: the next read fetches it again."""
        self._inner.refresh()
        self._cache.drop(self._key)
        with self._lock:
            self._size, self._was_here, self._past_cache = None, False, 0

    def _note(self, past_cache: int | None) -> None:
        """past_cache: bytes that were read past the cache, or None: the file is here."""
        with self._lock:
            self._was_here = True
            self._past_cache = 0 if past_cache is None else self._past_cache + past_cache

    def _bring(self, sink: Sink) -> None:
        size = self.size()
        for start in range(0, size, _PIECE):
            stop = min(start + _PIECE, size)
            sink.write(
                retry.attempt(
                    lambda start=start, stop=stop: _exactly(self._inner.fetch(start, stop), stop - start, self.what),
                    what=self.what,
                    deadline=self._retry_seconds,
                )
            )


def _exactly(data: bytes, count: int, what: str) -> bytes:
    if len(data) != count:
        raise TransientError(f"{what}: {len(data)} of {count} bytes arrived")
    return data
