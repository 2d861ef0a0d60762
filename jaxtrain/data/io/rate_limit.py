"""How fast this process sends requests to a server that has answered "too many requests" (429).

With retries alone (retry.py), each reader would retry independently, and many readers on many hosts would be refused
again and again. So after a refusal all readers of the process wait until the server accepts requests again, and then
pause between requests. The pause doubles with each further refusal and shrinks with each response: multiplicative
back-off, as in TCP (Chiu and Jain 1989). Hosts that share a limit share it evenly without communicating. There is no
pause for a server that never refuses.
"""

import functools
import random
import threading
import time
from urllib.parse import urlsplit

from jaxtrain.data.io import retry

# Seconds between two requests: after the first refusal, at most, and at least (below it there is no pause).
FIRST, LONGEST, SHORTEST = 0.05, 5.0, 0.005
RELAX = 0.97  # factor on the pause per response: 23 responses halve it


class RateLimiter:
    """The limiter of one server. Thread-safe."""

    def __init__(self, server: str = "", seed: int | None = None):
        self.server = server
        self.pause = 0.0  # seconds between two requests
        self._next_at = self._held_until = 0.0
        self._rng = random.Random(seed)
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Call before each request.

        Raises:
            TransientError: The deadline of the current attempt comes before this request's turn.
        """
        with self._lock:
            if not self.pause:
                return
            now = time.monotonic()
            at = max(now, self._next_at)
            self._next_at = at + self.pause * self._rng.uniform(0.5, 1.5)
        if at > now:
            retry.pause(at - now, f"{self.server} limits the rate of requests")

    def refused(self, retry_after: float | None) -> None:
        """Call after a 429. retry_after: seconds that the server asks for."""
        with self._lock:
            now = time.monotonic()
            if now < self._held_until:
                return  # sent before the process knew
            self.pause = min(max(2 * self.pause, FIRST), LONGEST)
            # Jitter, so that hosts refused together do not return together.
            self._held_until = now + (retry_after or 1.0) * self._rng.uniform(1.0, 1.2)
            self._next_at = max(self._next_at, self._held_until)

    def answered(self) -> None:
        """Call after each response."""
        with self._lock:
            self.pause *= RELAX
            if self.pause < SHORTEST:
                self.pause = 0.0


@functools.lru_cache(maxsize=1024)
def _of_server(server: str) -> RateLimiter:
    return RateLimiter(server)


def limiter_of(url: str) -> RateLimiter:
    """The limiter of the server that a URL names, without its credentials."""
    return _of_server(urlsplit(url).netloc.rpartition("@")[2])
