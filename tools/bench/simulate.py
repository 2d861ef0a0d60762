"""`bench simulate`: distribution, balance and state of a very large run, with the real functions and no I/O.

A source of many files is split into units, ordered and distributed over many lanes: as parquet (units are ranges of row
groups), as files of unknown length (units are whole files), and with a hundredth of the files (shared). Lanes are
distributed over 1 to 4,096 hosts. Every unit must be read exactly once per epoch, and every lane by some host.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from jaxtrain.cli import Command, Flag, Flags
from jaxtrain.data import ledger, units
from jaxtrain.data.feed import lanes_of_rows
from jaxtrain.data.lanes import STATE_FIELDS
from jaxtrain.data.shared_file_reader import SharedFileReader
from jaxtrain.interfaces import Json
from jaxtrain.plan import mixing, stable_hash
from tools.bench.common import at_least_one, progress, result, short

COMMAND = Command(
    name="python -m tools.bench simulate",
    description="Distributes files over lanes and lanes over hosts as a run does, without any I/O. Measures coverage, "
    "balance, seconds, and the size of the state in a checkpoint.",
    examples=(
        "python -m tools.bench simulate",
        "python -m tools.bench simulate --files=1000 --num_lanes=64 --hosts=1,8",
    ),
    flags=(
        Flag(name="files", type=int, default=100_000, help="files of the source"),
        Flag(name="num_lanes", type=int, default=16_384, help="lanes"),
        Flag(name="rows", type=int, default=10_000, help="mean rows of a file; sizes vary about twofold"),
        Flag(name="group_rows", type=int, default=1000, help="rows of a row group"),
        Flag(name="sources", type=int, default=3, help="sources in the state and the mix"),
        Flag(name="hosts", type=tuple[int, ...], default=(1, 6, 64, 100, 1024, 4096), help="numbers of hosts"),
        Flag(name="devices", type=int, default=8, help="devices of a host, each with its own rows"),
        Flag(name="batch_size", type=int, default=32_768, help="rows of a batch, a multiple of num_lanes"),
    ),
    config="none",
)
_EPOCHS = 2
_WINDOW = 512  # DataConfig.shuffle_window's default


@dataclasses.dataclass(frozen=True)
class Files:
    """A source without content. `sizes` has the rows of each file."""

    sizes: np.ndarray
    random_access: bool
    identity: Json = dataclasses.field(default_factory=dict)

    @property
    def files(self) -> range:
        """The files; only their number matters."""
        return range(len(self.sizes))


def measure(flags: Flags) -> Json:
    at_least_one(**{name: getattr(flags, name) for name in ("files", "num_lanes", "rows", "group_rows", "sources")})
    at_least_one(devices=flags.devices, batch_size=flags.batch_size, hosts=min(flags.hosts))
    sizes = sizes_of(flags.files, flags.rows)
    found: Json = {"settings": {flag.name: getattr(flags, flag.name) for flag in COMMAND.flags}}
    few = max(flags.files // 100, 1)
    kinds = {"parquet": (sizes, True), "files": (sizes, False), "shared": (sizes[:few], False)}
    for kind, (some, random_access) in kinds.items():
        found[kind] = distribute(some, random_access, flags.num_lanes, flags.group_rows)
        progress(f"{kind}: {found[kind]}")
    found["hosts"] = [hosts(count, flags.devices, flags.num_lanes, flags.sources) for count in flags.hosts]
    found["mix"] = mix(flags.sources, flags.batch_size)
    found["state"] = state(flags.num_lanes, flags.sources)
    return result("simulate", found, device=False)


def sizes_of(files: int, rows: int) -> np.ndarray:
    """Returns rows of each file, int64 [files]: log-normal around `rows`, two thirds within a factor of two, min. 1."""
    uniform = (stable_hash.philox("simulate", files).random_raw(2 * files).astype(np.float64) + 1) / 2.0**64
    normal = np.sqrt(-2 * np.log(uniform[:files])) * np.cos(2 * np.pi * uniform[files:])  # Box and Muller 1958
    return np.maximum(rows * np.exp(np.log(2) * normal - np.log(2) ** 2 / 2), 1).astype(np.int64)


def distribute(sizes: np.ndarray, random_access: bool, num_lanes: int, group_rows: int) -> Json:
    """Measures how a source is split and distributed in `_EPOCHS` epochs. Asserts that each unit is read once."""
    source: Any = Files(sizes, random_access)
    footers = 0

    def row_groups(files: Any) -> list[list[int]]:
        nonlocal footers
        footers += len(files)
        return [
            [min(group_rows, rows - first) for first in range(0, rows, group_rows)] for rows in sizes[files].tolist()
        ]

    cut, layout_seconds = timed(lambda: units.partition(source, num_lanes, None, row_groups))
    rows_U = np.array([sizes[unit.file] if unit.rows is None else unit.rows for unit in cut.units])
    assert rows_U.sum() == sizes.sum()
    spread, order_seconds, share_seconds, empty = [], [], [], []
    for epoch in range(_EPOCHS):
        key = {"seed": 0, "source": "simulated", "epoch": epoch, "shuffle": True}
        order, seconds = timed(lambda key=key: units.order(len(cut.units), **key))
        order_seconds.append(seconds)
        read = shared_rows if cut.shared else unit_rows
        rows_V, seconds = timed(lambda read=read, order=order: read(order, rows_U, num_lanes))
        share_seconds.append(seconds)
        assert rows_V.sum() == sizes.sum()
        spread.append(float(rows_V.max() / rows_V.mean()))
        empty.append(int((rows_V == 0).sum()))
    return {
        "shared": cut.shared,
        "files": len(sizes),
        "units": len(cut.units),
        "footers_read": footers,
        "layout_seconds": short(layout_seconds),
        "order_seconds": short(max(order_seconds)),
        "share_seconds_all_lanes": short(max(share_seconds)),
        "rows_max_by_mean_of_lanes": [short(value) for value in spread],
        "lanes_without_rows": max(empty),
    }


def unit_rows(order: np.ndarray, rows_U: np.ndarray, num_lanes: int) -> np.ndarray:
    """Returns the rows that each lane reads in an epoch, [V]. Asserts that every unit is read exactly once."""
    read_U = np.zeros(len(rows_U), np.int64)
    rows_V = np.zeros(num_lanes, np.int64)
    for lane in range(num_lanes):
        mine = units.share(order, lane, num_lanes)
        read_U[mine] += 1
        rows_V[lane] = rows_U[mine].sum()
    assert (read_U == 1).all(), f"{(read_U != 1).sum()} units are not read exactly once"
    return rows_V


def shared_rows(order: np.ndarray, rows_U: np.ndarray, num_lanes: int) -> np.ndarray:
    """As `unit_rows`, for files whose windows all lanes share."""
    reader = SharedFileReader(lambda *_: iter(()), _WINDOW, num_lanes)
    lanes: Any = np.arange(num_lanes)
    rows_V = np.zeros(num_lanes, np.int64)
    for position, rows in enumerate(rows_U[order].tolist()):
        first_V = np.asarray(reader.first_window(lanes, position))
        # A lane's windows are num_lanes apart, so all are read once if the first ones are.
        assert np.array_equal(np.sort(first_V), lanes), "some windows are not read exactly once"
        starts_W = np.arange(0, rows, _WINDOW)
        lane_W = np.argsort(first_V)[starts_W // _WINDOW % num_lanes]
        np.add.at(rows_V, lane_W, np.minimum(_WINDOW, rows - starts_W))
    return rows_V


def hosts(count: int, devices: int, num_lanes: int, sources: int) -> Json:
    """Counts lanes per host if every device has its own rows. Asserts that some host reads each lane."""
    shards = count * devices
    # As feed.local_lanes, for a batch of num_lanes x shards rows, which exposes every boundary.
    found, seconds = timed(
        lambda: [
            lanes_of_rows(host * devices * num_lanes, (host + 1) * devices * num_lanes, shards) for host in range(count)
        ]
    )
    lanes = [len(some) for some in found]
    everybodys = np.concatenate([np.arange(some.start, some.stop) for some in found])
    assert np.array_equal(np.unique(everybodys), np.arange(num_lanes)), "some lanes are read by nobody"
    entry = (1 + sources * len(STATE_FIELDS)) * 8
    return {
        "hosts": count,
        "lanes_of_a_host": [min(lanes), max(lanes)],
        "lanes_max_by_mean": short(max(lanes) * count / sum(lanes)),
        "lanes_read_by_lanes": short(sum(lanes) / num_lanes),
        "seconds_a_host": short(seconds / count),
        "gathered_mb": short(max(lanes) * count * entry / 1e6),
    }


def mix(sources: int, batch_size: int) -> Json:
    """Measures CPU seconds to choose the sources of a step's rows, and the largest deviation from a source's share."""
    weights = [Fraction(index + 1, sources * (sources + 1) // 2) for index in range(sources)]
    stage, steps = mixing.Mix(weights, batch_size), 50
    begun = time.process_time()
    counts = np.array([stage.counts_after(step) for step in range(steps + 1)])
    for step, rows in enumerate(np.diff(counts, axis=0).tolist(), 1):
        mixing.arrange(range(sources), rows, 0, step)
    seconds = (time.process_time() - begun) / steps
    shares = np.arange(steps + 1)[:, None] * batch_size * np.array([float(weight) for weight in weights])
    return {"seconds_a_step": short(seconds), "rows_from_share": short(float(np.abs(counts - shares).max()))}


def state(num_lanes: int, sources: int) -> Json:
    """Measures the size of the lanes' state, and the cost of gathering, writing and reading it."""
    names = [f"source{index}" for index in range(sources)]
    words = stable_hash.philox("simulate state").random_raw(num_lanes * sources * len(STATE_FIELDS))
    # Numbers as large as cursors and counts in a long run.
    states = (words >> np.uint64(40)).astype(np.int64).reshape(num_lanes, sources, len(STATE_FIELDS))
    lanes = np.arange(num_lanes)
    joined, join_seconds = timed(lambda: ledger.join(lanes, states, num_lanes))
    text, write_seconds = timed(lambda: json.dumps(ledger.to_json(joined, names)))
    back, read_seconds = timed(lambda: ledger.from_json(json.loads(text), names, num_lanes))
    assert np.array_equal(np.stack([back[lane] for lane in range(num_lanes)]), states)
    _, total_seconds = timed(lambda: ledger.by_source(joined, names))
    return {
        "raw_mb": short(states.nbytes / 1e6),
        "json_mb": short(len(text) / 1e6),
        "json_bytes_a_lane_and_source": short(len(text) / (num_lanes * sources)),
        "join_seconds": short(join_seconds),
        "to_json_seconds": short(write_seconds),
        "from_json_seconds": short(read_seconds),
        "by_source_seconds": short(total_seconds),
    }


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Returns the function's result and its CPU seconds, which other programs hardly affect."""
    begun = time.process_time()
    found = function()
    return found, time.process_time() - begun
