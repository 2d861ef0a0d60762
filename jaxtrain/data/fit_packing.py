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
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from jaxtrain.data import packing
from jaxtrain.data.packing import WHERE, Counts, Cut, Documents, Forgets, Packer, Spans
from jaxtrain.data.source_reader import Position
from jaxtrain.interfaces import RECORDS, Batch

# The state has one bit per document of the window but the first: 63 bits of an int64. With 256 documents there is half
# the padding (0.3% instead of 0.6% of rows of 2,048, for lengths like the web's), but the first row waits for four
# times the text.
WINDOW = 64

_KEY_BITS = 32  # of a document's number in a key
_FILE = WHERE.index("file")  # the columns before it are those of a Position


class RowPlanner:
    """Plans rows of documents of known lengths. Documents are numbered in reading order.

    Attributes:
        lengths: The documents' lengths.
        spans: Consecutive tokens of a document in a row, or in several rows that they fill: (their first place in the
            block's R · T tokens, the document, its first token there, tokens) of each.
        left: For each row planned so far, its tokens if its last document ends in it, else T + 1; as in `Cut.left`.
        front: The first document that is not used up.
        opened: The document that continues in the next row, and its next token; None if there is none.
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
            opened: The document that continues in the first row, and its next token; None if there is none.
            used: Documents that are used up, all before WINDOW.
            closing: Plan only with documents up to the last that is used up or opened. When they are used up, no gap
                is left.
        """
        self.spans: list[tuple[int, int, int, int]] = []
        self.left: list[int] = []
        self.front = 0
        self.opened = opened
        self.lengths, self._seq_len = lengths, seq_len
        self._stop = max([0, *used, *(opened or ())[:1]]) + 1 if closing else len(lengths)
        self._used = bytearray(len(lengths))
        for document in used:
            self._used[document] = True
        self._known = 0  # documents before this one are used up, opened or in one of these two:
        # Documents that fit into a row, as ascending keys: the length, and then the older of two equals later.
        self._whole: list[int] = []
        self._long: list[int] = []  # documents longer than a row, oldest first
        self._extend()

    @property
    def used(self) -> list[int]:
        """Documents after `front` that are used up."""
        return [n for n in range(self.front + 1, min(self.front + WINDOW, len(self._used))) if self._used[n]]

    def plan(self, rows: int) -> None:
        """Plans `rows` more rows, or as many as the documents suffice for."""
        seq_len, end = self._seq_len, len(self.left) + rows
        while len(self.left) < end and (self.opened is not None or self.front < self._known):
            document, first = self.opened or self._oldest()
            rest = self.lengths[document] - first
            full = min(rest // seq_len, end - len(self.left))
            if full:
                self._place(len(self.left) * seq_len, document, first, full * seq_len)
                self.left += [seq_len + 1] * (full - 1) + [seq_len + (self.opened is not None)]
            else:
                self._row(document, first, rest)

    def _row(self, document: int, first: int, count: int) -> None:
        """Plans a row that begins with the last `count` tokens of a document, fewer than T."""
        place, whole = len(self.left) * self._seq_len, self._whole
        end = place + self._seq_len
        self._place(place, document, first, count)
        place += count
        # The longest document that fits has the last key up to this one.
        while fits := bisect.bisect_right(whole, (end - place) << _KEY_BITS):
            key = whole.pop(fits - 1)
            count = -(-key >> _KEY_BITS)
            document = (count << _KEY_BITS) - key
            self.spans.append((place, document, 0, count))
            self._use_up(document)
            place += count
        if place < end and self._long:
            self._place(place, self._long.pop(0), 0, end - place)
            place = end
        self.left.append(self._seq_len + 1 if self.opened is not None else place - end + self._seq_len)

    def _oldest(self) -> tuple[int, int]:
        """Takes the oldest document from its list. Returns the document and its first token."""
        if self._long and self._long[0] == self.front:
            self._long.pop(0)
        else:
            self._whole.remove((self.lengths[self.front] << _KEY_BITS) - self.front)
        return self.front, 0

    def _place(self, place: int, document: int, first: int, count: int) -> None:
        self.spans.append((place, document, first, count))
        if first + count < self.lengths[document]:
            self.opened = document, first + count
        else:
            self.opened = None
            self._use_up(document)

    def _use_up(self, document: int) -> None:
        self._used[document] = True
        if document == self.front:
            following = self._used.find(0, document)
            self.front = len(self._used) if following < 0 else following
            self._extend()

    def _extend(self) -> None:
        """Adds the documents that are new in the window."""
        end = min(self.front + WINDOW, self._stop)
        opened = None if self.opened is None else self.opened[0]
        new = [n for n in range(self._known, end) if n != opened and not self._used[n]]
        self._long += [n for n in new if self.lengths[n] > self._seq_len]
        self._whole += [(self.lengths[n] << _KEY_BITS) - n for n in new if self.lengths[n] <= self._seq_len]
        self._whole.sort()
        self._known = max(self._known, end)


class FitPacker(Packer):
    """Packs by best fit, or cuts like a Packer. Its state adds `ahead` and `taken` to a Packer's.

    The cursor's document is the oldest that is not used up. `token` is the next token of the document that continues
    in the next row, `ahead` documents after the cursor's. Bit n - 1 of `taken` is set if the n-th document after
    the cursor's is used up. With both 0, the state is a Packer's.

    After a change from "fit" to "concat", rows are fitted from the documents up to the last that is used up or begun,
    until the state is a Packer's. After a change from "concat" to "fit", tokens that overlap would repeat are dropped.
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
        forgets: Forgets | None = None,
    ):
        """Starts at a state. ahead, taken: See the class. The others are as in Packer."""
        super().__init__(documents, position, 0 if ahead else token, seen, counts, end, may_be_skipped, width, forgets)
        self._ahead = (ahead, token) if ahead else None
        self._used = [n for n in range(1, WINDOW) if taken >> n - 1 & 1]

    @property
    def state(self) -> list[int]:
        """The state, in the order of lanes.STATE_FIELDS, of which it lacks the last."""
        epoch, unit, row, token, *rest = super().state
        ahead, token = self._ahead or (0, token)
        return [epoch, unit, row, token, *rest, ahead, sum(1 << n - 1 for n in self._used)]

    def cut(
        self,
        block: Batch,
        stride: int,
        document_mask: bool,
        counted_R: np.ndarray | None = None,
        fit: bool = False,
    ) -> Cut:
        """Like Packer.cut. fit: Whether to pack by best fit; `stride` is then T."""
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
        """Like Packer.addresses. fit: As in `cut`."""
        planned = self._plan(rows, seq_len, fit)
        if not planned.left:
            return super().addresses(rows, seq_len, stride)
        found: list[Spans] = [[] for _ in planned.left]
        for place, document, first, count in planned.spans:
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
        self._fill(1)  # may change the state: see `_forget`
        if not fit and self._ahead is None and not self._used:
            return RowPlanner([], seq_len)
        if self.seen:
            self._fill(self.seen + 1)
            self._advance(self.seen)
        lengths = self._read(rows * seq_len if fit else 0)
        begun = -int(self._starts[0]) if len(self._starts) else 0
        opened = self._ahead or ((0, begun) if begun else None)
        planner = RowPlanner(lengths, seq_len, opened, self._used, closing=not fit)
        planner.plan(rows)
        return planner

    def _forget(self, forgets: Forgets) -> None:
        """See Packer. Documents that are used up are removed, too, as far as the oldest that remains."""
        ahead, begun = self._ahead or (0, 0)
        self._fill(self.seen + 1)
        while len(self._starts) <= max([ahead, *self._used]):
            have = len(self._tokens)
            self._fill(have + 1)
            assert len(self._tokens) > have, f"documents after {self.cursor[0]} are gone"
        gone = forgets(*self._where[:, _FILE:].T)
        left = [n for n in np.flatnonzero(~gone).tolist() if n not in self._used]
        gone[[n for n in self._used if not left or n < left[0]]] = True
        number = (~gone).cumsum() - 1
        self._used = [int(number[n]) for n in self._used if not gone[n]]
        self._ahead = (int(number[ahead]), begun) if ahead and not gone[ahead] else None
        self._remove(gone)
        if self._ahead is not None and not self._ahead[0]:
            self._ahead = None
            self._advance(begun)

    def _read(self, tokens: int) -> list[int]:
        """Reads every document that can be in the window before `tokens` more tokens are used up.

        Returns:
            The lengths of the documents in the buffer.
        """
        self._fill(tokens + 1)
        if (self._ahead or self._used) and self._where[:1, :_FILE].tolist() != [self._position]:
            assert self._may_be_skipped, f"the document at {self.cursor[0]} is gone"
            # It is no longer known which documents are used up. Some may come again, but none is dropped.
            self._ahead, self._used = None, []
        while True:
            have = len(self._tokens)
            lengths = [end - start for start, end in itertools.pairwise([*self._starts.tolist(), have])]
            before = tokens + sum([lengths[n] for n in self._used if n < len(lengths)]) + (self._ahead or (0, 0))[1]
            if len(lengths) >= self._starts.searchsorted(before, side="right") + WINDOW:
                return lengths
            self._fill(have + 1)
            if len(self._tokens) == have:
                return lengths

    def _write(self, planned: RowPlanner, block: Batch, document_mask: bool, counted_R: np.ndarray | None) -> Cut:
        """Writes and counts the planned rows, the first ones of the block."""
        made, seq_len = len(planned.left), block["tokens"].shape[1]
        tokens, targets = (block[name][:made].reshape(-1) for name in ("tokens", "targets"))
        fields: list[tuple[np.ndarray, np.ndarray]] = [(tokens, self._tokens)]
        if self._records is not None:
            fields.append((block[RECORDS][:made].reshape(made * seq_len, -1), self._records))
        for into, _ in fields:
            into[:] = 0
        starts, counts, last = self._starts.tolist(), self.counts, []
        for place, document, first, count in planned.spans:
            source, length = starts[document] + first, planned.lengths[document]
            for into, buffer in fields:
                into[place : place + count] = buffer[source : source + count]
            if first + count == length:
                last.append(place + count - 1)
            if not first and (counted_R is None or place % seq_len < counted_R[place // seq_len]):
                counts.documents += 1
                counts.cut += length > min(count, seq_len)
        # A document that a row cuts continues in the next one.
        targets[:-1] = tokens[1:]
        targets[-1] = 0 if planned.opened is None else self._tokens[starts[planned.opened[0]] + planned.opened[1]]
        left_R = np.array(planned.left)
        counted_R = np.full(made, seq_len) if counted_R is None else counted_R
        given = int(np.minimum(left_R, counted_R).sum())
        counts.tokens += given
        counts.unique += given
        counts.padding += int(counted_R.sum()) - given
        last = np.array(last if document_mask else (), np.int64)
        return Cut(made, last, left_R if min(planned.left) <= seq_len else None)

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
        self._used = [n - planned.front for n in planned.used]
