"""The whole data path again, slow and obvious: lists of documents, joined, cut and placed one row at a time.

Shares with the code under test only the keyed functions of data/units.py and plan/stable_hash.py (tested with golden
values), the plan, and the tokenizer.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxtrain.data import units
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.interfaces import Tokenizer
from jaxtrain.plan import Plan, stable_hash
from tests.data.memory_source import MemorySource, WordTokenizer

Identity = tuple[str, int, int]  # (source, file, row in the file)


def partition(source: MemorySource, num_lanes: int) -> units.Partition:
    return units.partition(
        source, num_lanes, source.max_samples, lambda files: [source.row_groups(file) for file in files]
    )


def lane_documents(
    data: DataConfig, name: str, seed: int, lane: int, epoch: int, held_out: bool = False
) -> list[tuple[Identity, str]]:
    """A lane's documents of one epoch in order, without empty, dropped and held-out ones."""
    source = data.sources[name]
    assert isinstance(source, MemorySource)
    cut = partition(source, data.num_lanes)
    shuffle = data.shuffle and cut.limit is None
    order = units.order(len(cut.units), seed=seed, source=name, epoch=epoch, shuffle=shuffle).tolist()
    size, found, before = data.shuffle_window, [], 0
    for position, index in enumerate(order):
        unit = cut.units[index]
        rows = source.rows[unit.file]
        end = len(rows) if unit.rows is None else unit.first + unit.rows
        if cut.limit is not None:
            end = min(end, max(cut.limit - before, 0))
            before += len(rows)
        for window, first in enumerate(range(unit.first, end, size)):
            mine = (position * units.interleave_step(data.num_lanes) + window) if cut.shared else position
            if mine % data.num_lanes != lane:
                continue
            count = min(size, end - first)
            inside = units.row_order(
                count,
                seed=seed,
                source=name,
                epoch=epoch,
                file=source.files[unit.file],
                first=first,
                shuffle=data.shuffle,
            )
            for row in (first + inside).tolist():
                text = rows[row]
                held = bool(stable_hash.is_held_out(name, source.files[unit.file], np.array([row]), data.holdout)[0])
                for transform in source.transforms:
                    document = transform({"text": text, "number": row})
                    text = "" if document is None else document["text"]
                if text and held == held_out:
                    found.append(((name, unit.file, row), text))
    return found


@dataclasses.dataclass
class LaneStream:
    """All tokens of a lane in a source: (token, number of the document), and where each row begins."""

    tokens: list[int]
    owners: list[int]
    at: int = 0
    high: int = 0  # tokens before this one have been counted
    trained: int = 0

    @property
    def documents_begun(self) -> int:
        return len(set(self.owners[: self.high]))

    @property
    def ended(self) -> bool:
        return self.at >= len(self.tokens)

    def row(self, seq_len: int, stride: int, document_mask: bool, counted: int | None = None) -> dict[str, list[int]]:
        """counted: How many of its tokens are trained on; None for all."""
        fields: dict[str, list[int]] = {
            name: [] for name in ("tokens", "targets", "segment_ids", "positions", "loss_mask")
        }
        segment, position = 0, 0
        for index in range(self.at, self.at + seq_len):
            valid = index < len(self.tokens)
            if index == self.at or (document_mask and valid and self.owners[index] != self.owners[index - 1]):
                segment, position = segment + 1, 0
            same = index + 1 < len(self.tokens) and (not document_mask or self.owners[index] == self.owners[index + 1])
            fields["tokens"].append(self.tokens[index] if valid else 0)
            fields["targets"].append(self.tokens[index + 1] if same else 0)
            fields["segment_ids"].append(segment if valid else 0)
            fields["positions"].append(position if valid else 0)
            fields["loss_mask"].append(same)
            position += 1
        end = min(self.at + (seq_len if counted is None else counted), len(self.tokens))
        self.trained += max(end - self.at, 0)
        if end > self.at:
            self.high = max(self.high, end)
        self.at += stride
        return fields


def streams(
    data: DataConfig,
    seed: int,
    epochs: int | None,
    least: int = 0,
    held_out: bool = False,
    tokenizer: Tokenizer | None = None,
) -> dict[tuple[int, str], LaneStream]:
    """The stream of every lane in every source, for `epochs` epochs; None: for enough to yield `least` tokens."""
    found = {}
    for lane in range(data.num_lanes):
        for name in data.sources:
            stream, epoch = LaneStream([], []), 0
            while len(stream.tokens) < least if epochs is None else epoch < epochs:
                _add_epoch(stream, data, name, seed, lane, epoch, held_out, tokenizer or WordTokenizer())
                epoch += 1
            found[lane, name] = stream
    return found


def _add_epoch(
    stream: LaneStream,
    data: DataConfig,
    name: str,
    seed: int,
    lane: int,
    epoch: int,
    held_out: bool,
    tokenizer: Tokenizer,
) -> None:
    for _, text in lane_documents(data, name, seed, lane, epoch, held_out):
        ids = tokenizer.encode_batch([text])[0].tolist()
        if ids:
            ids = [tokenizer.bos_id or 0] * data.add_bos + ids + [tokenizer.eos_id]
            number = stream.owners[-1] + 1 if stream.owners else 0
            stream.tokens += ids
            stream.owners += [number] * len(ids)


def batches(
    data: DataConfig, plan: Plan, lanes: Mapping[tuple[int, str], LaneStream], steps: int
) -> list[dict[str, np.ndarray]]:
    """The global batches of steps 1 to `steps`. Advances `lanes`."""
    found = []
    for step in range(1, steps + 1):
        at = plan.at(step)
        rows: Sequence[dict[str, list[int]]] = [
            lanes[row * data.num_lanes // at.batch_size, plan.source_names[source]].row(
                at.seq_len,
                at.stride,
                data.document_mask,
                min(max(at.masked_from - row * at.seq_len, 0), at.seq_len),
            )
            for row, source in enumerate(plan.sources_of(step).tolist())
        ]
        batch = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        flat = np.arange(at.batch_size * at.seq_len).reshape(at.batch_size, at.seq_len)
        batch["loss_mask"] = batch["loss_mask"].astype(bool) & (flat < at.masked_from)
        found.append(batch)
    return found
