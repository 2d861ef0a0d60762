"""From documents to rows: concatenate, cut, and track where every token came from.

Each lane cuts its own rows. `finish` adds segments, positions and masks for the host's whole batch at once, in a fifth
of the time of doing it per lane.

Shapes: N documents, R rows of one block, T tokens per row (seq_len), P segments (parts of documents within rows), W
bytes per record.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxtrain.data.source_reader import Position
from jaxtrain.interfaces import BATCH_FIELDS, RECORDS, Batch


@dataclasses.dataclass(frozen=True)
class Documents:
    """Tokenized documents in reading order, each closed by an end-of-document token.

    Attributes:
        tokens: int32 [sum of lengths].
        lengths: int64 [N], all positive.
        where: int64 [N, len(WHERE)], where each document comes from.
        records: uint8 [sum of lengths, W], a teacher's record of each token, or None.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    where: np.ndarray
    records: np.ndarray | None = None


# The documents in a row: (file, row in the file, first token, end token) of each. Tokens count from the document's
# first.
Spans = list[tuple[int, int, int, int]]

# (files, rows in them), int64 [N] each → which of these documents to leave out, bool [N].
Forgets = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Columns of `Documents.where`: the fields of the document's Position, its file (index in the listing), its row there.
WHERE = ("epoch", "unit", "row", "base", "file", "file_row")
_POSITION = WHERE.index("file")  # columns before this one


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where documents end in rows that `Packer.cut` wrote; `finish` derives the other fields from it.

    Attributes:
        rows: R.
        last: The last token of each document, as an index into the block's R · T tokens: int64 [N], in any order.
        left: Tokens from each row's start to the end of the stream, [R]; None if no row reaches the end.
        counted: How many of each row's tokens are trained on, [R]; None for all.
    """

    rows: int
    last: np.ndarray
    left: np.ndarray | None = None
    counted: np.ndarray | None = None


@dataclasses.dataclass
class Counts:
    """What a lane has drawn from a source.

    Attributes:
        documents: Documents begun.
        tokens: Tokens, counting overlap every time it is trained on.
        unique: Tokens, counting overlap once.
        cut: Documents that the row in which they begin does not hold whole.
        padding: Places of rows without a token.
    """

    documents: int = 0
    tokens: int = 0
    unique: int = 0
    cut: int = 0
    padding: int = 0


def empty_block(rows: int, seq_len: int, width: int = 0) -> Batch:
    """Uninitialized arrays for `Packer.cut`.

    Args:
        rows: R.
        seq_len: T.
        width: W; 0 without records.

    Returns:
        tokens and targets, int32 [R, T], and, if there are any, records, uint8 [R, T, W].
    """
    block = {name: np.empty((rows, seq_len), np.int32) for name in ("tokens", "targets")}
    return {**block, RECORDS: np.empty((rows, seq_len, width), np.uint8)} if width else block


class Packer:
    """Cuts a stream of documents into rows. Its state is the cursor (`position`, `token`), `seen` and `counts`.

    The cursor points at the first token of the next row. At the end of the stream, with no token left, it is `end`.

    Attributes:
        seen: Tokens from the cursor on that earlier rows already contained.
        counts: What has been drawn so far.
        ended: Whether the stream has no token left.
    """

    def __init__(
        self,
        documents: Iterator[Documents],
        position: Position,
        token: int,
        seen: int,
        counts: Counts,
        end: Position | None = None,
        may_be_skipped: bool = False,
        width: int = 0,
        forgets: Forgets | None = None,
    ):
        """Starts at a cursor.

        Args:
            documents: The tokenized documents from `position` on.
            position: Position of the cursor's document.
            token: The cursor's token within its document.
            seen: Tokens from the cursor on that earlier rows already contained.
            counts: What has been drawn so far.
            end: Position of the end of the stream; None if it has no end.
            may_be_skipped: Whether the cursor's document may have been skipped since (skipped_files.py), so that the
                next one follows.
            width: W, bytes per record; 0 without records.
            forgets: Documents to leave out that the cursor and `seen` still count, if there are any.
        """
        self._documents = documents
        self._forgets = forgets
        self._skip = token  # tokens to drop from the next document read
        self._tokens = np.empty(0, np.int32)
        # Offset of each document's first token in the buffer; negative if the buffer starts within the first document.
        self._starts = np.empty(0, np.int64)
        self._where = np.empty((0, len(WHERE)), np.int64)
        self._records = np.empty((0, width), np.uint8) if width else None
        self._position, self._token = list(dataclasses.astuple(position)), token
        self._end = end
        self._may_be_skipped = may_be_skipped
        self.seen = seen
        self.counts = counts
        self.ended = position == end

    @property
    def cursor(self) -> tuple[Position, int]:
        """The position and the token of the cursor."""
        return Position(*self._position), self._token

    @property
    def state(self) -> list[int]:
        """The cursor and the counts, in the order of lanes.STATE_FIELDS."""
        (epoch, unit, row, base), counts = self._position, self.counts
        return [
            *(epoch, unit, row, self._token, base, self.seen),
            *(counts.documents, counts.tokens, counts.unique, int(self.ended), counts.cut, counts.padding),
        ]

    def _fill(self, needed: int) -> None:
        """Reads until the buffer holds `needed` tokens, or all that remain."""
        if self._forgets is not None:
            forgets, self._forgets = self._forgets, None
            self._forget(forgets)
            self._documents = _without(self._documents, forgets)
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
            if self._skip and self._may_be_skipped and found > self.cursor[0]:
                # It is no longer known how many of the seen tokens belong to the documents that follow.
                self._skip = self.seen = 0
            ends = have - self._skip + np.cumsum(documents.lengths)
            if self._skip:
                assert found == self.cursor[0], f"the document at {self.cursor[0]} is gone; next is {found}"
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

    def _forget(self, forgets: Forgets) -> None:
        """Removes documents from what the state refers to."""
        self._fill(self.seen + 1)
        self._remove(forgets(*self._where[:, _POSITION:].T))

    def _remove(self, gone: np.ndarray) -> None:
        """Removes documents of the buffer. gone: bool [documents]."""
        if not gone.any():
            return
        begins = np.maximum(self._starts, 0)
        lengths = np.diff(begins, append=len(self._tokens))
        kept = (~gone).repeat(lengths)
        self.seen = int(kept[: self.seen].sum())
        self._tokens, self._where = self._tokens[kept], self._where[~gone]
        self._records = None if self._records is None else self._records[kept]
        begun = 0 if gone[0] else int(self._starts[0])
        self._starts = lengths[~gone].cumsum() - lengths[~gone]
        if len(self._starts):
            self._starts[0] = begun
            self._position, self._token = self._where[0, :_POSITION].tolist(), -begun

    def cut(self, block: Batch, stride: int, document_mask: bool, counted_R: np.ndarray | None = None) -> Cut:
        """Writes the next rows to `block`, padded past the end of the stream. `finish` makes the other fields.

        The target of a row's last token is looked up past the row's end, without consuming it.

        Args:
            block: Arrays as from `empty_block`, each contiguous. A lane writes straight into its place in the host's
                batch, so no token is copied twice.
            stride: Tokens between the starts of consecutive rows, 1 to T.
            document_mask: If True, a document's last token has no loss, since its target would belong to another
                document. If False, each row is one segment.
            counted_R: As `Cut.counted`, for the counts. The caller passes it on to `finish`.

        Returns:
            Where documents end in the rows.
        """
        rows, seq_len = block["tokens"].shape
        span = (rows - 1) * stride + seq_len
        self._fill(span + 1)
        have = len(self._tokens)
        tokens = self._tokens[: span + 1]
        if have <= span:
            tokens = np.concatenate([tokens, np.zeros(span + 1 - have, np.int32)])
        block["tokens"][...] = _rows(tokens[:-1], rows, seq_len, stride)
        block["targets"][...] = _rows(tokens[1:], rows, seq_len, stride)
        if self._records is not None:
            _write_records(self._records, stride, block[RECORDS])
        last = _last_tokens(self._starts if document_mask else self._starts[:0], rows, seq_len, stride)
        left_R = None
        count = places = rows * seq_len if counted_R is None else int(counted_R.sum())
        if counted_R is not None:
            full, part = divmod(count, seq_len)
            # The last full row may reach further than the partial row that overlaps it.
            span = max((full - 1) * stride + seq_len if full else 0, full * stride + part if part else 0)
        if have <= (rows - 1) * stride + seq_len:
            left_R = have - stride * np.arange(rows)
            there_R = np.clip(left_R, 0, seq_len)
            count = int((there_R if counted_R is None else np.minimum(there_R, counted_R)).sum())
        self.counts.tokens += count
        self.counts.padding += places - count
        self._count(span, seq_len, stride)
        self._advance(rows * stride)
        return Cut(rows, last, left_R)

    def addresses(self, rows: int, seq_len: int, stride: int) -> list[Spans]:
        """The documents in each of the next rows. Call it before `cut`."""
        self._fill((rows - 1) * stride + seq_len + 1)
        ends = np.append(self._starts[1:], len(self._tokens))
        found: list[Spans] = []
        for begin in range(0, rows * stride, stride):
            inside = np.flatnonzero((self._starts < begin + seq_len) & (ends > begin))
            first = np.maximum(begin - self._starts[inside], 0)
            last = np.minimum(begin + seq_len, ends[inside]) - self._starts[inside]
            columns = (*self._where[inside, _POSITION:].T, first, last)
            found.append(list(zip(*(column.tolist() for column in columns), strict=True)))
        return found

    def _count(self, span: int, seq_len: int, stride: int) -> None:
        """Counts unique tokens and documents of the next `span` tokens."""
        end = max(min(span, len(self._tokens)), self.seen)
        self.counts.unique += end - self.seen
        # A document that starts before `seen` has already been counted.
        first, stop = self._starts.searchsorted((self.seen, end)).tolist()
        if stop > first:
            ends_N = self._starts[first + 1 : stop + 1]
            if stop == len(self._starts):
                ends_N = np.append(ends_N, len(self._tokens))
            # The first row that holds the document's first token.
            row_N = np.maximum((self._starts[first:stop] + stride - seq_len) // stride, 0)
            self.counts.documents += stop - first
            self.counts.cut += int((ends_N > row_N * stride + seq_len).sum())
        self.seen = end

    def _advance(self, count: int) -> None:
        """Moves the cursor by `count` tokens and drops what lies before it."""
        self.seen = max(self.seen - count, 0)
        if count >= len(self._tokens):
            self._tokens, self._starts, self._where = self._tokens[:0], self._starts[:0], self._where[:0]
            self._records = None if self._records is None else self._records[:0]
            self.ended = True
            if self._end is not None:
                self._position, self._token = list(dataclasses.astuple(self._end)), 0
            return
        first = int(self._starts.searchsorted(count, side="right")) - 1
        self._tokens, self._starts, self._where = (
            self._tokens[count:],
            self._starts[first:] - count,
            self._where[first:],
        )
        self._records = None if self._records is None else self._records[count:]
        self._position, self._token = self._where[0, :_POSITION].tolist(), -int(self._starts[0])


def _without(documents: Iterator[Documents], forgets: Forgets) -> Iterator[Documents]:
    for some in documents:
        gone = forgets(*some.where[:, _POSITION:].T)
        if gone.any():
            kept = (~gone).repeat(some.lengths)
            records = None if some.records is None else some.records[kept]
            some = Documents(some.tokens[kept], some.lengths[~gone], some.where[~gone], records)
        yield some


def _rows(tokens: np.ndarray, rows: int, seq_len: int, stride: int) -> np.ndarray:
    """[(rows - 1) · stride + seq_len] → [rows, seq_len], a view."""
    # np.lib.stride_tricks costs 14 microseconds per call, 10 times as much.
    return np.ndarray((rows, seq_len), tokens.dtype, tokens, strides=(stride * tokens.itemsize, tokens.itemsize))


def _write_records(records: np.ndarray, stride: int, block: np.ndarray) -> None:
    """Writes records [tokens left, W] to block [R, T, W], with zeros past the end of the stream."""
    for row, into in enumerate(block):
        found = records[row * stride : row * stride + len(into)]
        into[: len(found)] = found
        into[len(found) :] = 0


def _last_tokens(starts: np.ndarray, rows: int, seq_len: int, stride: int) -> np.ndarray:
    """Indices into R · T of documents' last tokens. starts: where documents begin, ascending, int64 [N]."""
    if stride == seq_len:
        return starts[starts.searchsorted(0, side="right") : starts.searchsorted(rows * seq_len, side="right")] - 1
    begins_R = np.arange(rows) * stride
    first_R = starts.searchsorted(begins_R, side="right")
    count_R = starts.searchsorted(begins_R + seq_len, side="right") - first_R
    row_N = np.arange(rows).repeat(count_R)
    index_N = np.arange(len(row_N)) + (first_R - count_R.cumsum() + count_R)[row_N]
    return row_N * seq_len + starts[index_N] - begins_R[row_N] - 1


