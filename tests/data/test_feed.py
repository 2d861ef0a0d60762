"""Rows on the devices of several meshes, in the order of the plan; and which host reads which lanes."""

import jax
import numpy as np
import pytest

from jaxtrain.data.feed import Feed, local_lanes
from jaxtrain.data.pipeline import StepBatch
from jaxtrain.distributed.sharding import MeshConfig, batch_sharding
from jaxtrain.interfaces import BATCH_FIELDS

MESHES = [
    MeshConfig(data=8, fsdp=1),
    MeshConfig(data=2, fsdp=4),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=1, fsdp=2, tensor=2, context=2),
    MeshConfig(data=1, fsdp=1, tensor=1, context=8),
]


def host_batch(step: int, rows: int, columns: int, lanes: list[int]) -> StepBatch:
    rng = np.random.default_rng(step)
    batch = {name: rng.integers(0, 1000, (rows, columns), np.int32) for name in BATCH_FIELDS}
    batch["loss_mask"] = batch["loss_mask"] > 500
    states = {lane: np.full((1, 2), step) for lane in lanes}
    return StepBatch(step, batch, states, ended=step == 3, documents=np.ones(rows, np.int64))


@pytest.mark.parametrize("lanes", [1, 4, 16])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_one_process_reads_all_lanes_and_holds_their_rows(mesh, lanes):
    made = mesh.build()
    assert local_lanes(made, lanes) == list(range(lanes))
    given = [host_batch(step, 16 * step, 8 * step, list(range(lanes))) for step in (1, 2, 3)]
    feed = Feed(iter(given), made, range(lanes), lanes)
    for wanted, found in zip(given, feed, strict=True):
        assert (found.step, found.ended, found.states.keys()) == (wanted.step, wanted.ended, wanted.states.keys())
        for name in BATCH_FIELDS:
            array = found.arrays[name]
            assert array.sharding == batch_sharding(made)
            assert array.dtype == wanted.arrays[name].dtype
            np.testing.assert_array_equal(array, wanted.arrays[name])


class Few:
    """A sharding of which this process owns only some devices."""

    def __init__(self, mesh: jax.sharding.Mesh, mine: range):
        self._whole, self._mine = batch_sharding(mesh), mine

    def addressable_devices_indices_map(self, shape):
        whole = self._whole.devices_indices_map(shape)
        return {device: index for device, index in whole.items() if device.id in self._mine}


@pytest.mark.parametrize(
    ("mesh", "lanes", "mine", "wanted"),
    [
        (MeshConfig(data=8, fsdp=1), 16, range(2, 4), [4, 5, 6, 7]),
        (MeshConfig(data=8, fsdp=1), 4, range(2, 3), [1]),  # a lane on two hosts: both read it
        (MeshConfig(data=8, fsdp=1), 6, range(2, 4), [1, 2]),  # a quarter of 6 lanes begins inside one
        (MeshConfig(data=2, fsdp=1, tensor=4), 4, range(2), [0, 1]),  # a tensor group on two hosts
    ],
)
def test_a_process_reads_the_lanes_of_its_devices(mesh, lanes, mine, wanted, monkeypatch):
    made = mesh.build()
    monkeypatch.setattr("jaxtrain.distributed.sharding.batch_sharding", lambda mesh: Few(mesh, mine))
    assert local_lanes(made, lanes) == wanted


@pytest.mark.parametrize("lanes", [[0, 1, 2, 3], [2, 3], [0, 2, 3], [3]])
def test_a_host_with_some_lanes_gives_each_device_its_rows(lanes, monkeypatch):
    """What one of several hosts is asked for: the shards of its own devices."""
    rows = np.arange(16 * 5).reshape(16, 5)
    asked = []

    def callback(shape, sharding, piece):
        for lane in lanes:
            for start, stop in ((0, 4), (0, 2), (2, 4), (1, 2)):
                index = (slice(4 * lane + start, 4 * lane + stop), slice(1, 3))
                np.testing.assert_array_equal(piece(index), rows[index])
                asked.append(shape)
        if lanes[-2:] == [2, 3]:
            np.testing.assert_array_equal(piece((slice(10, 14), slice(None))), rows[10:14])
        if lanes == [0, 2, 3]:
            monkeypatch.setattr(feed, "_place", {0: 0, 3: 1, 2: 2})
        return rows

    feed = Feed(iter(()), MESHES[0].build(), lanes, 4)
    monkeypatch.setattr(jax, "make_array_from_callback", callback)
    feed._array(np.concatenate([rows[4 * lane : 4 * lane + 4] for lane in lanes]))
    assert set(asked) == {(16, 5)}


def test_errors_of_the_data_reach_the_step():
    def batches():
        yield host_batch(1, 16, 8, [0])
        yield host_batch(2, 16, 8, [0])
        raise OSError("gone")

    feed = Feed(batches(), MESHES[0].build(), [0], 1)
    assert next(feed).step == 1
    with pytest.raises(OSError, match="gone"):
        next(feed)
