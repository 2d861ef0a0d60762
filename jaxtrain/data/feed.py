"""From this host's rows to arrays of the mesh, ahead of the step. The sharding determines which lanes a host reads."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jaxtrain.data.pipeline import StepBatch
from jaxtrain.distributed import sharding


def local_lanes(mesh: jax.sharding.Mesh, num_lanes: int) -> list[int]:
    """The lanes whose rows this process's devices hold.

    A lane whose rows span several hosts is read by each of them. They agree, since a lane depends only on the config.

    Args:
        mesh: The run's mesh.
        num_lanes: The number of lanes of the run.

    Returns:
        The lanes, ascending. They are the same for every batch size that the lanes divide.
    """
    # Rows are lane-major: lane l holds the l-th part of a batch, so a batch of `fine` rows shows every boundary.
    fine = num_lanes * sharding.batch_ways(mesh.shape)
    slices = sharding.batch_sharding(mesh).addressable_devices_indices_map((fine, mesh.shape["context"]))
    rows_in_lane = fine // num_lanes
    lanes: set[int] = set()
    for index in slices.values():
        assert index is not None
        start, stop, _ = index[0].indices(fine)
        lanes.update(lanes_of_rows(start, stop, rows_in_lane))
    return sorted(lanes)


def lanes_of_rows(start: int, stop: int, rows_in_lane: int) -> range:
    """The lanes that hold rows [start, stop) of a batch."""
    return range(start // rows_in_lane, -(-stop // rows_in_lane))


class Feed:
    """An iterator of a host pipeline's batches as arrays of the mesh, with the next batch already on the devices."""

    def __init__(self, batches: Iterator[StepBatch], mesh: jax.sharding.Mesh, lanes: Sequence[int], num_lanes: int):
        self._batches = batches
        self._sharding = sharding.batch_sharding(mesh)
        self._place = {lane: index for index, lane in enumerate(lanes)}
        self._num_lanes = num_lanes
        self._next: StepBatch | None = None

    def begin(self) -> None:
        """Starts reading without waiting for the first batch."""
        start = getattr(self._batches, "start_prefetch", None)
        if start is not None:
            start()

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> StepBatch:
        batch, self._next = self._next or self._on_devices(next(self._batches)), None
        following = next(self._batches, None)
        self._next = None if following is None else self._on_devices(following)
        return batch

    def close(self) -> None:
        """Stops reading."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()

    def _on_devices(self, batch: StepBatch) -> StepBatch:
        arrays = {name: self._array(rows) for name, rows in batch.arrays.items()}
        return dataclasses.replace(batch, arrays=arrays)

    def _array(self, rows: np.ndarray) -> jax.Array:
        """rows: [rows of this host's lanes, T, ...] → the global [B, T, ...]."""
        per_lane = len(rows) // len(self._place)
        shape = (per_lane * self._num_lanes, *rows.shape[1:])

        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(shape[0])
            lanes = lanes_of_rows(start, stop, per_lane)
            places = [self._place[lane] * per_lane for lane in lanes]
            if places == list(range(places[0], places[0] + len(places) * per_lane, per_lane)):
                first = places[0] + start % per_lane
                return rows[first : first + stop - start, index[1]]
            wanted = np.arange(start, stop)
            return rows[np.repeat(places, per_lane)[wanted - lanes[0] * per_lane] + wanted % per_lane, index[1]]

        return jax.make_array_from_callback(shape, self._sharding, piece)
