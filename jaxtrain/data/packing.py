"""From documents to rows: concatenate, cut, and know where every token came from.

Shapes: N documents, R rows of one block, T tokens of a row (seq_len), P pieces: parts of documents within rows.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from jaxtrain.data.windows import Position
from jaxtrain.interfaces import BATCH_FIELDS, RECORDS, Batch


@dataclasses.dataclass(frozen=True)
class Documents:
    """Tokenized documents in reading order, each closed by an end-of-document token.

    tokens: int32 [sum of lengths]. lengths: int64 [N], none is 0. where: int64 [N, WHERE].
    records: uint8 [sum of lengths, W], what else is known of each token; None for nothing.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    where: np.ndarray
    records: np.ndarray | None = None


# The documents of a row: (file, row in the file, first token, end token) of each, tokens counted from its first.
Pieces = list[tuple[int, int, int, int]]

# Columns of `Documents.where`: the fields of the document's Position, its file (number in the listing), its row there.
WHERE = ("epoch", "unit", "row", "base", "file", "file_row")
_POSITION = WHERE.index("file")  # columns before this one
# Up to so many pieces of a block are written one by one, in a microsecond each; calls for any number cost 30.
_FEW_PIECES = 32


@dataclasses.dataclass
class Counts:
    """What a lane has drawn from a source. `tokens`: trained on, overlap each time; `unique`: overlap once."""

    documents: int = 0
    tokens: int = 0
    unique: int = 0


def empty_block(rows: int, seq_len: int, width: int = 0) -> Batch:
    """Arrays for BATCH_FIELDS, [R, T], and for RECORDS if they have a width, with anything in them."""
    block = {name: np.empty((rows, seq_len), bool if name == "loss_mask" else np.int32) for name in BATCH_FIELDS}
    return {**block, RECORDS: np.empty((rows, seq_len, width), np.uint8)} if width else block


