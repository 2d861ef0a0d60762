"""`bench engines`: the data path on one core with fastokens and with `tokenizers`, in turns, for four families of BPE.

One byte-level BPE is trained; the families share its merges and differ in the pre-tokenizer, which decides what an
engine costs. The usual pipeline (plain.py, if torch is installed) encodes with `tokenizers`, as everyone's does.
"""

import tempfile
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from jaxtrain.cli import Command, Flag, Flags
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.plan import Plan
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer
from jaxtrain.tokenizers.training import TrainTokenizer
from tools.bench import corpus, plain, stream
from tools.bench.common import Stopwatch, at_least_one, median, one_core, progress, ratio, result, rounds_flag

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(regex: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]


_FAMILIES: dict[str, list[Any]] = {
    "gpt2": [pre_tokenizers.ByteLevel(False)],
    "llama3": _split(_LLAMA3),
    "qwen2": _split(_LLAMA3.replace("{1,3}", "")),
    "smollm2": [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)],
}

COMMAND = Command(
    name="python -m tools.bench engines",
    description="The data path's nanoseconds of CPU a token on one core with each engine of a byte-level BPE "
    "tokenizer, with rows of 2,048 and of 8 tokens, and those of datasets and DataLoader with tokenizers.",
    examples=("python -m tools.bench engines", "python -m tools.bench engines --megabytes=8 --families=llama3"),
    flags=(
        Flag(name="megabytes", type=float, default=24.0, help="millions of characters of an epoch"),
        Flag(name="vocab_size", type=int, default=32_000, help="tokens of the tokenizers"),
        Flag(name="families", type=tuple[str, ...], default=tuple(_FAMILIES), help="the families to measure"),
        rounds_flag(3),
    ),
    config="none",
)


class _Reference:
    """A tokenizer that encodes with the library that defines its ids."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.encode_batch = tokenizer.reference

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def measure(flags: Flags) -> Json:
    at_least_one(rounds=flags.rounds)
    if not set(flags.families) <= _FAMILIES.keys():
        raise UserError(f"--families={','.join(flags.families)}: give some of {', '.join(_FAMILIES)}")
    found: Json = {"settings": {flag.name: getattr(flags, flag.name) for flag in COMMAND.flags}}
    with tempfile.TemporaryDirectory() as folder, one_core() as found["one_core"]:
        paths = corpus.write(folder, flags.megabytes, files=4, groups=64)
        data = stream.config(paths, num_lanes=8, workers=1)
        trainer = TrainTokenizer(kind="bpe", vocab_size=flags.vocab_size, threads=1)
        trainer.train(corpus.documents(min(flags.megabytes, 8)), folder, progress=False)
        for family in flags.families:
            tokenizer = Tokenizer.from_file(f"{folder}/tokenizer/tokenizer.json")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_FAMILIES[family])
            tokenizer.save(f"{folder}/{family}.json")
            found[family] = _family(f"{folder}/{family}.json", data, paths, flags.rounds)
    return result("engines", found, device=False)


def _family(path: str, data: DataConfig, paths: list[str], rounds: int) -> Json:
    watch = Stopwatch()
    fast = HuggingFaceTokenizer(name=path, eos_token="<|endoftext|>", engine="fastokens", threads=1).build("")
    check = watch.spent().cpu
    reference = _Reference(fast)
    long, short = (stream.endless_plan(data, seq_len=t, batch_size=65536 // t) for t in (2048, 8))
    _path(data, long, fast)  # fills the engine's caches, as the first seconds of a run do
    ns: dict[str, list[float]] = {}
    for number in range(1, rounds + 1):
        seconds, tokens = _alone(data, fast)
        now = {
            "fastokens": _path(data, long, fast),
            "fastokens_rows_of_8": _path(data, short, fast),
            "fastokens_alone": 1e9 * seconds / tokens,
            "reading_alone": 1e9 * _alone(data, None)[0] / tokens,
            "tokenizers": _path(data, long, reference),
        }
        if plain.is_installed():
            spent, given = plain.epoch(paths, reference, long.stages[0])
            now["usual"] = 1e9 * spent.cpu / given
        for name, each in now.items():
            ns.setdefault(name, []).append(each)
        progress(f"{path}, round {number} of {rounds}: " + ", ".join(f"{name} {one:.1f}" for name, one in now.items()))
    times = {name: ratio(ns[name], ns["fastokens"]) for name in ("tokenizers", "usual") if name in ns}
    return {
        "ns_per_token": {name: median(each) for name, each in ns.items()},
        "times": times,
        "check_cpu_seconds": check,
    }


def _path(data: DataConfig, plan: Plan, tokenizer: Any) -> float:
    """Returns the CPU nanoseconds a token of one epoch, from opening the source to the last batch."""
    watch, tokens = Stopwatch(), 0
    with stream.batches(data, plan, tokenizer) as batches:
        for batch in batches:
            tokens += batch.arrays["tokens"].size
            if batch.ended:
                break
        return 1e9 * watch.spent().cpu / tokens


def _alone(data: DataConfig, tokenizer: Any | None) -> tuple[float, int]:
    """Returns the CPU seconds of encoding the epoch's documents, or of reading them, and the tokens."""
    (config,) = data.sources.values()
    source = config.resolve()
    seconds, tokens = 0.0, 0
    for file in range(len(source.files)):
        watch = Stopwatch()
        blocks = list(source.open(file, 0))
        if tokenizer is not None:
            watch = Stopwatch()
            tokens += sum(sum(tokenizer.encode_batch(block["text"])[1] + 1) for block in blocks)
        seconds += watch.spent().cpu
    return seconds, tokens
