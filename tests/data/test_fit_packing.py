"""Rows by best fit against one document at a time, from every state, in turns with rows that are cut."""

import itertools
import random

import numpy as np
import pytest

from jaxtrain.data import fit_packing, packing
from jaxtrain.data.fit_packing import FitPacker
from jaxtrain.data.lanes import STATE_FIELDS
from jaxtrain.data.packing import Counts
from jaxtrain.data.source_reader import Position
from jaxtrain.interfaces import BATCH_FIELDS, RECORDS, Batch
from tests.data.test_packing import END, pieces, stream


def packer(lengths: list[int], each: int = 3) -> FitPacker:
    return FitPacker(pieces(lengths, each), Position(0, 0, 0), 0, 0, Counts(), END, width=4)


def take(found: FitPacker, rows: int, seq_len: int, document_mask: bool = True, stride: int | None = None) -> Batch:
    """The next rows, with all fields; by best fit, or cut if a stride is given."""
    block = packing.empty_block(rows, seq_len, 4)
    return packing.finish(block, [found.cut(block, stride or seq_len, document_mask, fit=stride is None)])


def resumed(lengths: list[int], old: FitPacker, skipped: int = 0) -> FitPacker:
    """A packer from the state of another, as a checkpoint keeps it. skipped: documents that are gone."""
    saved = dict(zip(STATE_FIELDS[:-1], np.array(old.state, np.int64).tolist(), strict=True))
    position = Position(saved["epoch"], saved["unit"], saved["row"], saved["base"])
    counts = Counts(*(saved[name] for name in ("documents", "tokens", "unique", "cut", "padding")))
    documents = iter(()) if position == END else pieces(lengths, 2, position.row + skipped)
    return FitPacker(
        documents,
        position,
        saved["token"],
        saved["seen"],
        counts,
        END,
        bool(skipped),
        4,
        saved["ahead"],
        saved["taken"],
    )


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("window", [2, 5, 64])
@pytest.mark.parametrize("seed", range(20))
def test_rows_counts_and_states(seed, window, mask, monkeypatch):
    monkeypatch.setattr(fit_packing, "WINDOW", window)
    rng = random.Random(seed)
    lengths = rng.choices([1, 2, 3, 8, 30], k=rng.randint(0, 90))
    slow, fast = stream(lengths), packer(lengths, rng.choice([1, 3, 100]))
    changes = rng.random() < 0.7
    seq_len, fit = rng.choice([2, 5, 16, 40]), True
    for _ in range(16):
        if changes:
            seq_len, fit = rng.choice([1, 2, 5, 16, 40]), rng.random() < 0.6
        stride, rows = seq_len if fit else rng.randint(1, seq_len), rng.randint(1, 4)
        counted_R = np.array([rng.randint(0, seq_len) for _ in range(rows)]) if rng.random() < 0.1 else None
        named = fast.addresses(rows, seq_len, stride, fit)
        block = packing.empty_block(rows, seq_len, 4)
        block = packing.finish(block, [fast.cut(block, stride, mask, counted_R, fit)])
        wanted = [
            slow.row(seq_len, stride, mask, None if counted_R is None else counted_R[row], fit) for row in range(rows)
        ]
        for name in BATCH_FIELDS:
            np.testing.assert_array_equal(block[name], np.array([row[name] for row in wanted]), err_msg=name)
        there = block["segment_ids"] > 0
        np.testing.assert_array_equal(block[RECORDS].view(np.int32)[..., 0], np.where(there, block["tokens"], 0))
        for row, spans in enumerate(named):
            tokens = [100 * number + token for _, number, first, end in spans for token in range(first, end)]
            assert tokens == block["tokens"][row][there[row]].tolist()
        if counted_R is not None:  # only a run's last batch is
            return
        assert fast.counts == Counts(*slow.counts)
        assert fast.ended == slow.ended
        if rng.random() < 0.5:
            fast = resumed(lengths, fast)
            assert fast.ended == slow.ended


