"""How fast this process asks a server that has said "too many requests" (429).

Retries alone (data/io/retry.py) are each reader's own matter: many readers on many hosts would go on to be refused as
often as they ask. So after a refusal all readers of the process hold until the server takes requests again, and then
ask with a pause between any two requests that doubles with each further refusal and shrinks with each answer: additive
readers, multiplicative back-off, as in TCP (Chiu and Jain 1989). Hosts that share a limit share it evenly, with nothing
between them. A server that never refuses is never waited for.
"""

import functools
import random
import threading
import time
from urllib.parse import urlsplit

from jaxtrain.data.io import retry

# Seconds between two requests after the first refusal; the longest; and the shortest, below which there is none.
FIRST, LONGEST, SHORTEST = 0.05, 5.0, 0.005
RELAX = 0.97  # an answer's factor: 23 answers halve the pause


class Pace:
    """Of one server. Safe for several threads."""

    def __init__(self, seed: int | None = None):
        self.pause = 0.0
        self._next_at = self._held_until = 0.0
        self._rng = random.Random(seed)
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Before each request."""
        with self._lock:
            if not self.pause:
                return
            now = time.monotonic()
            at = max(now, self._next_at)
            self._next_at = at + self.pause * self._rng.uniform(0.5, 1.5)
        if at > now:
            retry.sleep(at - now)

    def refused(self, retry_after: float | None) -> None:
        """After a 429. retry_after: seconds that the server asks for."""
        with self._lock:
            now = time.monotonic()
            if now < self._held_until:
                return  # asked before the process knew
            self.pause = min(max(2 * self.pause, FIRST), LONGEST)
            # Hosts that were refused together come back apart.
            self._held_until = now + (retry_after or 1.0) * self._rng.uniform(1.0, 1.2)
            self._next_at = max(self._next_at, self._held_until)

    def answered(self) -> None:
        with self._lock:
            self.pause *= RELAX
            if self.pause < SHORTEST:
                self.pause = 0.0


@functools.lru_cache(maxsize=1024)
def _of_server(server: str) -> Pace:
    return Pace()


def pace_of(url: str) -> Pace:
    """The pace of the server that a URL names."""
    return _of_server(urlsplit(url).netloc)
