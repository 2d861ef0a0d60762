"""Corrupt files whose rows are given up, from the first bad one on: `skips.json` in the work directory.

No process ever skips by itself in mid-run: the one that finds a corrupt file records it here and ends, all start again,
and each then has the same list. Every checkpoint holds it too, so that a lost file is no loss. What was trained on
before stays as it was; from the restart on, those rows are as if a filter had dropped them, in every epoch.
"""

import json
import os
from collections.abc import Mapping

from etils import epath

from jaxtrain.errors import CorruptError, UserError
from jaxtrain.interfaces import Json

SkippedFiles = Mapping[str, Mapping[str, int]]  # source → file, by its lasting name → the first row that is given up

FOOTER = -1  # instead of a row: the file's row groups cannot be told, so it has no units at all


def union(*lists: SkippedFiles) -> dict[str, dict[str, int]]:
    """The skips of all lists; of two rows of one file the earlier."""
    found: dict[str, dict[str, int]] = {}
    for one in lists:
        for source, files in one.items():
            mine = found.setdefault(source, {})
            for file, row in files.items():
                mine[file] = min(row, mine.get(file, row))
    return found


def load(path: epath.Path) -> dict[str, dict[str, int]]:
    """What `skips.json` says, nothing if there is none. Raises UserError if it cannot be understood."""
    if not path.exists():
        return {}
    try:
        read = json.loads(path.read_text())
        return {str(source): {str(file): int(row) for file, row in files.items()} for source, files in read.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a list of skipped files ({error}). Remove it, or restore it.") from None


def record(path: epath.Path, error: CorruptError) -> None:
    """Adds the file of `error`.

    Processes that find different files at one moment may each replace the other's list: what is lost is found again
    after the restart. A kill leaves the old list or the new one.
    """
    now = union(load(path), {error.source: {error.file: error.row}})
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(now, indent=2) + "\n")
    temporary.replace(path)


def saved(sources: Mapping[str, Json]) -> dict[str, dict[str, int]]:
    """The list in a checkpoint's source identities."""
    return {name: identity["skips"] for name, identity in sources.items()}


def compare(source: str, old: Mapping[str, int], new: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """(differences that a resume allows, differences that it refuses) between two lists of one source, as lines."""
    allowed, refused = [], []
    for file in sorted(old.keys() | new.keys()):
        before, now = old.get(file), new.get(file)
        if before == now:
            continue
        line = f"source {source!r}: {file} is skipped {_from(now)}, was {_from(before)}"
        if now is None or (before is not None and now > before):
            refused.append(f"{line}: what was given up stays so")
        elif now == FOOTER:
            refused.append(f"{line}: positions in the checkpoint count the row groups of its footer; restore the file")
        else:
            allowed.append(line)
    return allowed, refused


def _from(row: int | None) -> str:
    if row is None:
        return "nowhere"
    return "whole (its footer cannot be read)" if row == FOOTER else f"from row {row:,}"
