"""Whole documents into rows, by best fit: only documents longer than a row are cut.

Rows are made one after the other from a window, the first `WINDOW` documents that are left:

1. A row begins with the rest of the document that the previous row cut, else with the oldest document.
2. While there is room, the row takes the longest document that fits, the oldest of equals.
3. If none fits, the oldest document longer than a row fills the room. Its rest begins the next row.
4. If there is none, the rest of the row is padding.

A row depends only on which tokens are left, not on how earlier rows were packed. So the state is small, and the row
length may change between any two rows. Step 3 cuts no document that would otherwise stay whole.

Ding et al. 2024, "Fewer truncations improve language modeling", pack a whole dataset by best fit.
"""

import bisect
import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxtrain.data import packing
from jaxtrain.data.packing import WHERE, Counts, Cut, Documents, Packer, Spans
from jaxtrain.data.source_reader import Position
from jaxtrain.interfaces import RECORDS, Batch

# The state has one bit per document of the window but the first: 63 bits of an int64. With 256 documents there is half
# the padding (0.3% instead of 0.6% of rows of 2,048, for lengths like the web's), but the first row waits for four
# times the text.
WINDOW = 64

_FILE = WHERE.index("file")  # the columns before it are those of a Position


class Piece(NamedTuple):
    """Consecutive tokens of a document in a row, or in several rows that it fills.

    Attributes:
        place: Where the tokens begin, as an index into the block's R · T tokens.
        document: The document, as an index into the packer's buffer.
        first: The first token, counted from the document's start.
        count: The number of tokens.
    """

    place: int
    document: int
    first: int
    count: int


class RowPlanner:
    """Plans rows of documents of known lengths. Documents are numbered in reading order.

    Attributes:
        pieces: The contents of the rows planned so far.
        left: For each of these rows, its tokens if its last document ends in it, else T + 1; as in `Cut.left`.
        front: The first document that is not used up.
        opened: The document that goes on in the next row, and its next token; None if there is none.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seq_len: int,
        opened: tuple[int, int] | None = None,
        used: Sequence[int] = (),
        closing: bool = False,
    ):
        """Starts at a state.

        Args:
            lengths: The documents' lengths. The first document is not used up.
            seq_len: T.
            opened: The document that goes on in the first row, and its next token; None if there is none.
            used: Documents that are used up, all before WINDOW.
            closing: Plan only until no used or opened document comes after one that is neither, and only with
                documents up to the last of these.
        """
        self.pieces: list[Piece] = []
        self.left: list[int] = []
        self.front = 0
        self.opened = opened
        self._lengths, self._seq_len = lengths, seq_len
        self._closing = closing
        self._stop = max([0, *used, *(opened or ())[:1]]) + 1 if closing else len(lengths)
        self._used = bytearray(len(lengths))
        for document in used:
            self._used[document] = True
        self._known = 0  # documents before this one are used up, opened or in one of these two:
        self._whole: list[int] = []  # documents that fit into a row, as keys in ascending order
        self._long: list[int] = []  # documents longer than a row, oldest first
        self._extend()

    @property
    def used(self) -> list[int]:
        """Documents after `front` that are used up."""
        return [n for n in range(self.front + 1, min(self.front + WINDOW, len(self._used))) if self._used[n]]

    @property
    def has_gaps(self) -> bool:
        """Whether a used or opened document comes after one that is neither."""
        return (self.opened is not None and self.opened[0] > self.front) or self._used.find(1, self.front) >= 0

    def plan(self, rows: int) -> None:
        """Plans `rows` more rows, or as many as the documents are enough for."""
        end = len(self.left) + rows
        while len(self.left) < end and (self.opened is not None or self.front < self._known):
            if self._closing and not self.has_gaps:
                return
            document, first = self.opened or self._oldest()
            rest = self._lengths[document] - first
            full = min(rest // self._seq_len, end - len(self.left))
            if full:
                self._place(len(self.left) * self._seq_len, document, first, full * self._seq_len)
                self.left += [self._seq_len + 1] * (full - 1) + [self._seq_len + (self.opened is not None)]
            else:
                self._row(document, first, rest)

    def _row(self, document: int, first: int, count: int) -> None:
        """Plans a row that begins with a document's last `count` tokens."""
        room = self._seq_len
        place = len(self.left) * room
        while count:
            self._place(place, document, first, count)
            place, room, first, count = place + count, room - count, 0, 0
            fits = bisect.bisect_right(self._whole, _key(room, 0))
            if fits:
                count, document = _length_and_document(self._whole.pop(fits - 1))
            elif room and self._long:
                count, document = room, self._long.pop(0)
        self.left.append(self._seq_len + 1 if self.opened is not None else self._seq_len - room)

    def _oldest(self) -> tuple[int, int]:
        """Takes the oldest document from its list. Returns the document and its first token."""
        if self._long and self._long[0] == self.front:
            self._long.pop(0)
        else:
            self._whole.remove(_key(self._lengths[self.front], self.front))
        return self.front, 0

    def _place(self, place: int, document: int, first: int, count: int) -> None:
        self.pieces.append(Piece(place, document, first, count))
        if first + count < self._lengths[document]:
            self.opened = document, first + count
            return
        self.opened = None
        self._used[document] = True
        if document == self.front:
            following = self._used.find(0, document)
            self.front = len(self._used) if following < 0 else following
            self._extend()

    def _extend(self) -> None:
        """Adds the documents that are new in the window."""
        end = min(self.front + WINDOW, self._stop)
        opened = None if self.opened is None else self.opened[0]
        for document in range(self._known, end):
            if document != opened and not self._used[document]:
                if self._lengths[document] > self._seq_len:
                    self._long.append(document)
                else:
                    bisect.insort(self._whole, _key(self._lengths[document], document))
        self._known = max(self._known, end)


