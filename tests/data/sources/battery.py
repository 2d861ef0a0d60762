"""The tests of every kind of source: the same documents in the same order as the slow version, from every state.

A kind defines how lists of texts become files and which config reads them. A contributor adds a function and a row in
test_battery.py, and to its EXCEPT whatever the format cannot represent, with the reason.
"""

import dataclasses
import itertools
import pathlib
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxtrain.data.pipeline import DataConfig, StepBatch
from jaxtrain.interfaces import BATCH_FIELDS, Json, SourceConfig
from jaxtrain.plan import Stage
from tests.data import reference
from tests.data.memory_source import MemorySource
from tests.data.runs import Case, batches_of, plan_of

FileTexts = Sequence[Sequence[str]]  # the texts of each file
Write = Callable[
    [pathlib.Path, FileTexts], SourceConfig
]  # into an empty folder; its files are read in the parts' order

_GROUP = 7  # rows per row group, for kinds that have row groups
_SEQ_LEN = 16


class ByteTokenizer:
    """Encodes any text: its UTF-8 bytes, plus 2."""

    vocab_size = 258
    eos_id = 1
    bos_id: int | None = None
    token_bytes = np.ones(0, np.int32)
    identity: Json = {"kind": "bytes"}  # noqa: RUF012 - a constant of a test

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        data = [text.encode("utf-8") for text in texts]
        ids = np.frombuffer(b"".join(data), np.uint8).astype(np.int32) + 2
        return ids, np.array([len(each) for each in data], np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token - 2 for token in ids).decode()


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Files and how they are read. lanes: Of the run; max_samples and epochs as in configs (epochs end the run)."""

    parts: FileTexts
    lanes: int = 4
    max_samples: int | None = None
    epochs: int | None = 1


def _lines(count: int, seed: int, longest: int = 8, empty: float = 0.0) -> list[str]:
    rng = random.Random(seed)
    words = ["the", "être", "水", "λόγος", "a,b", "🜁🜂", "x" * 20, "\\", "{}", "'", '"q"', "й", "e\u0301", "\u200f"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, longest))) for _ in range(count)]
    return ["" if rng.random() < empty else text for text in texts]


# What breaks decoders, as separate documents and all in one: a byte order mark, NUL and other control characters, line
# ends for Python that are none for JSON (NEL, LS, PS, FS to US), spaces of all kinds, combining characters alone and in
# piles, joined and flag emoji, both writing directions, the characters next to the surrogates, non-characters, private
# ones, the last one, and ligatures that normal forms would decompose.
UNICODE = [
    "\ufeffmark",
    "nul \x00 inside",
    "\x01\x08\x1b[31m\x7f",
    "a\x85b\u2028c\u2029d\x1ce\x1df\x1eg\x1fh\x0bi\x0cj",
    "\u00a0\u3000\u2003 \t\u200b",
    "\u0301",
    "Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f",
    "👨\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 🇪🇺 👍🏿",
    "\u202eright to left\u202c שלום العربية",
    "\ud7ff\ue000\ufffd",
    "\ufffe\uffff\U0001ffff\ufdd0",
    "\U000f0000\U0010ffff",
    "ﷺ ﬁ Å\u212b ½ ①",
    "ᄒ\u1161\u11ab 한국어 日本語 中文 ไทย हिन्दी ქართული ᚠᚢᚦ 𐍈 𝔘",
    "\\ud83d \\u0041 \\x41 &amp; %20 \\n",
]
# Not representable in a format with one document per line.
LINE_ENDS = ["two\nlines", "\n", "ends\n\n", "\r\nwindows\r\n", "  spaces  ", "\t", 'a,b\n"quoted"\n']

SCENARIOS = {
    "more_files_than_lanes": Scenario([_lines(9, seed) for seed in range(9)], lanes=4),
    "fewer_files_than_lanes": Scenario([_lines(40, 1), _lines(33, 2)], lanes=8),
    "one_file_many_groups": Scenario([_lines(150, 3)], lanes=4),
    "few_files_some_empty": Scenario([[], _lines(31, 4), [], [], _lines(40, 5), []], lanes=8),
    "many_files_some_empty": Scenario([[], *[_lines(9, seed) for seed in range(5)], [], []], lanes=2),
    "empty_documents": Scenario([_lines(40, seed, empty=0.4) for seed in range(3)], lanes=4),
    "a_giant_document": Scenario([[*_lines(20, 6), "giant 水 " * 100, *_lines(20, 7)]], lanes=2),
    "max_samples": Scenario([_lines(30, seed) for seed in range(5)], lanes=4, max_samples=77),
    "epochs": Scenario([_lines(12, 8), _lines(25, 9)], lanes=4, epochs=3),
    "unicode": Scenario([[*UNICODE, "".join(UNICODE)], ["plain", *UNICODE[::-1]]], lanes=2),
    "line_ends": Scenario([[*LINE_ENDS, *_lines(4, 10)], LINE_ENDS[::-1]], lanes=2),
}


@dataclasses.dataclass
class _Twin(MemorySource):
    """The same documents in memory, with the names and the access of the source under test."""

    names: Sequence[str] = ()

    @property
    def files(self) -> list[str]:
        return list(self.names)


class Battery:
    """One kind in one scenario. Batches have one short row per lane, so most steps begin in another document."""

    def __init__(self, write: Write, scenario: Scenario, folder: pathlib.Path):
        folder.mkdir(exist_ok=True)
        self.scenario = scenario
        config = write(folder, scenario.parts)
        config.max_samples = scenario.max_samples
        self.case = self._case(config)
        resolved = config.resolve()
        groups = None
        if resolved.random_access:
            groups = [resolved.row_groups(file) for file in range(len(resolved.files))]
        self.twin = _Twin(
            rows=[list(part) for part in scenario.parts],
            groups=groups,
            random_access=resolved.random_access,
            max_samples=scenario.max_samples,
            names=resolved.files,
        )

    def _case(self, source: SourceConfig) -> Case:
        lanes = self.scenario.lanes
        data = DataConfig(sources={"web": source}, num_lanes=lanes, shuffle_window=4, workers=2)
        plan = plan_of(data, [Stage(seq_len=_SEQ_LEN, batch_size=lanes)], 3, steps=10**6)
        return Case(data, plan, 3, self.scenario.epochs, ByteTokenizer())

    def run(
        self,
        after: int = 0,
        states: Mapping[int, np.ndarray] | None = None,
        lanes: Sequence[int] | None = None,
        most: int | None = None,
    ) -> list[StepBatch]:
        """From a state to the end of the data, without the padding steps after it; or `most` batches."""
        with batches_of(self.case, after=after, states=states or {}, lanes=lanes) as batches:
            real = itertools.takewhile(lambda batch: batch.arrays["segment_ids"].any(), batches)
            return list(itertools.islice(real, most))

    def wanted(self) -> list[dict[str, np.ndarray]]:
        """All batches, from the slow version."""
        twin = self._case(self.twin)
        lanes = reference.streams(twin.data, twin.seed, twin.epochs, tokenizer=twin.tokenizer)
        steps = max(-(-len(stream.tokens) // _SEQ_LEN) for stream in lanes.values())
        return reference.batches(twin.data, twin.plan, lanes, steps)

    def documents(self) -> list[tuple[int, int]]:
        """(file, row) of every document of an epoch, in all lanes, from the slow version."""
        twin = self._case(self.twin)
        found = [reference.lane_documents(twin.data, "web", 3, lane, 0) for lane in range(self.scenario.lanes)]
        return sorted((file, row) for documents in found for (_, file, row), _ in documents)


def assert_batches(found: Sequence[StepBatch], wanted: Sequence[dict[str, np.ndarray]]) -> None:
    assert len(found) == len(wanted)
    for batch, slow in zip(found, wanted, strict=True):
        for name in BATCH_FIELDS:
            np.testing.assert_array_equal(batch.arrays[name], slow[name], err_msg=f"{name}, step {batch.step}")
