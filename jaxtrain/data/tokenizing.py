"""From a lane's windows of texts to tokenized documents, with a teacher's records if any."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from jaxtrain.data.io.exit_guard import gate
from jaxtrain.data.packing import WHERE, Documents
from jaxtrain.data.source_reader import Position, Window
from jaxtrain.data.token_arrays import TokenArrays
from jaxtrain.interfaces import Tokenizer

CHUNK_CHARACTERS = 200_000  # tokenized together: enough for threads to share, few enough to finish quickly
CHUNK_TOKENS = 50_000  # about the same, for tokens from a store


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """How documents become rows, for all lanes.

    Attributes:
        tokenizer: The run's tokenizer.
        add_bos: Whether each document begins with the beginning-of-document token.
        document_mask: Whether attention and loss stop at document boundaries.
        epochs: How many times each source is read; None for no limit.
        records: The teacher's records of each source, by name; empty for batches without records.
        width: W, bytes per record.
    """

    tokenizer: Tokenizer
    add_bos: bool
    document_mask: bool
    epochs: int | None
    records: Mapping[str, "Records"] = dataclasses.field(default_factory=dict)
    width: int = 0


class Records(Protocol):
    """Records of the tokens of a source's documents, such as a teacher's. Thread-safe."""

    def read(self, file: int, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Reads the records of documents of one file.

        Args:
            file: The file's index.
            rows: The documents' rows in the file, [N].
            tokens: Their tokens, as in Documents.
            lengths: Their lengths, as in Documents.

        Returns:
            uint8 [sum of lengths, W].

        Raises:
            UserError: A document is missing or has other tokens.
            CorruptError: The records are damaged.
            TransientError: The storage is unavailable.
        """
        ...


def documents_of(
    windows: Iterator[Window],
    start: Position,
    rows: RowSpec,
    nothing: Callable[[], object] = lambda: None,
    records: Records | None = None,
) -> Iterator[Documents]:
    """Tokenizes the documents of a lane's windows and attaches their records.

    Args:
        windows: The lane's windows.
        start: The position to start at.
        rows: How documents become rows.
        nothing: Called if the first epoch has no document with a token. The stream ends there unless it raises.
        records: The source's records, or None.

    Yields:
        Chunks of documents.
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


def _tokenized(window: Window, first: int, rows: RowSpec, chunked: bool) -> Iterator[Documents]:
    """The window's documents from row `first` on, in chunks of about `CHUNK_CHARACTERS`.

    chunked: Whether to split windows from a store, too, which otherwise come as one chunk.
    """
    begin = int(window.positions.searchsorted(first))  # the positions ascend
    if window.tokens is not None:
        of_file = window.file_rows - window.first
        end = slice(begin, len(of_file))
        for chunk in _chunks(window.tokens.lengths[of_file].tolist(), begin, CHUNK_TOKENS) if chunked else [end]:
            if len(of_file[chunk]):
                yield _closed(window, np.arange(chunk.start, chunk.stop), window.tokens, of_file[chunk], rows)
        return
    for chunk in _chunks(list(map(len, window.texts)), begin, CHUNK_CHARACTERS):
        with gate:
            ids, lengths = rows.tokenizer.encode_batch(window.texts[chunk])
        kept = np.flatnonzero(lengths)
        yield _closed(window, chunk.start + kept, TokenArrays(ids, lengths), kept, rows)


def _chunks(sizes: Sequence[int], begin: int, enough: int) -> Iterator[slice]:
    """Slices from `begin` on whose sizes add up to at least `enough`, except perhaps the last."""
    held = 0
    for index in range(begin, len(sizes)):
        held += sizes[index]
        if held >= enough:
            yield slice(begin, index + 1)
            begin, held = index + 1, 0
    if begin < len(sizes):
        yield slice(begin, len(sizes))


def _closed(window: Window, of_window: np.ndarray, tokens: TokenArrays, which: np.ndarray, rows: RowSpec) -> Documents:
    """The window's documents `of_window`, whose ids are the documents `which` of `tokens`; none is empty."""
    bos_id = rows.tokenizer.bos_id if rows.add_bos else None
    flat, lengths = tokens.closed(which, rows.tokenizer.eos_id, bos_id)
    at = window.start
    where = np.empty((len(of_window), len(WHERE)), np.int64)
    where[:] = (at.epoch, at.unit, 0, at.base, window.file, 0)
    where[:, WHERE.index("row")] = window.positions[of_window]
    where[:, WHERE.index("file_row")] = window.file_rows[of_window]
    return Documents(flat, lengths, where)
