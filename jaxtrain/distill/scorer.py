"""Computes a teacher's most likely next tokens for whole documents, for the teacher cache.

A document longer than the context is scored in windows that start `stride` tokens apart; the last one ends at the
document's end. Each window scores only the tokens that earlier windows have not, so every token sees at least the
context - stride tokens before it, or all of them near the document's start. Documents share rows as separate segments,
so their scores are independent of each other.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.distributed import sharding
from jaxtrain.interfaces import BoundedModel, Model, Params
from jaxtrain.losses.cached import Layout, top_records
from jaxtrain.losses.head import logits

# Logits per device at a time: 128 MB in fp32.
_LOGITS = 1 << 25
_IN_FLIGHT = 2  # batches queued on the devices, so that they never wait for the host


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens [begin, end) of a document. Earlier windows have scored those before `first`."""

    document: int
    begin: int
    first: int
    end: int


def windows(lengths: Sequence[int], context: int, stride: int) -> list[Window]:
    """Splits documents of these lengths into windows of at most `context` tokens, `stride` tokens apart."""
    found = []
    for document, length in enumerate(lengths):
        first = 0
        for begin in range(0, max(length - context + stride, 1), stride):
            begin = min(begin, max(length - context, 0))
            end = min(begin + context, length)
            found.append(Window(document, begin, first, end))
            first = end
    return found


def rows_of(found: Sequence[Window], context: int, most: int | None = None) -> list[list[Window]]:
    """Packs windows into rows of `context` tokens and at most `most` windows, by first-fit decreasing."""
    rows: list[list[Window]] = []
    left: list[int] = []
    for window in sorted(found, key=lambda window: window.begin - window.end):
        size = window.end - window.begin
        place = next((index for index, room in enumerate(left) if room >= size), None)
        if place is None:
            rows.append([])
            left.append(context)
            place = -1
        rows[place].append(window)
        left[place] = 0 if len(rows[place]) == most else left[place] - size
    return rows


class Scorer:
    """Scores documents with a teacher. Implements the teacher store's `Score` protocol.

    Args:
        model: The teacher, built for the run's mesh.
        params: Its parameters.
        layout: Layout of a record.
        context: Tokens per row.
        stride: Tokens between the starts of successive windows of a document, 1 to `context`.
        rows: Rows per batch, a multiple of the number of devices that share it.
    """

    def __init__(self, model: Model, params: Params, layout: Layout, context: int, stride: int, rows: int):
        assert model.mesh is not None
        assert 1 <= stride <= context
        self._params, self._layout, self._mesh = params, layout, model.mesh
        self._context, self._stride, self._rows = context, stride, rows
        where = sharding.batch_sharding(model.mesh)
        self._where = where
        bound = model.most_documents(rows, context) if isinstance(model, BoundedModel) else None
        self._most = None if bound is None else bound[1] // bound[0] - 1  # less a row's padding
        options = model.compiler_options(rows, context)
        self._run: Any = jax.jit(
            functools.partial(_records, model, layout), out_shardings=where, compiler_options=options
        )

    def compile(self) -> Any:
        """Compiles before the first batch. Returns the executable, which reports the memory it needs."""
        ids = jax.ShapeDtypeStruct((self._rows, self._context), jnp.int32, sharding=self._where)
        self._run = self._run.lower(self._params, ids, ids, ids).compile()
        return self._run

    def __call__(self, documents: list[np.ndarray]) -> list[np.ndarray]:
        found = [np.empty((len(document), self._layout.width), np.uint8) for document in documents]
        flying: collections.deque[tuple[list[list[Window]], jax.Array]] = collections.deque()
        found_windows = windows([len(document) for document in documents], self._context, self._stride)
        rows = rows_of(found_windows, self._context, self._most)
        for begin in range(0, len(rows), self._rows):
            batch = rows[begin : begin + self._rows]
            flying.append((batch, self._run(self._params, *self._arrays(batch, documents))))
            if len(flying) > _IN_FLIGHT:
                self._take(*flying.popleft(), found)
        while flying:
            self._take(*flying.popleft(), found)
        return found

    def _arrays(self, batch: list[list[Window]], documents: list[np.ndarray]) -> Iterator[jax.Array]:
        """Returns tokens, segment_ids and positions, each int32 [rows, context]."""
        tokens, segments, positions = np.zeros((3, self._rows, self._context), np.int32)
        for row, index, place, window in _places(batch):
            end = place + window.end - window.begin
            tokens[row, place:end] = documents[window.document][window.begin : window.end]
            segments[row, place:end] = index + 1
            positions[row, place:end] = np.arange(end - place)
        return (jax.device_put(array, self._where) for array in (tokens, segments, positions))

    def _take(self, batch: list[list[Window]], records: jax.Array, found: list[np.ndarray]) -> None:
        """Copies records, uint8 [rows, context, W], to their documents in `found`."""
        host = jax.device_get(records)
        for row, _, place, window in _places(batch):
            skipped = place + window.first - window.begin
            found[window.document][window.first : window.end] = host[row, skipped : skipped + window.end - window.first]


def _places(batch: list[list[Window]]) -> Iterator[tuple[int, int, int, Window]]:
    """Yields (row, index in the row, first column, window)."""
    for row, side_by_side in enumerate(batch):
        place = 0
        for index, window in enumerate(side_by_side):
            yield row, index, place, window
            place += window.end - window.begin


def _records(
    model: Model, layout: Layout, params: Params, tokens_BT: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Returns records, uint8 [B, T, W]. Only the logits of a few positions per row exist at a time."""
    x_BTE = model.hidden(params, tokens_BT, segments_BT, positions_BT).x
    head_EV = model.head(params)[:, : layout.vocab_size].astype(x_BTE.dtype)
    B, T, E = x_BTE.shape
    mesh = model.mesh
    assert mesh is not None
    on_device = B // sharding.batch_ways(mesh.shape)
    most = max(_LOGITS // (on_device * layout.vocab_size), 1)
    C = max(divisor for divisor in sharding.divisors(T) if divisor <= most)

    def chunk(x_BCE: jax.Array) -> jax.Array:
        found = top_records(logits(x_BCE, head_EV).reshape(B * C, layout.vocab_size), layout)
        return found.reshape(B, C, layout.width)

    chunks = jax.lax.map(chunk, x_BTE.reshape(B, T // C, C, E).swapaxes(0, 1))
    return chunks.swapaxes(0, 1).reshape(B, T, layout.width)
