"""Output that never ends a command when the reader of a pipe exits, the terminal closes, or the disk fills up."""

import io
import os
import sys
from typing import Any


class _Forgiving(io.RawIOBase):
    """A file descriptor that drops what cannot be written."""

    def __init__(self, descriptor: int):
        super().__init__()
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError:  # EPIPE, EIO, ENOSPC
            return len(data)


def protect() -> None:
    """Replaces `sys.stdout` and `sys.stderr` by streams that never raise, if they are still the interpreter's own.

    Characters outside their encoding (ASCII, Latin-1) print as escapes.
    """
    # The next opened file would reuse a closed standard descriptor and receive the messages.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        protected = io.TextIOWrapper(
            io.BufferedWriter(_Forgiving(number)),
            encoding=getattr(stream, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=stream is None or stream.line_buffering,
        )
        setattr(sys, name, protected)