def _key(length: int, document: int) -> int:
    """Orders documents by length, and the older of two equals after the other."""
    return (length << 32) - document


def _length_and_document(key: int) -> tuple[int, int]:
    length = -(-key >> 32)
    return length, (length << 32) - key


class FitPacker(Packer):
    """Packs by best fit, or cuts as any Packer. Its state adds `ahead` and `taken` to a Packer's.

    The cursor's document is the oldest that is not used up. `token` is the next token of the document that goes on in
    the next row, which is `ahead` documents after the cursor's. Bit n - 1 of `taken` says that the n-th document after
    the cursor's is used up. With both 0, the state is a Packer's.

    After a change from "fit" to "concat", rows are fitted from the documents up to the last that is used up or begun,
    until the state is a Packer's. After a change from "concat" to "fit", the tokens that overlap would repeat are left
    out.
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
        ahead: int = 0,
        taken: int = 0,
    ):
        """Starts at a state. ahead, taken: see the class. The others are as in Packer."""
        super().__init__(documents, position, 0 if ahead else token, seen, counts, end, may_be_skipped, width)
        self._ahead = (ahead, token) if ahead else None
        self._taken = taken

    @property
    def state(self) -> list[int]:
        """The state, in the order of lanes.STATE_FIELDS."""
        epoch, unit, row, token, *rest = super().state
        ahead, token = self._ahead or (0, token)
        return [epoch, unit, row, token, *rest, ahead, self._taken]

    def cut(
        self,
        block: Batch,
        stride: int,
        document_mask: bool,
        counted_R: np.ndarray | None = None,
        fit: bool = False,
    ) -> Cut:
        """As Packer.cut. fit: Whether to pack by best fit; `stride` is then T."""
        rows, seq_len = block["tokens"].shape
        planned = self._plan(rows, seq_len, fit)
        made = len(planned.left)
        if not made:
            return super().cut(block, stride, document_mask, counted_R)
        cut = self._write(planned, block, document_mask, None if counted_R is None else counted_R[:made])
        self._move(planned)
        if made == rows:
            return cut
        # Either the stream ends here, or no gap is left for a change to "concat".
        block = {name: field[made:] for name, field in block.items()}
        rest = super().cut(block, stride, document_mask, None if counted_R is None else counted_R[made:])
        return packing.spread([(cut, np.arange(made)), (rest, np.arange(made, rows))], rows, seq_len)

    def addresses(self, rows: int, seq_len: int, stride: int, fit: bool = False) -> list[Spans]:
        """As Packer.addresses. fit: as in `cut`."""
        planned = self._plan(rows, seq_len, fit)
        if not planned.left:
            return super().addresses(rows, seq_len, stride)
        found: list[Spans] = [[] for _ in planned.left]
        for place, document, first, count in planned.pieces:
            file, file_row = self._where[document, _FILE:].tolist()
            for begin in range(0, count, seq_len):  # more than one row only if each is full
                span = (file, file_row, first + begin, first + min(begin + seq_len, count))
                found[(place + begin) // seq_len].append(span)
        rest = rows - len(found)
        if rest:
            self._fill(self._used_tokens(planned) + (rest - 1) * stride + seq_len + 1)
            after = copy.copy(self)
            after._move(planned)
            found += Packer.addresses(after, rest, seq_len, stride)
        return found

    def _plan(self, rows: int, seq_len: int, fit: bool) -> RowPlanner:
        """Plans the next rows that are packed by best fit."""
        if not fit and self._ahead is None and not self._taken:
            return RowPlanner([], seq_len)
        if self.seen:
            self._fill(self.seen + 1)
            self._advance(self.seen)
        used = [n for n in range(1, WINDOW) if self._taken >> n - 1 & 1]
        lengths = self._read(rows * seq_len if fit else 0, used)
        if not self._taken:
            used = []
        opened = self._ahead or ((0, self._token) if self._token else None)
        planner = RowPlanner(lengths, seq_len, opened, used, closing=not fit)
        planner.plan(rows)
        return planner

    def _read(self, tokens: int, used: list[int]) -> list[int]:
        """Reads all documents that can be in the window until `tokens` tokens are used up.

        Args:
            tokens: Tokens of the next rows.
            used: Documents that are already used up.

        Returns:
            The lengths of the documents in the buffer.
        """
        self._fill(tokens + 1)
        if (self._ahead or self._taken) and self._where[:1, :_FILE].tolist() != [self._position]:
            assert self._may_be_skipped, f"the document at {self.cursor[0]} is gone"
            # It is no longer known which documents `taken` means. Some may come again, but none is left out.
            self._ahead, self._taken, used = None, 0, []
        while True:
            have = len(self._tokens)
            lengths = np.diff(self._starts, append=have)
            before = tokens + int(lengths[[n for n in used if n < len(lengths)]].sum()) + (self._ahead or (0, 0))[1]
            if len(lengths) < int(self._starts.searchsorted(before, side="right")) + WINDOW:
                self._fill(have + 1)
            if len(self._tokens) == have:
                return lengths.tolist()

    def _write(self, planned: RowPlanner, block: Batch, document_mask: bool, counted_R: np.ndarray | None) -> Cut:
        """Writes and counts the planned rows, the first ones of the block."""
        made, seq_len = len(planned.left), block["tokens"].shape[1]
        tokens, targets = (block[name][:made].reshape(-1) for name in ("tokens", "targets"))
        tokens[:] = 0
        starts = self._starts.tolist()
        ends_N = np.append(self._starts[1:], len(self._tokens))
        for place, document, first, count in planned.pieces:
            source = starts[document] + first
            tokens[place : place + count] = self._tokens[source : source + count]
            following = self._tokens[source + 1 : source + count + 1]
            targets[place : place + len(following)] = following
        if self._records is not None:
            records = block[RECORDS][:made].reshape(made * seq_len, -1)
            records[:] = 0
            for place, document, first, count in planned.pieces:
                source = starts[document] + first
                records[place : place + count] = self._records[source : source + count]
        place_P, document_P, first_P, count_P = np.array(planned.pieces).T
        length_P = (ends_N - self._starts)[document_P]
        last = (place_P + count_P - 1)[first_P + count_P == length_P]
        left_R = np.array(planned.left)
        if not document_mask:
            # The next document of the row follows; `left` masks the last token of a row.
            inner = last[last + 1 < len(tokens)]
            targets[inner] = tokens[inner + 1]
            last = last[:0]
        counted_R = np.full(made, seq_len) if counted_R is None else counted_R
        given = int(np.minimum(np.minimum(left_R, seq_len), counted_R).sum())
        begun_P = (first_P == 0) & (place_P % seq_len < counted_R[place_P // seq_len])
        self.counts.tokens += given
        self.counts.unique += given
        self.counts.padding += int(counted_R.sum()) - given
        self.counts.documents += int(begun_P.sum())
        self.counts.cut += int((begun_P & (length_P > np.minimum(count_P, seq_len))).sum())
        return Cut(made, last, left_R if (left_R <= seq_len).any() else None)

    def _used_tokens(self, planned: RowPlanner) -> int:
        """Tokens of the buffer that lie before the cursor after the planned rows."""
        if planned.front == len(self._starts):
            return len(self._tokens)
        opened = planned.opened if planned.opened is not None and planned.opened[0] == planned.front else (0, 0)
        return int(self._starts[planned.front]) + opened[1]

    def _move(self, planned: RowPlanner) -> None:
        """Moves the cursor past the planned rows."""
        self._advance(self._used_tokens(planned))
        self._ahead = None
        if planned.opened is not None and planned.opened[0] > planned.front:
            self._ahead = planned.opened[0] - planned.front, planned.opened[1]
        self._taken = sum(1 << n - planned.front - 1 for n in planned.used)
