"""The whole data path again, slow and obvious: lists of documents, joined, cut and placed one row at a time.

Shares with the code under test only the keyed functions of data/units.py and plan/stable_hash.py (tested with golden
values), the plan, and the tokenizer.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence, Set

import numpy as np

from jaxtrain.data import fit_packing, units
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
    """A lane's documents of one epoch in order, without those that are empty, dropped or held out."""
    source = data.sources[name]
    assert isinstance(source, MemorySource)
    cut = partition(source, data.num_lanes)
    shuffle = data.shuffle and cut.limit is None
    order = units.order(len(cut.units), seed=seed, source=name, epoch=epoch, shuffle=shuffle).tolist()
    size, found, before = data.shuffle_window or 512, [], 0
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
    """All tokens of a lane in a source, and the number of each token's document. Rows are taken one by one."""

    tokens: list[int]
    owners: list[int]
    trained: int = 0
    padding: int = 0
    begun: set[int] = dataclasses.field(default_factory=set)
    cut: set[int] = dataclasses.field(default_factory=set)
    counted: set[int] = dataclasses.field(default_factory=set)  # tokens that have been trained on
    documents: list[Identity] = dataclasses.field(default_factory=list)  # by number
    removed: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(-1, -1))

    def forget(self, gone: Set[Identity]) -> None:
        """Removes documents, whether they have been read or not. What has been counted stays counted."""
        kept = [index for index, owner in enumerate(self.owners) if self.documents[owner] not in gone]
        places = collections.defaultdict(lambda: next(self.removed), {old: new for new, old in enumerate(kept)})
        left = [[index for index in document if index in places] for document in self.left]
        self.left = [[places[index] for index in document] for document in left if document]
        self.counted = {places[index] for index in self.counted}
        stay = [number for number, document in enumerate(self.documents) if document not in gone]
        numbers = collections.defaultdict(lambda: next(self.removed), {old: new for new, old in enumerate(stay)})
        self.begun, self.cut = ({numbers[number] for number in some} for some in (self.begun, self.cut))
        self.owners = [numbers[self.owners[index]] for index in kept]
        self.tokens = [self.tokens[index] for index in kept]
        self.documents = [self.documents[number] for number in stay]

    @functools.cached_property
    def left(self) -> list[list[int]]:
        """What is left of each document, in order: indices of tokens."""
        return [list(group) for _, group in itertools.groupby(range(len(self.owners)), self.owners.__getitem__)]

    @property
    def ended(self) -> bool:
        return not self.left

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """In the order of packing.Counts."""
        return len(self.begun), self.trained, len(self.counted), len(self.cut), self.padding

    def row(
        self, seq_len: int, stride: int, document_mask: bool, counted: int | None = None, fit: bool = False
    ) -> dict[str, list[int]]:
        """counted: How many of its tokens are trained on; None for all."""
        counted, gaps = seq_len if counted is None else counted, self.gaps()
        if fit or gaps:
            # A change to "fit" drops what overlap would repeat. A change to "concat" first closes the gaps.
            while fit and self.left and self.left[0][0] in self.counted:
                self.drop(1)
            indices = self.fitted(seq_len, None if fit else gaps[-1])
        else:
            indices = list(itertools.islice(itertools.chain.from_iterable(self.left), seq_len))
            self.drop(stride)
        self.trained += min(len(indices), counted)
        self.padding += max(counted - len(indices), 0)
        for index in indices[:counted]:
            if index not in self.counted and self.is_first(index):
                self.begun.add(self.owners[index])
                if self.owners.count(self.owners[index]) > sum(self.owners[i] == self.owners[index] for i in indices):
                    self.cut.add(self.owners[index])
        self.counted |= set(indices[:counted])
        return self.fields(indices, seq_len, document_mask, looks_on=not fit and not gaps)

    def fields(self, indices: list[int], seq_len: int, document_mask: bool, looks_on: bool) -> dict[str, list[int]]:
        """The fields of a row of these tokens. looks_on: Whether the next document follows the row's last token."""
        fields: dict[str, list[int]] = {
            name: [] for name in ("tokens", "targets", "segment_ids", "positions", "loss_mask")
        }
        segment, position = 0, 0
        for place in range(seq_len):
            valid = place < len(indices)
            index = indices[place] if valid else -1
            if place == 0 or (document_mask and valid and self.is_first(index)):
                segment, position = segment + 1, 0
            following = indices[place + 1] if place + 1 < len(indices) else index + 1
            same = valid and following < len(self.tokens)
            if same and self.is_first(following):
                same = not document_mask and (place + 1 < len(indices) or looks_on)
            fields["tokens"].append(self.tokens[index] if valid else 0)
            fields["targets"].append(self.tokens[following] if same else 0)
            fields["segment_ids"].append(segment if valid else 0)
            fields["positions"].append(position if valid else 0)
            fields["loss_mask"].append(same)
            position += 1
        return fields

    def is_first(self, index: int) -> bool:
        """Whether a token is the first of its document."""
        return index == 0 or self.owners[index] != self.owners[index - 1]

    def drop(self, count: int) -> None:
        """Takes so many tokens off the front."""
        while count and self.left:
            first = self.left[0]
            count, first[:] = max(count - len(first), 0), first[count:]
            if not first:
                self.left.pop(0)

    def gaps(self) -> list[int]:
        """Documents that are used up or begun, after the first of which anything is left."""
        if not self.left:
            return []
        untouched = {self.owners[document[0]] for document in self.left if self.is_first(document[0])}
        return sorted(set(range(self.owners[self.left[0][0]] + 1, self.owners[-1] + 1)) - untouched)

    def fitted(self, seq_len: int, last: int | None) -> list[int]:
        """Takes the tokens of a row by best fit, as fit_packing.py says. last: the last document it may use."""
        found: list[int] = []
        while self.left and len(found) < seq_len:
            room, front = seq_len - len(found), self.owners[self.left[0][0]]
            fresh = [document for document in self.left if self.is_first(document[0])]
            window = [document for document in fresh if self.owners[document[0]] < front + fit_packing.WINDOW]
            if last is not None:
                window = [document for document in window if self.owners[document[0]] <= last]
            if not found:
                opened = [document for document in self.left if not self.is_first(document[0])]
                choice = [*opened, *window]
            else:
                whole = [document for document in window if len(document) <= room]
                longest = max(map(len, whole), default=0)
                choice = [document for document in whole if len(document) == longest]
                choice += [document for document in window if len(document) > seq_len]
            if not choice:
                break
            found += choice[0][:room]
            del choice[0][:room]
            self.left = [document for document in self.left if document]
        return found


