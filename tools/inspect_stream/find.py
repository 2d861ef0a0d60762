"""`tools.inspect_stream --documents`: the addresses of documents, by their text or by a column."""

import dataclasses
import functools
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from jaxtrain.checkpoint import restore
from jaxtrain.config import Config
from jaxtrain.data.io import retry
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Source
from jaxtrain.trainer import open_data

_FILES_AT_ONCE = 8
_PREVIEW_CHARACTERS = 80


@dataclasses.dataclass(frozen=True)
class _Column:
    """A transform that makes sources read a column."""

    name: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.name,)

    def __call__(self, document: dict[str, Any]) -> dict[str, Any]:
        return document


def find(config: Config, workdir: str, wanted: Set[str], by: str | None, only: str | None) -> Json:
    """Finds the documents that contain one of `wanted`, or whose column `by` is one of them.

    Reads every row. Prints the documents.

    Args:
        config: the run's config.
        workdir: the work directory. If it has a checkpoint, the commits of its sources are read.
        wanted: texts, or values of the column.
        by: the column; None for the text.
        only: the source to search; None for all.

    Returns:
        The list for `data.forget`.
    """
    if only is not None and only not in config.data.sources:
        raise UserError(f"--source={only}: the config has {', '.join(config.data.sources)}")
    saved = restore.load_data(workdir) if restore.is_checkpoint(workdir) else None
    read = () if by is None else (_Column(by),)
    plain = {
        name: dataclasses.replace(source, transforms=read)
        for name, source in config.data.sources.items()
        if only in (None, name)
    }
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=plain))
    found: dict[str, dict[str, list[int]]] = {}
    missing = set(wanted)
    with ThreadPoolExecutor(_FILES_AT_ONCE, "jaxtrain-find") as executor:
        for name, source in open_data.resolve(config, saved).items():
            look = functools.partial(_rows, name, source, wanted, by, 60 * config.data.retry_minutes)
            # None shows the bar only on a terminal.
            files = tqdm(source.files, desc=name, unit=" files", disable=None)
            for file, rows in zip(files, executor.map(look, range(len(source.files))), strict=True):
                for row, (value, text) in rows.items():
                    print(f"{name}, {file} row {row:,}: {text[:_PREVIEW_CHARACTERS]!r}", flush=True)
                    missing -= {value}
                if rows:
                    found.setdefault(name, {})[file] = list(rows)
    count = sum(len(rows) for files in found.values() for rows in files.values())
    print(f"\n{count:,} document(s) found; {len(missing):,} of {len(wanted):,} wanted value(s) found nowhere")
    return {"documents": found, "missing": sorted(missing)}


def _rows(
    name: str, source: Source, wanted: Set[str], by: str | None, deadline: float, file: int
) -> dict[int, tuple[str, str]]:
    """Row → (the value found, text) of each document in a file."""
    found: dict[int, tuple[str, str]] = {}
    what, row = f"source {name!r}, file {source.files[file]}", 0
    for block in retry.retrying(functools.partial(source.open, file), 0, what=what, deadline=deadline):
        if by is not None and by not in block:
            raise UserError(f"{what} has no column {by!r}")
        for text, value in zip(block["text"], block["text" if by is None else by], strict=True):
            if by is not None:
                here = str(value) if str(value) in wanted else None
            else:
                here = next((some for some in wanted if some in text), None)
            if here is not None:
                found[row] = here, text
            row += 1
    return found
