"""`bench data`: the data path on one core, with two kinds of tokenizers and without one.

All measurements cover the same whole epoch: nothing is read before it or past its end. Shares are of CPU seconds, which
exclude other load on the machine:

    whole        the data path: read, tokenize, pack, batch
    library      the same without the tokenizer's fast engine, if it has one
    reading      the same files through the source alone
    tokenizing   the same documents through the tokenizer alone, in chunks of the data path's size
    prepared     the data path with a tokenizer that slices precomputed arrays
    fit          the same with rows of whole documents (packing="fit")
    cutting      that tokenizer alone, on the same documents
    machinery    prepared - reading - cutting; or, by subtraction, whole - reading - tokenizing

If torch is installed, `plain` measures the usual pipeline for the same rows (plain.py). data_modes.py measures the
three modes with each tokenizer.
"""

import dataclasses
import gc
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np

from jaxtrain.cli import Command, Flag, Flags
from jaxtrain.data.lanes import STATE_FIELDS
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.tokenizing import CHUNK_CHARACTERS
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Block, Json, Tokenizer
from jaxtrain.plan import Plan
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer
from jaxtrain.tokenizers.training import TrainTokenizer
from tools.bench import corpus, data_modes, plain, stream
from tools.bench.common import (
    Spent,
    Stopwatch,
    at_least_one,
    median,
    one_core,
    progress,
    ratio,
    result,
    rounds_flag,
    short,
)

_KINDS = ("sentencepiece", "bpe")

COMMAND = Command(
    name="python -m tools.bench data",
    description="The data path's tokens/s on one core, from local parquet files of the Python standard library, with a "
    "sentencepiece and a BPE tokenizer trained on it first, and the share of its time that is neither reading nor "
    "tokenizing (machinery).",
    examples=("python -m tools.bench data", "python -m tools.bench data --megabytes=12 --vocab_size=8000 --rounds=1"),
    flags=(
        Flag(name="megabytes", type=float, default=48.0, help="millions of characters of an epoch"),
        Flag(name="vocab_size", type=int, default=32_000, help="tokens of both tokenizers"),
        Flag(name="train_megabytes", type=float, default=8.0, help="millions of characters to train the tokenizers on"),
        Flag(name="seq_len", type=int, default=2048, help="tokens of a row"),
        Flag(name="batch_size", type=int, default=32, help="rows of a batch, a multiple of num_lanes"),
        Flag(name="num_lanes", type=int, default=8, help="lanes read in parallel"),
        Flag(
            name="tokenizers",
            type=tuple[str, ...],
            default=_KINDS,
            help="sentencepiece and bpe are trained first; a folder with a tokenizer.json is taken as it is",
        ),
        rounds_flag(3),
    ),
    config="none",
)

_GROUPS_PER_LANE = 8  # row groups: enough to be distributed over the lanes, as in a large dataset
_FILES = 4


def measure(flags: Flags) -> Json:
    at_least_one(rounds=flags.rounds, num_lanes=flags.num_lanes)
    if not flags.tokenizers or any(name not in _KINDS and not os.path.isdir(name) for name in flags.tokenizers):
        raise UserError(f"--tokenizers={','.join(flags.tokenizers)}: give {', '.join(_KINDS)}, or tokenizers' folders")
    with tempfile.TemporaryDirectory() as folder, one_core() as pinned:
        paths = corpus.write(folder, flags.megabytes, files=_FILES, groups=_GROUPS_PER_LANE * flags.num_lanes)
        data = stream.config(paths, num_lanes=flags.num_lanes, workers=1)
        found: Json = {"one_core": pinned, "settings": {flag.name: getattr(flags, flag.name) for flag in COMMAND.flags}}
        for kind in flags.tokenizers:
            begun = time.perf_counter()
            workdir = f"{folder}/{os.path.basename(kind)}"
            tokenizer, library = _load(kind, flags, workdir)
            progress(f"{kind}: {tokenizer.vocab_size:,} tokens, ready in {time.perf_counter() - begun:.0f} s")
            measured = _Measured(data, tokenizer, library, flags)
            found[kind] = measured.numbers(kind, flags.rounds)
            tokens = found[kind]["tokens"]
            found[kind]["modes"] = data_modes.measure(
                paths, data, measured.plan, tokenizer, tokens, workdir, flags.rounds
            )
    return result("data", found, device=False)


