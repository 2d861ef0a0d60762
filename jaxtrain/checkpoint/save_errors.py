"""What goes wrong in a save: noticed when it happens, and put into words."""

import logging
import re
import sys
from typing import Any

# Errors come from Python (OSError) and from TensorStore (ValueError with the operating system's text in it).
_FULL = re.compile(r"no space left|ENOSPC|quota exceeded|EDQUOT|file too large|EFBIG", re.IGNORECASE)
_REFUSED = re.compile(r"permission ?denied|read-only file system|EACCES|EROFS|\b403\b", re.IGNORECASE)


def storage_refused(error: BaseException) -> str | None:
    """The reason, if the storage refused a write; None if something else went wrong."""
    if _FULL.search(str(error)):
        return "the disk is full (or a quota is)"
    if _REFUSED.search(str(error)):
        return "writing is not allowed there"
    return None


class BackgroundError(logging.Filter):
    """Catches what Orbax's threads log when a save fails, instead of printing it.

    Orbax hands the error to `wait_until_finished` only after a barrier, which a process that failed alone reaches when
    the others time out, an hour later; it logs it at once.
    """

    def __init__(self):
        super().__init__()
        self.error: BaseException | None = None
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._drop_late_writes
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "asyncio":
            # The writes that failed after the first: "Task exception was never retrieved".
            return self.error is None
        if not record.exc_info or "orbax" not in record.pathname:
            return True
        self.error = self.error or record.exc_info[1]
        return False

    def _drop_late_writes(self, unraisable: Any) -> None:
        # TensorStore meets this for each array that was still being written when the first one failed.
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        logging.getLogger("absl").removeFilter(self)
        # After a failure, what was being written may fail later still.
        if self.error is None:
            logging.getLogger("asyncio").removeFilter(self)
            sys.unraisablehook = self._hook