def spread(parts: Sequence[tuple[Cut, np.ndarray]], rows: int, seq_len: int) -> Cut:
    """Merges cuts of some rows each into one cut of all rows.

    Args:
        parts: Each cut with the places of its rows in the block, [its rows]. Together they cover all rows.
        rows: R.
        seq_len: T.

    Returns:
        The cut of the whole block.
    """
    last, left_R = [], np.full(rows, seq_len + 1)
    for cut, place_R in parts:
        row_N, token_N = np.divmod(cut.last, seq_len)
        last.append(place_R[row_N] * seq_len + token_N)
        if cut.left is not None:
            left_R[place_R] = cut.left
    return Cut(rows, np.concatenate(last), left_R if (left_R <= seq_len).any() else None)


def finish(block: Batch, cuts: Sequence[Cut]) -> Batch:
    """Completes a block to all of BATCH_FIELDS. Missing targets become 0.

    Work is per segment (from a row's start to its first document's start, or from one document's start to the next);
    only the final array operations touch every token.

    Args:
        block: What `Packer.cut` wrote.
        cuts: The cuts of the block's rows, in order.

    Returns:
        The completed block.
    """
    rows, seq_len = block["tokens"].shape
    last, first = [], 0
    for cut in cuts:
        last.append(cut.last + first * seq_len)
        first += cut.rows
    assert first == rows, f"cuts of {first} rows for a block of {rows}"
    last_N = np.concatenate(last)
    # A document that starts at a row's start adds no segment to that of the row's start.
    inner_M = last_N[last_N % seq_len != seq_len - 1] + 1
    inner_M.sort()
    inner_row_M = inner_M // seq_len
    count_R = np.bincount(inner_row_M, minlength=rows)
    # Where the segments of row starts and the others are among all P, in order.
    outer_R = np.arange(rows) + count_R.cumsum() - count_R
    inner_P = inner_row_M + np.arange(1, len(inner_M) + 1)
    begin_P = np.empty(rows + len(inner_M) + 1, np.int64)
    begin_P[outer_R] = np.arange(0, rows * seq_len, seq_len)
    begin_P[inner_P] = inner_M
    begin_P[-1] = rows * seq_len
    segment_P = np.ones(rows + len(inner_M), np.int32)
    segment_P[inner_P] += (inner_P - outer_R[inner_row_M]).astype(np.int32)
    length_P = begin_P[1:] - begin_P[:-1]
    positions = begin_P[:-1].astype(np.int32).repeat(length_P)
    np.subtract(_up_to(rows * seq_len), positions, out=positions)
    loss_mask = np.ones(rows * seq_len, bool)
    loss_mask[last_N] = False
    block["targets"].reshape(-1)[last_N] = 0
    made = {"segment_ids": segment_P.repeat(length_P), "positions": positions, "loss_mask": loss_mask}
    block = {**block, **{name: field.reshape(rows, seq_len) for name, field in made.items()}}
    first = 0
    for cut in cuts:
        if cut.left is not None:
            _pad({name: block[name][first : first + cut.rows] for name in BATCH_FIELDS}, cut.left)
        if cut.counted is not None:
            block["loss_mask"][first : first + cut.rows] &= np.arange(seq_len) < cut.counted[:, None]
        first += cut.rows
    return block


@functools.lru_cache(maxsize=8)
def _up_to(count: int) -> np.ndarray:
    """0 to count - 1. Do not write to it."""
    return np.arange(count, dtype=np.int32)


def _pad(block: Batch, left_R: np.ndarray) -> None:
    """Clears everything past the end of rows. The last token before it has no target.

    left_R: Tokens from each row's start to the end of the stream.
    """
    seq_len = block["tokens"].shape[1]
    row_R = np.flatnonzero(left_R <= seq_len)
    left_R = np.maximum(left_R[row_R], 0)
    past_R = seq_len - left_R
    # Each place past a row's end, as an index into R · T.
    past = np.arange(past_R.sum()) + (row_R * seq_len + left_R - past_R.cumsum() + past_R).repeat(past_R)
    last = (row_R * seq_len + left_R - 1)[left_R > 0]
    for name in ("segment_ids", "positions", "loss_mask", "targets"):
        field = block[name].reshape(-1)
        field[past] = 0
        if name in ("loss_mask", "targets"):
            field[last] = 0