def streams(
    data: DataConfig,
    seed: int,
    epochs: int | None,
    least: int = 0,
    held_out: bool = False,
    tokenizer: Tokenizer | None = None,
) -> dict[tuple[int, str], LaneStream]:
    """The stream of every lane in every source, for so many epochs; None: for as many as give `least` tokens."""
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
    for identity, text in lane_documents(data, name, seed, lane, epoch, held_out):
        ids = tokenizer.encode_batch([text])[0].tolist()
        if ids:
            ids = [tokenizer.bos_id or 0] * data.add_bos + ids + [tokenizer.eos_id]
            number = stream.owners[-1] + 1 if stream.owners else 0
            stream.tokens += ids
            stream.owners += [number] * len(ids)
            stream.documents.append(identity)


def batches(
    data: DataConfig,
    plan: Plan,
    lanes: Mapping[tuple[int, str], LaneStream],
    steps: int,
    forgotten: Mapping[int, Set[Identity]] | None = None,
) -> list[dict[str, np.ndarray]]:
    """The global batches of steps 1 to `steps`. Moves `lanes` on. forgotten: By the first step without them."""
    found = []
    for step in range(1, steps + 1):
        for stream in lanes.values() if step in (forgotten or {}) else ():
            stream.forget((forgotten or {})[step])
        at = plan.at(step)
        rows: Sequence[dict[str, list[int]]] = [
            lanes[row * data.num_lanes // at.batch_size, plan.source_names[source]].row(
                at.seq_len,
                at.stride,
                data.document_mask,
                min(max(at.masked_from - row * at.seq_len, 0), at.seq_len),
                at.fit,
            )
            for row, source in enumerate(plan.sources_of(step).tolist())
        ]
        batch = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        flat = np.arange(at.batch_size * at.seq_len).reshape(at.batch_size, at.seq_len)
        batch["loss_mask"] = batch["loss_mask"].astype(bool) & (flat < at.masked_from)
        found.append(batch)
    return found
