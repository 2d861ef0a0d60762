"""One source's documents as a Grain dataset, for training loops other than jaxtrain's own.

A shard is a lane (see lanes.py) without tokenizer and packing: which documents it yields, in which order, depends on
the arguments alone, and its iterator's state is a position of a few integers.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import grain

from jaxtrain.data import pipeline
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.source_reader import Position, SourceReader, Window
from jaxtrain.data.threads import DaemonPool, Prefetcher
from jaxtrain.errors import UserError

_POSITION = tuple(field.name for field in dataclasses.fields(Position))


class DocumentDataset(grain.IterDataset):
    """The documents of one shard of a source: see `jaxtrain.documents`. A shard is a lane of `config`.

    Nothing is looked up before the first element or state is asked for, so the dataset can be pickled.
    """

    def __init__(self, config: DataConfig, *, shard: int, seed: int, held_out: bool, epochs: int | None):
        super().__init__()
        if not 0 <= shard < config.num_lanes:
            raise UserError(f"shard={shard}: give 0 to num_shards - 1 = {config.num_lanes - 1}")
        config.check()
        self.config, self.shard, self.shuffle_seed, self.held_out, self.epochs = config, shard, seed, held_out, epochs

    def __iter__(self) -> "DocumentIterator":
        return DocumentIterator(self)

    def open(self, revision: str | None) -> SourceReader:
        """Looks the source up. revision: the commit of a Hub dataset; None for the source's own revision."""
        ((name, source),) = self.config.sources.items()
        if revision is not None:
            source = dataclasses.replace(source, revision=revision)  # type: ignore[type-var]
        config = dataclasses.replace(self.config, sources={name: source})
        (reader,) = config.build(pipeline.resolve(config), seed=self.shuffle_seed, held_out=self.held_out)
        return reader


class DocumentIterator(grain.DatasetIterator):
    """Elements: {"text": str, "file": str, "row": int}, the document and its lasting address in the source.

    State, JSON: the position of the next document (epoch, unit, row, base), the commit of a Hub dataset ("" for other
    sources), and a digest of everything that decides which document that is. A state is refused if the digest
    differs; a branch that has moved since is read at the state's commit.
    """

    def __init__(self, dataset: DocumentDataset):
        super().__init__()
        self._dataset = dataset
        self._next = Position(0, 0, 0)
        self._reader: SourceReader | None = None
        self._documents: Iterator[tuple[dict[str, Any], Position]] | None = None
        self._pool = DaemonPool(1, "jaxtrain-documents")

    def __next__(self) -> dict[str, Any]:
        if self._documents is None:
            self._documents = self._read(self._opened())
        document, self._next = next(self._documents)
        return document

    def get_state(self) -> dict[str, Any]:
        reader = self._opened()
        return {**dataclasses.asdict(self._next), "revision": _revision(reader) or "", "digest": self._digest(reader)}

    def set_state(self, state: dict[str, Any]) -> None:
        if self._reader is None or (_revision(self._reader) or "") != state["revision"]:
            self.close()
            self._reader = self._dataset.open(state["revision"] or None)
        if self._digest(self._reader) != state["digest"]:
            raise UserError(
                f"the state belongs to other documents: its digest is {state['digest']}, this dataset's "
                f"{self._digest(self._reader)}. Give the same source, files, name, seed, shuffle, holdout and "
                "num_shards as when it was saved."
            )
        self._next = Position(*(int(state[field]) for field in _POSITION))
        self._documents = None

    def close(self) -> None:
        super().close()
        if self._reader is not None:
            self._reader.close()
            self._reader = self._documents = None

    def _opened(self) -> SourceReader:
        if self._reader is None:
            self._reader = self._dataset.open(None)
        return self._reader

    def _read(self, reader: SourceReader) -> Iterator[tuple[dict[str, Any], Position]]:
        """Documents from the position on, each with the position after it."""
        start, shard = self._next, self._dataset.shard
        reader.register({shard: start})
        # The next window is read while this one's documents are consumed.
        windows: Iterator[Window] = Prefetcher(reader.windows(shard, start, self._dataset.epochs), self._pool)
        for window in windows:
            at, file = window.start, reader.source.files[window.file]
            for text, row, file_row in zip(
                window.texts, window.positions.tolist(), window.file_rows.tolist(), strict=True
            ):
                if (at.epoch, at.unit) == (start.epoch, start.unit) and row < start.row:
                    continue
                after = Position(at.epoch, at.unit, row + 1, at.base)
                yield {"text": text, "file": file, "row": file_row}, after

    def _digest(self, reader: SourceReader) -> str:
        """A digest of what decides which document is at a position, including the shard, which numbers positions."""
        decisive = [reader.name, reader.identity, dataclasses.asdict(reader.options), self._dataset.shard]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _revision(reader: SourceReader) -> str | None:
    """The commit that a Hub dataset was resolved to; None for other sources."""
    return reader.source.identity.get("revision")
