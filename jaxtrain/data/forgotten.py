"""Documents that a run leaves out from a step on: `forgotten.json` in the work directory.

The list comes from `data.forget`, or from rewinds (trainer/spikes.py). Each entry holds from a step on, so a run that
finds its list on the way has the batches of a run that started with it. Every checkpoint holds the list too.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping

import numpy as np
from etils import epath

from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json

FILE = "forgotten.json"
# Source → file (its lasting name) → row → the first step whose batch is read without it.
Documents = dict[str, dict[str, dict[int, int]]]
_NEVER = np.iinfo(np.int64).max


@dataclasses.dataclass
class Forgotten:
    """The list of a run.

    Attributes:
        documents: The documents.
        rewinds: How often a spike made the run return to a checkpoint.
    """

    documents: Documents = dataclasses.field(default_factory=dict)
    rewinds: int = 0

    def __iter__(self) -> Iterator[tuple[str, str, int, int]]:
        """(source, file, row, first step without it) of each document."""
        for source, files in self.documents.items():
            for file, rows in files.items():
                yield from ((source, file, row, step) for row, step in rows.items())

    def add(self, source: str, file: str, row: int, step: int) -> None:
        """Adds a document, unless it is listed."""
        self.documents.setdefault(source, {}).setdefault(file, {}).setdefault(row, step)

    def learn(self, other: "Forgotten") -> None:
        """Adds the documents of another list that this one lacks."""
        for entry in other:
            self.add(*entry)
        self.rewinds = max(self.rewinds, other.rewinds)

    def to_json(self) -> Json:
        documents = {
            source: {file: {str(row): rows[row] for row in sorted(rows)} for file, rows in sorted(files.items())}
            for source, files in sorted(self.documents.items())
        }
        return {"rewinds": self.rewinds, "documents": documents}


def from_json(value: Json, step: int) -> Forgotten:
    """The list of `to_json`. Rows may also be a list: these are left out from `step` on."""
    found = Forgotten(rewinds=int(value.get("rewinds", 0)))
    for source, files in value["documents"].items():
        for file, rows in files.items():
            for row, first in rows.items() if isinstance(rows, dict) else dict.fromkeys(rows, step).items():
                found.add(source, file, int(row), int(first))
    return found


def load(path: epath.Path, step: int = 1) -> Forgotten:
    """Reads a list: {"documents": {source: {file: [row, ...] or {row: first step}}}}.

    Args:
        path: The file.
        step: The first step of rows in a list.

    Raises:
        UserError: There is no such file, or it holds something else.
    """
    try:
        return from_json(json.loads(path.expanduser().read_text()), step)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(
            f"{path} is not a list of documents ({type(error).__name__}: {error}): give "
            '{"documents": {"web": {"data/train-0.parquet": [17, 40]}}}, which is source, file and rows, as '
            "tools.inspect_stream --documents=... --json=FILE writes it"
        ) from None


def compare(old: Forgotten, new: Forgotten, step: int) -> list[str]:
    """Lines for entries of `new` that would change what was trained on up to `step`, of which `old` is the list."""
    known = set(old)
    return [
        f"source {source!r}: {file} row {row} is left out from step {first} on, and was trained on until step {step}: "
        f"give step {step + 1} or a later one in {FILE}"
        for source, file, row, first in new
        if first <= step and (source, file, row, first) not in known
    ]


class Rows:
    """The forgotten rows of one file."""

    def __init__(self, steps: Mapping[int, int]):
        """steps: Row → the first step without it."""
        self._rows = np.array(sorted(steps), np.int64)
        self._steps = np.array([steps[row] for row in sorted(steps)], np.int64)

    def steps(self, rows: np.ndarray) -> np.ndarray:
        """The first step without each of the rows, int64 [N]; the largest integer if there is none."""
        at = np.minimum(self._rows.searchsorted(rows), len(self._rows) - 1)
        return np.where(self._rows[at] == rows, self._steps[at], _NEVER)