class Packer:
    """Cuts a stream of documents into rows. Its state is the cursor (`position`, `token`), `seen` and `counts`.

    The cursor is the next row's first token; at the end of the stream, of which no token is left from there on, it is
    `end`. `seen`: tokens from the cursor on that earlier rows have had already.
    """

    def __init__(
        self,
        documents: Iterator[Documents],
        position: Position,
        token: int,
        seen: int,
        counts: Counts,
        end: Position | None = None,
        skips: bool = False,
        width: int = 0,
    ):
        """skips: the document that the cursor stands in may be given up since (skips.py); the next one follows then.

        width: of the documents' records; 0 for none.
        """
        self._documents = documents
        self._skip = token  # of the first document to come
        self._tokens = np.empty(0, np.int32)
        # Offset of each document's first token in the buffer; of the first document it may be below 0.
        self._starts = np.empty(0, np.int64)
        self._where = np.empty((0, len(WHERE)), np.int64)
        self._records = np.empty((0, width), np.uint8) if width else None
        self._position, self._token = position, token
        self._end = end
        self._skips = skips
        self.seen = seen
        self.counts = counts
        self.ended = position == end

    @property
    def cursor(self) -> tuple[Position, int]:
        return self._position, self._token

    def _fill(self, needed: int) -> None:
        """Have `needed` tokens in the buffer, or all that are left."""
        have = len(self._tokens)
        if have >= needed:
            return
        tokens, starts, where, records = [self._tokens], [self._starts], [self._where], [self._records]
        while have < needed:
            documents = next(self._documents, None)
            if documents is None:
                break
            if not len(documents.lengths):
                continue
            found = Position(*documents.where[0, :_POSITION].tolist())
            if self._skip and self._skips and found > self._position:
                # How many of the tokens that were had already belong to the next documents, nobody knows any more.
                self._skip = self.seen = 0
            ends = have - self._skip + np.cumsum(documents.lengths)
            if self._skip:
                assert found == self._position, f"the document at {self._position} is gone; next is {found}"
                assert self._skip < documents.lengths[0], f"the document at {found} is shorter than it was"
            tokens.append(documents.tokens[self._skip :])
            records.append(None if documents.records is None else documents.records[self._skip :])
            starts.append(ends - documents.lengths)
            where.append(documents.where)
            self._skip = 0
            have = int(ends[-1])
        if len(tokens) > 1:
            self._tokens, self._starts = np.concatenate(tokens), np.concatenate(starts)
            self._where = np.concatenate(where)
            if self._records is not None:
                self._records = np.concatenate([some for some in records if some is not None])

    def take(
        self,
        rows: int,
        seq_len: int,
        stride: int,
        document_mask: bool,
        counted: int | None = None,
        block: Batch | None = None,
    ) -> Batch:
        """The next `rows` rows, `stride` (1 to seq_len) tokens apart; past the end of the stream is padding.

        Fields: see interfaces.BATCH_FIELDS, [R, T]. A row's last target is looked up past its end, not consumed. With
        document_mask a document's last token has no loss, since its target would be another document's first; without
        it a row is one segment. counted: how many of the rows' tokens are trained on, row by row; None: all of them.

        block: what to write to and return, each field contiguous; None for a new one. A lane writes to its place in the
        host's batch, so that no token is copied twice.
        """
        width = 0 if self._records is None else self._records.shape[1]
        block = empty_block(rows, seq_len, width) if block is None else block
        span = (rows - 1) * stride + seq_len
        self._fill(span + 1)
        have = len(self._tokens)
        tokens = self._tokens[: span + 1]
        if have <= span:
            tokens = np.concatenate([tokens, np.zeros(span + 1 - have, np.int32)])
        block["tokens"][...] = _cut(tokens[:-1], rows, seq_len, stride)
        block["targets"][...] = _cut(tokens[1:], rows, seq_len, stride)
        if self._records is not None:
            _write_records(self._records, stride, block[RECORDS])
        block["loss_mask"][...] = True
        last = _write_segments(self._starts if document_mask else self._starts[:0], stride, block)
        block["targets"].reshape(-1)[last] = 0
        block["loss_mask"].reshape(-1)[last] = False
        count = rows * seq_len if counted is None else counted
        if have <= span:
            left_R = have - stride * np.arange(rows)
            _pad(block, left_R)
            there_R = np.clip(left_R, 0, seq_len)
            count = int(np.minimum(there_R, np.clip(count - seq_len * np.arange(rows), 0, seq_len)).sum())
        if counted is not None:
            full, part = divmod(counted, seq_len)
            # The last full row may reach further than a begun one that overlaps it.
            span = max((full - 1) * stride + seq_len if full else 0, full * stride + part if part else 0)
        self._count(span, count)
        self._advance(rows * stride)
        return block

    def addresses(self, rows: int, seq_len: int, stride: int) -> list[Pieces]:
        """The documents in each of the next rows. Call it before `take`."""
        self._fill((rows - 1) * stride + seq_len + 1)
        ends = np.append(self._starts[1:], len(self._tokens))
        found: list[Pieces] = []
        for begin in range(0, rows * stride, stride):
            inside = np.flatnonzero((self._starts < begin + seq_len) & (ends > begin))
            first = np.maximum(begin - self._starts[inside], 0)
            last = np.minimum(begin + seq_len, ends[inside]) - self._starts[inside]
            columns = (*self._where[inside, _POSITION:].T, first, last)
            found.append(list(zip(*(column.tolist() for column in columns), strict=True)))
        return found

    def _count(self, span: int, tokens: int) -> None:
        end = max(min(span, len(self._tokens)), self.seen)
        self.counts.tokens += tokens
        self.counts.unique += end - self.seen
        # `seen` above 0 with a first token at or below it: this document's beginning has been counted.
        self.counts.documents += int(self._starts.searchsorted(end) - self._starts.searchsorted(self.seen))
        self.seen = end

    def _advance(self, count: int) -> None:
        """Move the cursor by `count` tokens and forget what is before it."""
        self.seen = max(self.seen - count, 0)
        if count >= len(self._tokens):
            self._tokens, self._starts, self._where = self._tokens[:0], self._starts[:0], self._where[:0]
            self._records = None if self._records is None else self._records[:0]
            self.ended = True
            if self._end is not None:
                self._position, self._token = self._end, 0
            return
        first = int(self._starts.searchsorted(count, side="right")) - 1
        self._tokens, self._starts, self._where = (
            self._tokens[count:],
            self._starts[first:] - count,
            self._where[first:],
        )
        self._records = None if self._records is None else self._records[count:]
        self._position, self._token = Position(*self._where[0, :_POSITION].tolist()), -int(self._starts[0])


def _cut(tokens: np.ndarray, rows: int, seq_len: int, stride: int) -> np.ndarray:
    """[(rows - 1) · stride + seq_len] → [rows, seq_len], a view."""
    # np.lib.stride_tricks costs 14 microseconds a call, 10 times this.
    return np.ndarray((rows, seq_len), tokens.dtype, tokens, strides=(stride * tokens.itemsize, tokens.itemsize))


def _write_records(records: np.ndarray, stride: int, block: np.ndarray) -> None:
    """records: [tokens left, W]; block: [R, T, W]. Past the end of the stream they are 0."""
    for row, into in enumerate(block):
        found = records[row * stride : row * stride + len(into)]
        into[: len(found)] = found
        into[len(found) :] = 0