def _load(kind: str, flags: Flags, workdir: str) -> tuple[Tokenizer, Tokenizer | None]:
    """Returns the tokenizer, and where a fast engine encodes for it, the same without one."""
    if kind not in _KINDS:
        config = HuggingFaceTokenizer(name=kind, engine="fastokens")
    else:
        engine = "fastokens" if kind == "bpe" else "auto"
        config = TrainTokenizer(kind=kind, vocab_size=flags.vocab_size, sample_mb=flags.train_megabytes, engine=engine)
        config.check()
        config.train(corpus.documents(flags.train_megabytes), workdir, progress=False)
    tokenizer = config.build(workdir)
    has_fast = getattr(tokenizer, "reference", None) is not None
    return tokenizer, dataclasses.replace(config, engine="tokenizers").build(workdir) if has_fast else None


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """One epoch through the data path.

    Attributes:
        share_cut: Of the documents, those that the row in which they begin does not hold whole.
        resident_mb: The largest resident size at the end of a batch.
    """

    spent: Spent
    tokens: int
    documents: int
    share_cut: float
    first_batch_seconds: float
    resident_mb: float | None


class _Measured:
    """Measures the parts of the data path with one tokenizer, interleaved."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, library: Tokenizer | None, flags: Flags):
        self._data, self._tokenizer, self._library = data, tokenizer, library
        self.plan, self._fit = (
            stream.endless_plan(data, seq_len=flags.seq_len, batch_size=flags.batch_size, packing=packing)
            for packing in ("concat", "fit")
        )
        characters, tokens, _ = self._tokenize(tokenizer)
        self._characters = characters
        self._prepared = stream.Prepared(characters / tokens, tokenizer.vocab_size)

    def numbers(self, kind: str, rounds: int) -> Json:
        before = resident_mb()
        whole: list[_Epoch] = []
        by_library: list[_Epoch] = []
        bare: list[_Epoch] = []
        fit: list[_Epoch] = []
        reading: list[float] = []
        tokenizing: list[float] = []
        cutting: list[float] = []
        usual: list[float] = []  # tokens per CPU second
        for number in range(1, rounds + 1):
            whole.append(self._epoch(self._tokenizer, self.plan))
            if self._library is not None:
                by_library.append(self._epoch(self._library, self.plan))
            bare.append(self._epoch(self._prepared, self.plan))
            fit.append(self._epoch(self._prepared, self._fit))
            reading.append(self._read())
            tokenizing.append(self._tokenize(self._tokenizer)[2])
            cutting.append(self._tokenize(self._prepared)[2])
            if plain.is_installed():
                spent, tokens = plain.epoch(self._paths(), self._library or self._tokenizer, self.plan.stages[0])
                usual.append(tokens / spent.cpu)
            progress(
                f"{kind}, round {number} of {rounds}: {whole[-1].tokens / whole[-1].spent.wall:,.0f} tokens/s; CPU "
                f"seconds: whole {whole[-1].spent.cpu:.2f}, tokenizing {tokenizing[-1]:.2f}, prepared "
                f"{bare[-1].spent.cpu:.2f}, reading {reading[-1]:.2f}"
            )
        cpu = [epoch.spent.cpu for epoch in whole]
        machinery = [epoch.spent.cpu - read - cut for epoch, read, cut in zip(bare, reading, cutting, strict=True)]
        left = [all_ - read - own for all_, read, own in zip(cpu, reading, tokenizing, strict=True)]
        tokens = whole[0].tokens
        residents = [epoch.resident_mb for epoch in whole if epoch.resident_mb is not None]
        return {
            "vocab_size": self._tokenizer.vocab_size,
            "tokens": tokens,
            "documents": whole[0].documents,
            "characters_per_token": short(self._characters / tokens),
            "tokens_per_second": median([tokens / epoch.spent.wall for epoch in whole]),
            "tokens_per_cpu_second": median([tokens / each for each in cpu]),
            "library_tokens_per_cpu_second": median([tokens / epoch.spent.cpu for epoch in by_library])
            if by_library
            else None,
            "times_library": ratio([epoch.spent.cpu for epoch in by_library], cpu) if by_library else None,
            "tokenizer_tokens_per_cpu_second": median([tokens / each for each in tokenizing]),
            "prepared_tokens_per_cpu_second": median([epoch.tokens / epoch.spent.cpu for epoch in bare]),
            "fit_tokens_per_cpu_second": median([epoch.tokens / epoch.spent.cpu for epoch in fit]),
            "times_fit": ratio([epoch.spent.cpu for epoch in bare], [epoch.spent.cpu for epoch in fit]),
            "share_cut": {"concat": bare[0].share_cut, "fit": fit[0].share_cut},
            "plain_tokens_per_cpu_second": median(usual) if usual else None,
            "times_plain": ratio([tokens / each for each in cpu], usual) if usual else None,
            "ns_per_token": {
                name: median([1e9 * each / tokens for each in spent])
                for name, spent in (("whole", cpu), ("reading", reading), ("tokenizing", tokenizing), ("rest", left))
            },
            "share_tokenizing": _share(tokenizing, cpu),
            "share_reading": _share(reading, cpu),
            "share_machinery": _share(machinery, cpu),
            "share_machinery_by_subtraction": _share(left, cpu),
            "first_batch_seconds": median([epoch.first_batch_seconds for epoch in whole]),
            "resident_before_mb": before,
            "resident_mb": short(max(residents)) if residents else None,
        }

    def _epoch(self, tokenizer: Tokenizer, plan: Plan) -> _Epoch:
        gc.collect()
        gc.freeze()  # as in a run: see trainer.loop.frozen_gc
        watch = Stopwatch()
        first, resident, states = None, 0.0, {}
        with stream.batches(self._data, plan, tokenizer) as batches:
            for batch in batches:
                first, states = first or watch.spent().wall, batch.states
                resident = max(resident, resident_mb() or 0.0)
                if batch.ended:
                    break
            spent = watch.spent()
        gc.unfreeze()
        assert first is not None
        # Each lane's state is [1, STATE_FIELDS].
        counts = np.concatenate(list(states.values())).sum(axis=0)
        tokens, documents, cut = (int(counts[STATE_FIELDS.index(name)]) for name in ("tokens", "documents", "cut"))
        return _Epoch(spent, tokens, documents, short(cut / documents), first, resident or None)

    def _blocks(self) -> Iterator[Block]:
        (config,) = self._data.sources.values()
        source = config.resolve()
        for file in range(len(source.files)):
            yield from source.open(file, 0)

    def _paths(self) -> list[str]:
        (config,) = self._data.sources.values()
        return list(config.resolve().files)

    def _read(self) -> float:
        """Returns CPU seconds of reading."""
        watch = Stopwatch()
        for _ in self._blocks():
            pass
        return watch.spent().cpu

    def _tokenize(self, tokenizer: Tokenizer) -> tuple[int, int, float]:
        """Returns (characters, tokens with one end-of-document token each, CPU seconds of the tokenizer alone)."""
        characters, tokens, seconds = 0, 0, 0.0
        for texts in _chunks(self._blocks()):
            watch = Stopwatch()
            ids, lengths = tokenizer.encode_batch(texts)
            seconds += watch.spent().cpu
            characters += sum(map(len, texts))
            tokens += len(ids) + len(lengths)
        return characters, tokens, seconds


def _chunks(blocks: Iterator[Block]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for block in blocks:
        for text in block["text"]:
            chunk.append(text)
            size += len(text)
            if size >= CHUNK_CHARACTERS:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _share(part: Sequence[float], whole: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(part, whole, strict=True)), 4)


def resident_mb() -> float | None:
    """Returns resident memory of the process in 10^6 bytes; None if the system does not report it."""
    statm = pathlib.Path("/proc/self/statm")
    if not statm.exists():
        return None
    return short(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
