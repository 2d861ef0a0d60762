"""TokenArrays against lists of documents."""

import random

import numpy as np
import pytest

from jaxtrain.data.token_arrays import TokenArrays


def documents(seed: int, longest: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(2, 60_000), k=rng.choice([0, 1, rng.randint(1, longest)])) for _ in range(40)]


def unpacked(found: TokenArrays) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(found.ids, found.starts[1:-1])] if len(found) else []


@pytest.mark.parametrize("longest", [3, 40, 2000])
@pytest.mark.parametrize("bos_id", [None, 1])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32])
def test_closed_documents(longest, bos_id, dtype):
    """Gathered if documents are short, sliced if long, in one copy if all are selected: the same result."""
    lists = documents(longest, longest)
    packed = TokenArrays.of(lists)
    packed = TokenArrays(packed.ids.astype(dtype), packed.lengths)
    shuffled = np.random.default_rng(0).permutation(len(lists))
    for rows in (shuffled, shuffled[:31], np.sort(shuffled), np.sort(shuffled[:31])):
        tokens, lengths = packed.closed(rows, 3, bos_id)
        expected = [[*([] if bos_id is None else [bos_id]), *lists[row], 3] for row in rows]
        assert tokens.tolist() == [token for document in expected for token in document]
        assert tokens.dtype == np.int32
        assert lengths.tolist() == list(map(len, expected))


@pytest.mark.parametrize("bos_id", [None, 1])
def test_nothing_to_close(bos_id):
    tokens, lengths = TokenArrays.of([[], []]).closed(np.array([1, 0]), 7, bos_id)
    assert tokens.tolist() == [*([bos_id] if bos_id else []), 7] * 2
    assert lengths.tolist() == [1 + bool(bos_id)] * 2
    assert len(TokenArrays.of([]).closed(np.array([], np.int64), 7, bos_id)[0]) == 0


def test_slices_and_sums_are_those_of_lists():
    lists = documents(5, 9)
    packed = TokenArrays.of(lists)
    for first, stop in [(0, 40), (3, 17), (39, 99), (7, 7), (9, 3), (50, 60)]:
        assert unpacked(packed[first:stop]) == lists[first:stop]
        assert unpacked(packed[first:stop][1:4]) == lists[first:stop][1:4]
    assert unpacked(packed[:5] + packed[20:]) == lists[:5] + lists[20:]
    assert len(packed[3:17]) == 14