def _write_segments(starts: np.ndarray, stride: int, block: Batch) -> np.ndarray:
    """Writes segment_ids and positions [R, T] of rows that are full; returns where in R · T a document's last token is.

    starts: where documents begin, ascending, int64 [N]. Work is in pieces (a row's start to its first document's start,
    or from one document's start to the next); only the lines that make the results touch every token.
    """
    rows, seq_len = block["tokens"].shape
    if stride == seq_len:
        inner = starts[starts.searchsorted(0, side="right") : starts.searchsorted(rows * seq_len, side="right")]
        if len(inner) + rows <= _FEW_PIECES:
            _write_pieces(inner.tolist(), block)
        else:
            _write_repeated(*_pieces_side_by_side(inner, rows, seq_len), block)
        return inner - 1
    begin_P, ordinal_P, last = _pieces(starts, rows, seq_len, stride)
    _write_repeated(begin_P, ordinal_P, block)
    return last


def _write_pieces(inner: list[int], block: Batch) -> None:
    """As `_write_repeated`, of rows that do not overlap, piece by piece. inner: documents' starts behind the first."""
    rows, seq_len = block["tokens"].shape
    segments, positions, up_to = block["segment_ids"].reshape(-1), block["positions"].reshape(-1), _up_to(seq_len)
    begin, segment, row_end = 0, 1, seq_len
    for end in [*inner, rows * seq_len]:
        while begin < end:  # unless a document starts with a row, or behind the block
            to = min(end, row_end)
            segments[begin:to] = segment
            positions[begin:to] = up_to[: to - begin]
            begin, segment = to, segment + 1
            if to == row_end:
                row_end, segment = row_end + seq_len, 1


def _write_repeated(begin_P: np.ndarray, ordinal_P: np.ndarray, block: Batch) -> None:
    """From where pieces begin in the block, ascending from 0, and their numbers within their rows."""
    rows, seq_len = block["tokens"].shape
    lengths_P = np.empty_like(begin_P)
    np.subtract(begin_P[1:], begin_P[:-1], out=lengths_P[:-1])
    lengths_P[-1] = rows * seq_len - begin_P[-1]
    block["segment_ids"].reshape(-1)[...] = (ordinal_P + 1).astype(np.int32).repeat(lengths_P)
    begins = begin_P.astype(np.int32).repeat(lengths_P)
    np.subtract(_up_to(rows * seq_len), begins, out=block["positions"].reshape(-1))


@functools.lru_cache(maxsize=8)
def _up_to(count: int) -> np.ndarray:
    """0 to count - 1. Not to be written to."""
    return np.arange(count, dtype=np.int32)


def _pieces_side_by_side(inner: np.ndarray, rows: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """As `_pieces`, for rows that do not overlap: places in the block are those in the stream. Half the calls."""
    # A document that starts with a row makes no piece of its own; nor does one that starts behind the block.
    begin_P = np.concatenate([np.arange(0, rows * seq_len, seq_len), inner[inner % seq_len != 0]])
    begin_P.sort()
    row_P = begin_P // seq_len
    return begin_P, np.arange(len(begin_P)) - row_P.searchsorted(row_P)


def _pieces(starts: np.ndarray, rows: int, seq_len: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where pieces begin in the block, their numbers within their rows (from 0), and where documents end."""
    begins_R = np.arange(rows) * stride
    first_R = starts.searchsorted(begins_R, side="right")
    end_R = starts.searchsorted(begins_R + seq_len)
    pieces_R = end_R - first_R + 1
    row_P = np.arange(rows).repeat(pieces_R)
    ordinal_P = np.arange(len(row_P)) - (pieces_R.cumsum() - pieces_R).repeat(pieces_R)
    begin_P = row_P * seq_len
    inner = ordinal_P.nonzero()[0]
    begin_P[inner] += starts[first_R[row_P[inner]] + ordinal_P[inner] - 1] - begins_R[row_P[inner]]
    ends_with_row = np.flatnonzero(starts.searchsorted(begins_R + seq_len, side="right") > end_R)
    return begin_P, ordinal_P, np.concatenate([begin_P[inner], (ends_with_row + 1) * seq_len]) - 1


def _pad(block: Batch, left_R: np.ndarray) -> None:
    """Clear what is past the end of the stream. left_R: tokens from each row's first on; the last has no target."""
    past_RT = np.arange(block["tokens"].shape[1]) >= left_R[:, None]
    for name in ("segment_ids", "positions"):
        block[name][past_RT] = 0
    no_target_RT = np.arange(1, block["tokens"].shape[1] + 1) >= left_R[:, None]
    block["loss_mask"][no_target_RT] = False
    block["targets"][no_target_RT] = 0
