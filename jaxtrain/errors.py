"""What can go wrong, by what has to follow: each class has one way out of the program."""


class UserError(ValueError):
    """What the user must change (config, usage, missing dataset or credentials). Exit code 2, no traceback."""


class TransientError(Exception):
    """A fault that time may cure (5xx, 429, resets, time-outs, short reads); `retry_after` in seconds if known."""

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class FollowedError(Exception):
    """Raised since another process failed: that one says why."""


class CorruptError(Exception):
    """Bytes that arrived whole and cannot be read; `file` and `row` (the first bad one) say where.

    source: the source's name in `data.sources`, "" where it is not known (yet).
    """

    def __init__(self, message: str, file: str, row: int, source: str = ""):
        super().__init__(message)
        self.file = file
        self.row = row
        self.source = source
