"""Rows of documents against one token at a time, at every edge, and from every cursor."""

import dataclasses
import random
from collections.abc import Iterator

import numpy as np
import pytest

from jaxtrain.data import packing
from jaxtrain.data.packing import WHERE, Counts, Cut, Documents, Packer
from jaxtrain.data.source_reader import Position
from jaxtrain.interfaces import BATCH_FIELDS, RECORDS, Batch
from tests.data.reference import LaneStream

END = Position(1, 0, 0)


def pieces(lengths: list[int], each: int, skip: int = 0) -> Iterator[Documents]:
    """Documents in chunks of `each`; token t of document d is 100 d + t, and its row is d."""
    for first in range(skip, len(lengths), each):
        part = lengths[first : first + each]
        tokens = [100 * (first + index) + token for index, length in enumerate(part) for token in range(length)]
        where = np.zeros((len(part), len(WHERE)), np.int64)
        where[:, WHERE.index("row")] = where[:, WHERE.index("file_row")] = range(first, first + len(part))
        where[:, WHERE.index("file")] = 7
        flat = np.array(tokens, np.int32)
        yield Documents(flat, np.array(part, np.int64), where, flat[:, None].view(np.uint8))


def packer(lengths: list[int], each: int = 3) -> Packer:
    return Packer(pieces(lengths, each), Position(0, 0, 0), 0, 0, Counts(), END, width=4)


def take(found: Packer, rows: int, seq_len: int, stride: int, document_mask: bool) -> Batch:
    """The next rows, with all fields."""
    block = packing.empty_block(rows, seq_len, 4)
    return packing.finish(block, [found.cut(block, stride, document_mask)])


def counting(cut: Cut, counted: np.ndarray | None) -> Cut:
    return dataclasses.replace(cut, counted=counted)


def resumed(lengths: list[int], old: Packer) -> Packer:
    position, token = old.cursor
    documents = iter(()) if position == END else pieces(lengths, 2, position.row)
    return Packer(documents, position, token, old.seen, Counts(**vars(old.counts)), END, width=4)


def stream(lengths: list[int]) -> LaneStream:
    found = LaneStream([], [])
    for number, length in enumerate(lengths):
        found.tokens += [100 * number + token for token in range(length)]
        found.owners += [number] * length
    return found


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_rows_counts_and_cursors(seed, mask):
    rng = random.Random(seed)
    lengths = rng.choices([1, 2, 3, 8, 30], k=rng.randint(0, 40))
    slow, fast = stream(lengths), packer(lengths, rng.choice([1, 3, 100]))
    for _ in range(12):
        seq_len = rng.choice([1, 2, 5, 16, 40])
        stride = rng.randint(1, seq_len)
        rows = rng.randint(1, 4)
        block = take(fast, rows, seq_len, stride, mask)
        wanted = [slow.row(seq_len, stride, mask) for _ in range(rows)]
        for name in BATCH_FIELDS:
            np.testing.assert_array_equal(block[name], np.array([row[name] for row in wanted]), err_msg=name)
            assert block[name].dtype == (bool if name == "loss_mask" else np.int32)
        there = block["segment_ids"] > 0
        np.testing.assert_array_equal(block[RECORDS].view(np.int32)[..., 0], np.where(there, block["tokens"], 0))
        assert fast.counts == Counts(*slow.counts)
        assert fast.ended == slow.ended
        if fast.ended:
            assert fast.cursor == (END, 0)
        else:
            position, token = fast.cursor
            assert 100 * position.row + token == slow.tokens[slow.left[0][0]]
        if rng.random() < 0.5:
            fast = resumed(lengths, fast)
            assert fast.ended == slow.ended


def test_a_stream_that_ends_with_a_row():
    found = packer([4, 4])
    block = take(found, 2, 4, 4, False)
    assert block["loss_mask"].tolist() == [[True] * 4, [True] * 3 + [False]]
    assert found.ended
    assert found.cursor == (END, 0)
    assert not take(found, 1, 4, 4, False)["segment_ids"].any()
    assert found.counts == Counts(2, 8, 8, 0, 4)


