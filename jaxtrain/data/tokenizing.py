"""From a lane's windows of texts to tokenized documents, with a teacher's records if there are any."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from jaxtrain.data.io.exit_guard import gate
from jaxtrain.data.packing import WHERE, Documents
from jaxtrain.data.source_reader import Position, Window
from jaxtrain.data.token_arrays import TokenArrays
from jaxtrain.interfaces import Tokenizer

CHUNK_CHARACTERS = 200_000  # tokenized together: enough for threads to share, few enough to be done soon
CHUNK_TOKENS = 50_000  # about as much, if a store has the tokens already


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """How documents become rows, for all lanes. `epochs`: how often a source is read; None for ever.

    records: by source, what gives each document's records; empty for batches without. width: bytes of a record.
    """

    tokenizer: Tokenizer
    add_bos: bool
    document_mask: bool
    epochs: int | None
    records: Mapping[str, "Records"] = dataclasses.field(default_factory=dict)
    width: int = 0


class Records(Protocol):
    """What is known of the tokens of a source's documents. Safe for several threads."""

    def read(self, file: int, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """uint8 [sum of lengths, W] for documents of one file. rows: in the file, [N]. tokens, lengths: as Documents.

        Raises UserError for a document that is not there, or has other tokens; CorruptError, TransientError.
        """
        ...


def documents_of(
    windows: Iterator[Window],
    start: Position,
    rows: RowSpec,
    nothing: Callable[[], object] = lambda: None,
    records: Records | None = None,
) -> Iterator[Documents]:
    """The tokenized documents of a lane's windows from `start` on, with their records.

    nothing: called if the first epoch has no document with a token. The stream ends there unless it raises.
    """
    empty = start == Position(0, 0, 0)
    for window in windows:
        at = window.start
        if empty and at.epoch:
            break
        first = start.row if (at.epoch, at.unit) == (start.epoch, start.unit) else 0
        for documents in _tokenized(window, first, rows, records is not None):
            empty = empty and not len(documents.lengths)
            if records is not None:
                file_rows = documents.where[:, WHERE.index("file_row")]
                found = records.read(window.file, file_rows, documents.tokens, documents.lengths)
                documents = dataclasses.replace(documents, records=found)
            yield documents
    if empty:
        nothing()


def _tokenized(window: Window, first: int, rows: RowSpec, in_pieces: bool) -> Iterator[Documents]:
    """The window's documents from row `first` on, in pieces of about `CHUNK_CHARACTERS`.

    in_pieces: also where the window has tokens, which are given all at once otherwise.
    """
    kept = np.flatnonzero(window.positions >= first)
    if window.tokens is not None:
        of_file = window.file_rows[kept] - window.first
        pieces = _pieces(window.tokens.lengths[of_file], CHUNK_TOKENS) if in_pieces else [slice(None)]
        for piece in pieces:
            if len(kept[piece]):
                yield _closed(window, kept[piece], window.tokens, of_file[piece], rows)
        return
    indices = kept.tolist()
    for piece in _pieces([len(window.texts[index]) for index in indices], CHUNK_CHARACTERS):
        yield _encode(window, indices[piece], rows)


def _pieces(sizes: Sequence[int] | np.ndarray, enough: int) -> Iterator[slice]:
    """Cuts where the sizes of a piece have come to `enough`."""
    begin = held = 0
    for index, size in enumerate(sizes):
        held += size
        if held >= enough:
            yield slice(begin, index + 1)
            begin, held = index + 1, 0
    if begin < len(sizes):
        yield slice(begin, len(sizes))


def _encode(window: Window, chunk: Sequence[int], rows: RowSpec) -> Documents:
    with gate:
        ids, lengths = rows.tokenizer.encode_batch([window.texts[index] for index in chunk])
    kept = np.flatnonzero(lengths)
    return _closed(window, np.asarray(chunk)[kept], TokenArrays(ids, lengths), kept, rows)


def _closed(window: Window, of_window: np.ndarray, tokens: TokenArrays, which: np.ndarray, rows: RowSpec) -> Documents:
    """The window's documents `of_window`, whose ids are those numbered `which` of `tokens`; none is empty."""
    bos_id = rows.tokenizer.bos_id if rows.add_bos else None
    flat, lengths = tokens.closed(which, rows.tokenizer.eos_id, bos_id)
    at = window.start
    where = np.empty((len(of_window), len(WHERE)), np.int64)
    where[:] = (at.epoch, at.unit, 0, at.base, window.file, 0)
    where[:, WHERE.index("row")] = window.positions[of_window]
    where[:, WHERE.index("file_row")] = window.file_rows[of_window]
    return Documents(flat, lengths, where)
