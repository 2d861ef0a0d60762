"""Corrupt files that a run skips from their first bad row on: `skips.json` in the work directory.

No process starts to skip rows during a run. The process that finds a corrupt file records it and exits; all processes
restart and read the same list. Every checkpoint holds the list too, in case the file is lost. Past training is not
affected; from the restart on, the skipped rows behave as if a filter dropped them in every epoch.
"""

import json
import os
from collections.abc import Mapping

from etils import epath

from jaxtrain.errors import CorruptError, UserError
from jaxtrain.interfaces import Json

SkippedFiles = Mapping[str, Mapping[str, int]]  # source → file (its lasting name) → the first skipped row

FOOTER = -1  # in place of a row: the footer is unreadable, so the file has no units


def union(*lists: SkippedFiles) -> dict[str, dict[str, int]]:
    """All lists merged; the earlier row wins."""
    found: dict[str, dict[str, int]] = {}
    for one in lists:
        for source, files in one.items():
            mine = found.setdefault(source, {})
            for file, row in files.items():
                mine[file] = min(row, mine.get(file, row))
    return found


def load(path: epath.Path) -> dict[str, dict[str, int]]:
    """The content of `skips.json`, empty without a file. Raises UserError if it is not a valid list."""
    if not path.exists():
        return {}
    try:
        read = json.loads(path.read_text())
        return {str(source): {str(file): int(row) for file, row in files.items()} for source, files in read.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a list of skipped files ({error}). Remove it, or restore it.") from None


def record(path: epath.Path, error: CorruptError) -> None:
    """Adds the file of `error`.

    Processes that find different files at the same time may overwrite each other's list; a lost entry is found again
    after the restart. A kill leaves the old list or the new one.
    """
    now = union(load(path), {error.source: {error.file: error.row}})
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(now, indent=2) + "\n")
    temporary.replace(path)


def saved(sources: Mapping[str, Json]) -> dict[str, dict[str, int]]:
    """The list that a checkpoint's source identities hold."""
    return {name: identity["skips"] for name, identity in sources.items()}


def compare(source: str, old: Mapping[str, int], new: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Compares two lists of one source. Returns lines for (changes a resume allows, changes it refuses)."""
    allowed, refused = [], []
    for file in sorted(old.keys() | new.keys()):
        before, now = old.get(file), new.get(file)
        if before == now:
            continue
        line = f"source {source!r}: {file} is skipped {_from(now)}, was {_from(before)}"
        if now is None or (before is not None and now > before):
            refused.append(f"{line}: a skipped file stays skipped")
        elif now == FOOTER:
            refused.append(f"{line}: positions in the checkpoint count the row groups of its footer; restore the file")
        else:
            allowed.append(line)
    return allowed, refused


def _from(row: int | None) -> str:
    if row is None:
        return "nowhere"
    return "whole (its footer cannot be read)" if row == FOOTER else f"from row {row:,}"
