"""From a lane's windows of texts to tokenized documents, with a teacher's records if any."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from jaxtrain.data.io.exit_guard import gate
from jaxtrain.data.packing import WHERE, Documents
from jaxtrain.data.source_reader import Position, SourceReader, Window
from jaxtrain.data.token_arrays import TokenArrays
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Tokenizer
from jaxtrain.plan.stable_hash import document_hash

CHUNK_CHARACTERS = 200_000  # tokenized together: enough for threads to share, few enough to finish quickly
CHUNK_TOKENS = 50_000  # about the same, for tokens from a store
# One document in this many is encoded twice: 1 to 2% of the time, where the reference takes 40 times as long.
SAMPLED = 2048
_SAMPLED_BELOW = np.uint64(2**64 // SAMPLED)


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
    windows: Iterator[Window], start: Position, rows: RowSpec, reader: SourceReader, lane: int
) -> Iterator[Documents]:
    """Tokenizes the documents of a lane's windows and attaches their records.

    Args:
        windows: The lane's windows.
        start: The position to start at.
        rows: How documents become rows.
        reader: The source.
        lane: The lane, for messages.

    Yields:
        Chunks of documents.

    Raises:
        UserError: The first epoch has no document with a token. (Held-out documents just end there.)
    """
    records = rows.records.get(reader.name)
    empty = start == Position(0, 0, 0)
    for window in windows:
        at = window.start
        if empty and at.epoch:
            break
        first = start.row if (at.epoch, at.unit) == (start.epoch, start.unit) else 0
        for documents in _tokenized(window, first, rows, reader, records is not None):
            empty = empty and not len(documents.lengths)
            if records is not None:
                file_rows = documents.where[:, WHERE.index("file_row")]
                found = records.read(window.file, file_rows, documents.tokens, documents.lengths)
                documents = dataclasses.replace(documents, records=found)
            yield documents
    if empty:
        reader.refuse(lane)


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], source: str, file: str, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes documents; if the tokenizer has a fast engine, one in `SAMPLED` by its reference, too.

    Args:
        tokenizer: Its attribute `reference`, if any, encodes with the library that defines its ids.
        texts: The documents, N.
        source: The name of their source.
        file: The name of their file.
        rows: Their rows in the file, [N]. The address alone decides whether a document is encoded twice.

    Returns:
        As Tokenizer.encode_batch.

    Raises:
        UserError: The two differ.
    """
    with gate:
        ids, lengths = tokenizer.encode_batch(texts)
        reference = getattr(tokenizer, "reference", None)
        if reference is None:
            return ids, lengths
        ends = lengths.cumsum()
        for index in np.flatnonzero(document_hash(source, file, rows) < _SAMPLED_BELOW).tolist():
            found, (expected, _) = ids[ends[index] - lengths[index] : ends[index]], reference([texts[index]])
            if not np.array_equal(found, expected):
                pairs = zip(found.tolist(), expected.tolist(), strict=False)
                at = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
                raise UserError(
                    f"source {source!r}, file {file}, row {rows[index]}: the tokenizer's fast engine gives other ids "
                    f"than its library. From token {at} on: {found[at : at + 8].tolist()} by the engine, "
                    f"{expected[at : at + 8].tolist()} by the library. Set tokenizer.engine=tokenizers "
                    "(--config.tokenizer.engine=tokenizers). Other documents may differ, too: to be sure, resume from "
                    "a checkpoint from before the engine was used, or start again."
                )
    return ids, lengths


def _tokenized(window: Window, first: int, rows: RowSpec, reader: SourceReader, chunked: bool) -> Iterator[Documents]:
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
    file = reader.source.files[window.file]
    for chunk in _chunks(list(map(len, window.texts)), begin, CHUNK_CHARACTERS):
        ids, lengths = encode(rows.tokenizer, window.texts[chunk], reader.name, file, window.file_rows[chunk])
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