def test_one_token_left_is_a_row_without_a_loss():
    found = packer([4, 5])
    take(found, 2, 4, 4, False)
    assert not found.ended
    block = take(found, 1, 4, 4, False)
    assert block["tokens"].tolist() == [[104, 0, 0, 0]]
    assert block["segment_ids"].tolist() == [[1, 0, 0, 0]]
    assert not block["loss_mask"].any()
    assert found.ended
    assert found.counts.unique == 9


def test_a_document_that_has_changed_is_noticed():
    for documents, message in ((pieces([2, 4], 3), "shorter than it was"), (pieces([9, 9], 3, 1), "is gone")):
        with pytest.raises(AssertionError, match=message):
            take(Packer(documents, Position(0, 0, 0), 5, 0, Counts()), 1, 2, 2, True)


def test_addresses_name_every_token():
    lengths = [3, 1, 9, 2, 30]
    found = packer(lengths)
    for _ in range(4):
        wanted = found.addresses(3, 6, 5)
        block = take(found, 3, 6, 5, True)
        for row, documents in enumerate(wanted):
            tokens = [100 * number + token for file, number, a, b in documents for token in range(a, b) if file == 7]
            assert tokens == block["tokens"][row][block["segment_ids"][row] > 0].tolist()


def test_memory_is_bounded():
    found = packer([7] * 3000, each=10)
    for _ in range(1000):
        take(found, 2, 5, 5, True)
        assert len(found._tokens) <= 70 + 11
        assert len(found._starts) == len(found._where) <= 12


def test_rows_side_by_side_are_cut_as_any_others():
    """The fast path to the last tokens, for rows without overlap, against the path for any stride."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        rows, seq_len = int(rng.integers(1, 6)), int(rng.integers(1, 12))
        starts = np.unique(rng.integers(-3, rows * seq_len + 5, rng.integers(0, 20)))
        # A single row overlaps with nothing: a smaller stride makes no difference.
        wanted = [
            row * seq_len + packing._last_tokens(starts - row * seq_len, 1, seq_len, seq_len - 1) for row in range(rows)
        ]
        found = packing._last_tokens(starts, rows, seq_len, seq_len)
        np.testing.assert_array_equal(found, np.concatenate(wanted))


@pytest.mark.parametrize("seed", range(20))
def test_many_cuts_are_finished_as_one_by_one(seed):
    """A batch of several packers, some at their end, some partly counted, with rows of two of them mixed."""
    rng = random.Random(seed)
    seq_len, rows = rng.choice([1, 4, 9]), rng.randint(1, 3)
    stride = rng.randint(1, seq_len)
    lengths = [rng.choices([1, 2, 5, 20], k=rng.randint(0, 12)) for _ in range(4)]
    counted_R = [None, None, np.clip(rng.randint(0, rows * seq_len) - seq_len * np.arange(rows), 0, seq_len), None]
    for _ in range(3):
        wanted = []
        for each, counted in zip(lengths, counted_R, strict=True):
            block = packing.empty_block(rows, seq_len, 4)
            wanted.append(packing.finish(block, [counting(packer(each).cut(block, stride, True, counted), counted)]))
        whole = packing.empty_block(4 * rows, seq_len, 4)
        cuts = []
        for n, (each, counted) in enumerate(zip(lengths, counted_R, strict=True)):
            part = {name: field[n * rows : (n + 1) * rows] for name, field in whole.items()}
            cuts.append(counting(packer(each).cut(part, stride, True, counted), counted))
        # The last two alternate rows.
        places = [np.arange(rows) * 2, np.arange(rows) * 2 + 1]
        mixed = {name: field.copy() for name, field in whole.items()}
        for place, n in zip(places, (2, 3), strict=True):
            for name in whole:
                mixed[name][2 * rows + place] = whole[name][n * rows : (n + 1) * rows]
        whole = packing.finish(whole, cuts)
        counted = np.full(2 * rows, seq_len)
        counted[places[0]] = counted_R[2]
        spread = counting(packing.spread(list(zip(cuts[2:], places, strict=True)), 2 * rows, seq_len), counted)
        mixed = packing.finish(mixed, [*cuts[:2], spread])
        for name in (*BATCH_FIELDS, RECORDS):
            np.testing.assert_array_equal(whole[name], np.concatenate([block[name] for block in wanted]), name)
            for place, n in zip(places, (2, 3), strict=True):
                np.testing.assert_array_equal(mixed[name][2 * rows + place], wanted[n][name], name)
