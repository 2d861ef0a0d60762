"""The kinds of failure. Each has one way out of the program."""


class UserError(ValueError):
    """The user must change something: config, usage, dataset, credentials. One message, exit code 2."""


class TransientError(Exception):
    """A fault that may be temporary: 5xx, 429, resets, timeouts, short reads.

    Attributes:
        retry_after: Seconds that the server asked to wait, if any.
    """

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class FollowedError(Exception):
    """Raised because another process failed; that process reports the reason."""


class CorruptError(Exception):
    """Bytes that arrived whole and cannot be read.

    Attributes:
        file: The file's name in its source.
        row: The first bad row.
        source: The source's name in `data.sources`; "" if not known yet.
    """

    def __init__(self, message: str, file: str, row: int, source: str = ""):
        super().__init__(message)
        self.file = file
        self.row = row
        self.source = source