@pytest.mark.parametrize("seq_len", [4, 16, 50])
def test_only_documents_longer_than_a_row_are_cut(seq_len):
    rng = random.Random(seq_len)
    lengths = [rng.choice([1, 2, 5, 9, 16, 33]) for _ in range(2000)]
    found, rows = packer(lengths, 50), []
    while not found.ended:
        rows += found.addresses(1, seq_len, seq_len, True)
        take(found, 1, seq_len)
    spans = sorted((number, first, end) for row in rows for _, number, first, end in row)
    for number, group in itertools.groupby(spans, lambda span: span[0]):
        parts = [(first, end) for _, first, end in group]
        assert [first for first, _ in parts] == [0, *(end for _, end in parts[:-1])]
        assert parts[-1][1] == lengths[number]
        assert len(parts) == 1 or lengths[number] > seq_len
    assert len({number for number, _, _ in spans}) == len(lengths)
    long = sum(length > seq_len for length in lengths)
    assert found.counts == Counts(len(lengths), sum(lengths), sum(lengths), long, found.counts.padding)
    assert found.counts.padding < 0.02 * sum(lengths)


def test_the_rule_in_small():
    """The oldest document first, then the longest that fits; a document longer than a row fills what is left."""
    found = packer([3, 9, 4, 1, 2, 4])
    assert take(found, 4, 8)["tokens"].tolist() == [
        [0, 1, 2, 200, 201, 202, 203, 300],
        [100, 101, 102, 103, 104, 105, 106, 107],
        [108, 500, 501, 502, 503, 400, 401, 0],
        [0] * 8,
    ]
    found = packer([3, 19, 6])
    first = take(found, 1, 8)
    assert first["tokens"].tolist() == [[0, 1, 2, 100, 101, 102, 103, 104]]
    assert first["targets"].tolist() == [[1, 2, 0, 101, 102, 103, 104, 105]]
    assert found.state[3:5] == [5, 0]  # now the oldest: the next token is its sixth
    assert found.state[-2:] == [0, 0]
    rest = take(found, 2, 8)
    assert rest["tokens"].tolist() == [[*range(105, 113)], [*range(113, 119), 0, 0]]
    assert rest["segment_ids"][1].tolist() == [1] * 6 + [0] * 2


def test_state_of_a_document_that_was_begun_early():
    found = packer([3, 6, 19, 5, 6])
    take(found, 1, 8)  # 0 and 3
    assert found.state[-2:] == [0, 0b10]
    found = resumed([3, 6, 19, 5, 6], found)
    take(found, 1, 8)  # 1 and the first two tokens of 2
    assert (found.state[2], found.state[3], found.state[-2:]) == (2, 2, [0, 0b1])
    found = packer([3, 6, 6, 19])
    take(found, 1, 8)  # 0 and the first five tokens of 3
    assert (found.state[2], found.state[3], found.state[-2:]) == (1, 5, [2, 0])
    found = resumed([3, 6, 6, 19], found)
    assert take(found, 1, 8)["tokens"].tolist() == [[*range(305, 313)]]


def test_no_document_is_lost_when_the_oldest_is_skipped():
    """After a file was given up, documents that were taken out of order may come again."""
    lengths = [6, 6, 3, 2, 2, 6]
    found = packer(lengths)
    assert take(found, 1, 8)["tokens"].tolist() == [[*range(6), 300, 301]]
    found = resumed(lengths, found, skipped=1)
    tokens = {token for row in take(found, 4, 8)["tokens"].tolist() for token in row}
    assert {200, 300, 400, 500} <= tokens
    lengths = [19, 6, 3, 2, 6]
    found = packer(lengths)
    take(found, 1, 8)
    found = resumed(lengths, found, skipped=1)
    assert take(found, 1, 8)["tokens"].tolist() == [[*range(100, 106), 300, 301]]
    lengths = [6, 6, 3, 2, 2, 6]
    found = packer(lengths)
    take(found, 1, 8)
    gone = resumed(lengths, found)
    gone._documents = pieces(lengths, 2, 2)
    with pytest.raises(AssertionError, match="is gone"):
        take(gone, 1, 8)


def test_memory_is_bounded():
    found = packer([7] * 9000, each=10)
    for _ in range(1000):
        take(found, 2, 15)
        assert len(found._tokens) <= 7 * (2 * fit_packing.WINDOW + 20)
        assert len(found._starts) == len(found._where) <= 2 * fit_packing.WINDOW + 20
