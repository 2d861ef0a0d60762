"""Files read through the disk cache: a read brings the whole file there first, and later reads are local.

A file may be evicted between two reads, since more files may be in use (one per lane, say) than fit. If each read then
fetched its file again, every 4 MB would cost a whole file. So a file that was evicted while in use is read past the
cache, in ranges, until those have cost as much as the file; then it is fetched again. In any order of reads, this costs
at most twice as much as the best decision.
"""

import threading
from typing import IO

from jaxtrain.data.io import retry
from jaxtrain.data.io.byte_ranges import Bytes
from jaxtrain.data.io.disk_cache import DiskCache, Sink
from jaxtrain.errors import TransientError
from jaxtrain.interfaces import Json

_REQUEST = 1 << 23  # bytes: 8 MB, at 200 ms a request 40 MB/s for each file


class CachedBytes(Bytes):
    """The bytes of another `Bytes`, through a DiskCache."""

    def __init__(self, inner: Bytes, key: str, cache: DiskCache, retry_seconds: float):
        """Makes no request.

        Args:
            inner: The file.
            key: A lasting name of the file and its version, the same in all processes of all runs.
            cache: Where the file goes.
            retry_seconds: How long an outage may last while the file is fetched. The fetch waits in place, so no byte
                is fetched twice.
        """
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
                return self._read(file, start, stop)
        if self._was_here and self._past_cache + stop - start <= size:
            data = self._inner.fetch(start, stop)
            with self._lock:
                self._past_cache += len(data)
            return data
        with self._cache.open(self._key, size, self._bring, self.what) as file:
            return self._read(file, start, stop)

    def stamp(self) -> Json:
        return self._inner.stamp()

    def refresh(self) -> None:
        """Drops the file: the next read fetches it again."""
        self._inner.refresh()
        self._cache.drop(self._key)
        with self._lock:
            self._size, self._was_here, self._past_cache = None, False, 0

    def _read(self, file: IO[bytes], start: int, stop: int) -> bytes:
        with self._lock:
            self._was_here, self._past_cache = True, 0
        file.seek(start)
        return self._whole(file.read(stop - start), stop - start)

    def _bring(self, sink: Sink) -> None:
        size = self.size()
        for start in range(0, size, _REQUEST):
            count = min(_REQUEST, size - start)

            def request(start: int = start, count: int = count) -> bytes:
                return self._whole(self._inner.fetch(start, start + count), count)

            sink.write(retry.attempt(request, what=self.what, deadline=self._retry_seconds))

    def _whole(self, data: bytes, count: int) -> bytes:
        if len(data) != count:
            raise TransientError(f"{self.what}: {len(data)} of {count} bytes arrived")
        return data
