"""fastokens in place of `tokenizers`, where it is proved to give the same ids.

`tokenizers` defines the ids. fastokens encodes 15 to 100 times as many tokens per CPU second
(docs/design/tokenizer.md), and serves a tokenizer only after a check: both libraries encode every code point in several
contexts, hard texts, and the tokenizer's own tokens. The result is kept in the work directory.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from etils import epath

from jaxtrain.interfaces import Json
from jaxtrain.plan.stable_hash import philox
from jaxtrain.tokenizers.identity import PROBE, well_formed

ENGINES = ("auto", "fastokens", "tokenizers")
# Part of a record's name. Raise it when the check or the rewritten pre-tokenizers change.
_CHECK = 1
# Characters to encode before the check begins, which costs as much as some 8 million. Tools and small runs have fewer.
_WORTH_IT = 4_000_000
_MANY = 50_000  # characters encoded at once
# \s of `tokenizers`, Unicode's White_Space. For fastokens, whose regex engine is PCRE2, it also contains U+180E.
_SPACE = r"\t-\r \x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}"

Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]

logger = logging.getLogger("jaxtrain")


def check_engine(engine: str) -> None:
    """Raises ValueError if there is no such engine."""
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}: give one of {', '.join(ENGINES)}")


class FastEngine:
    """Encodes one tokenizer's texts with fastokens once that is proved.

    Attributes:
        encode: as Tokenizer.encode_batch; None until the proof, and for good if it fails.
        refused: why it will not serve; None if it does or may yet.
    """

    def __init__(
        self,
        spec: Callable[[], Json],
        reference: Encode,
        tokens: Callable[[], Sequence[str]],
        identity: Json,
        workdir: epath.PathLike,
    ):
        """Does nothing yet: see `note` and `start`.

        Args:
            spec: returns the tokenizer.json with which the reference encodes.
            reference: encodes with `tokenizers`.
            tokens: returns the vocabulary's texts, special tokens included, which the check encodes too.
            identity: the tokenizer's identity.
            workdir: keeps the check's result; "" to keep none.
        """
        self.encode: Encode | None = None
        self.refused: str | None = None
        self._spec, self._reference, self._tokens = spec, reference, tokens
        self._identity, self._workdir = identity, workdir
        self._left = _WORTH_IT
        self._looked = False  # for an earlier check's result
        self._lock = threading.Lock()

    def note(self, characters: int) -> None:
        """Counts what the reference encodes instead, and calls `start` in the background if it is worth it.

        An earlier check's result is used at once, from the first batch of documents on: it loads in less time than the
        reference takes for that batch.
        """
        with self._lock:
            if characters >= _MANY and self._left > 0 and not self._looked:
                self._looked = True
                if self._is_checked():
                    self._left = 0
                    self.start()
            begins = 0 < self._left <= characters
            self._left -= characters
        if begins:
            # Not a daemon: the interpreter must not be torn down while it is in the library. It ends with the main
            # thread, after the texts at hand.
            threading.Thread(target=self.start, name="jaxtrain-check", daemon=False).start()

    def start(self, points: Container[int] = range(0x110000)) -> None:
        """Lets fastokens serve if an earlier check has found it equal, or one that runs now.

        Args:
            points: the code points to check.
        """
        try:
            # Imported here: it is optional, and most tools have little to encode.
            import fastokens

            version = importlib.metadata.version("fastokens")
        except ImportError as error:
            self._refuse(f"fastokens cannot be imported ({error})")
            return
        spec = self._spec()
        # Without what adds tokens or cuts, and what is random in training.
        spec |= dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
        spec["model"] = {**spec["model"], "dropout": None}

        def load(pre_tokenizer: Json | None) -> Encode:
            text = json.dumps(spec | {"pre_tokenizer": pre_tokenizer})
            return functools.partial(_encode, fastokens.Tokenizer.from_json_str(text).encode_batch_flat)

        record = self._record(version)
        found = _read(record) if record is not None else {}
        if "pre_tokenizer" in found:
            self.encode = load(found["pre_tokenizer"])
        elif not found:
            begun = time.monotonic()
            found = self._check(spec.get("pre_tokenizer"), load, points)
            if found is None:
                return
            logger.info("Tokenizer: checked fastokens in %.1f s.", time.monotonic() - begun)
            if record is not None:
                _write(record, json.dumps(found))
        if "refused" in found:
            self._refuse(f"fastokens {version} {found['refused']}")
        else:
            logger.info("Tokenizer: encoding with fastokens %s, which gives the same ids as tokenizers.", version)

    def _check(
        self, pre_tokenizer: Json | None, load: Callable[[Json | None], Encode], points: Container[int]
    ) -> Json | None:
        """Returns the pre-tokenizer that was proved, or the reason against it; None if the process is exiting."""
        refused = ""
        for candidate in candidates(pre_tokenizer):
            try:
                encode = load(candidate)
                for texts in check_texts(self._tokens(), points):
                    if not threading.main_thread().is_alive():
                        return None
                    text = _difference(texts, encode, self._reference)
                    if text is not None:
                        refused = f"gives other ids for {text!r}"
                        break
                else:
                    self.encode = encode
                    return {"pre_tokenizer": candidate}
            except ValueError as error:
                refused = f"cannot read this tokenizer ({error})"
        return {"refused": refused}

    def _record(self, version: str) -> epath.Path | None:
        """The file that keeps the result of this check of this tokenizer by these libraries on this kind of machine."""
        if not self._workdir:
            return None
        key = [_CHECK, tokenizers.__version__, version, platform.machine()]
        key += [self._identity[name] for name in ("hash", "eos_id", "bos_id")]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return epath.Path(self._workdir) / "cache" / "tokenizers" / f"{digest[:16]}.json"

    def _is_checked(self) -> bool:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            record = self._record(importlib.metadata.version("fastokens"))
            return record is not None and record.exists()
        return False

    def _refuse(self, why: str) -> None:
        self.refused = why
        logger.info("Tokenizer: encoding with tokenizers, since %s.", why)


def _encode(flat: Callable[..., tuple[bytes, bytes]], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """As Tokenizer.encode_batch, by fastokens' `encode_batch_flat`."""
    try:
        ids, offsets = flat(texts, split_special_tokens=True)
    except UnicodeEncodeError:
        ids, offsets = flat(well_formed(texts), split_special_tokens=True)
    # uint32 and uint64 as signed: ids and offsets are far below 2^31 and 2^63.
    return np.frombuffer(ids, np.int32), np.diff(np.frombuffer(offsets, np.int64))


def _read(path: epath.Path) -> Json:
    """Returns a kept result; {} if there is none or it cannot be read, so that the check runs again."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        if isinstance(found, dict) and ("pre_tokenizer" in found or isinstance(found.get("refused"), str)):
            return found
    return {}


def _write(path: epath.Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}.tmp")
        half.write_text(text)
        half.replace(path)
    except OSError as error:
        logger.warning("The check of the tokenizer will be repeated: its result cannot be kept (%s).", error)


def candidates(pre_tokenizer: Json | None) -> list[Json | None]:
    """The pre-tokenizers with which fastokens may split texts as `tokenizers` does with this one, fastest first."""
    steps: list[Any] = (
        pre_tokenizer["pretokenizers"] if pre_tokenizer and pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    )
    if [step and step["type"] for step in steps] == ["Digits", "ByteLevel"]:
        # SmolLM2, StarCoder2: 4 times as fast as one regex.
        digits, byte_level = steps
        if digits["individual_digits"] and byte_level.get("use_regex", True) and not byte_level["add_prefix_space"]:
            split = {"type": "Split", "pattern": {"Regex": _single_digits()}, "behavior": "Isolated", "invert": False}
            return [_sequence([split, byte_level | {"use_regex": False}]), pre_tokenizer]
    spaced = [
        step | {"pattern": {"Regex": _with_spaces(step["pattern"]["Regex"])}}
        if step and step["type"] == "Split" and "Regex" in step["pattern"]
        else step
        for step in steps
    ]
    # fastokens has fast code for the patterns of some families, which it knows by their spelling.
    return [pre_tokenizer] if spaced == steps else [pre_tokenizer, _sequence(spaced)]


def _sequence(steps: list[Json]) -> Json:
    return {"type": "Sequence", "pretokenizers": steps}


@functools.cache
def _single_digits() -> str:
    """GPT-2's regex (of ByteLevel) for text whose digits stand alone. A space before a digit does not join it."""
    # Which characters those are depends on the Unicode version that the library was built with, so it is asked.
    text = "".join(map(chr, _valid(range(0x110000))))
    # Runs of others and of digits alternate.
    runs = tokenizers.pre_tokenizers.Digits(individual_digits=False).pre_tokenize_str(text)[1::2]
    digits = "".join(rf"\x{{{ord(text[first]):X}}}-\x{{{ord(text[end - 1]):X}}}" for _, (first, end) in runs)
    return (
        rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+|[{digits}]| ?[^{_SPACE}\p{{L}}{digits}]+"
        rf"|[{_SPACE}]+(?=[{digits}])|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
    )


def _with_spaces(regex: str) -> str:
    r"""The regex with \s and \S spelled out."""

    depth = 0

    def spelled(found: re.Match[str]) -> str:
        nonlocal depth
        part = found[0]
        depth += (part == "[") - (part == "]")
        if part == r"\s":
            return _SPACE if depth else f"[{_SPACE}]"
        return f"[^{_SPACE}]" if part == r"\S" and not depth else part

    return re.sub(r"\\.|[\[\]]", spelled, regex)


# Contractions in all cases, with characters whose lower case is ASCII (U+017F, U+212A).
_CONTRACTIONS = "I'm you're we've they'll he'd it's CAN'T I'M YOU'RE We'Ve 's's 'S'll'LL don’t x'ſ y'K l'été ''s '"
_DIGITS = (
    "0 1 12 123 1234 12345 1234567890 1,234,567.89 3.14e-10 0x1F 007 12½ Ⅷ٣ १२३ 1\u0301 ²³ ①② 一二 a1b22c333 £5 10%"
)
_MARKS = (
    "e\u0301 E\u0323\u0301 a\u0328\u0301 \u0301x q\u0307\u0323 Å\u030a \u212b \u2126 \u1e9b\u0323 ﬁ ǆ İi̇ ß ẞ \u0344 "
    "\u0958 क्षि ന്‍ ঙ্ক ที่ เก๋ \u1112\u1161\u11ab 각\u11a8 \u06e0\u07fd \ufb2c \u0f71\u0f72 مَرْحَبًا שָׁלוֹם"
)
_EMOJI = (
    "\U0001f600 \u2764\ufe0f \U0001f44d\U0001f3fd \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea "
    "1\ufe0f\u20e3 \U0001f3f4\U000e0067\U000e0062\U000e007f \U0001f3f3\ufe0f\u200d\U0001f308"
)
_SPACES = (
    "a b  c   d    e\tf\t\tg \th\t i\nj\n\nk\n\n\nl \n m\n n\r\no\r\n\r\np\rq\n\rr\vs\ft\x85u\xa0v\u1680w\u2000x\u2009 "
    "y\u2028z\u2029A\u202fB\u205fC\u3000D \u3000 E  \u180eF\u200bG\ufeffH\x00I\x1c\x1d\x1e\x1fJ\x7fK   \n\n  \t1  2\n3 "
)
_SCRIPTS = (
    "Καλημέρα κόσμε, ΣΊΣΥΦΟΣ; Привет, мир! Ёлка ЩИ Բարեւ გამარჯობა שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก "
    "你好，世界。「引用」 こんにちは、カタカナｶﾅ 안녕하세요 Xin chào thế giới ሰላም ᏣᎳᎩ 𐌰𐌱 𝔘𝔫𝔦 𝟙𝟚 Ａｂｃ１２３ ĲsselŁódź"
)
_CODE = (
    "def f(x): return x**2 + 1e-5  # camelCase HTTPServer snake_case iPhone15Pro\n\tif (a != b) && !c { return [i]; }\n"
    "<div class='x'>&nbsp;</div> https://a.b/c?d=e&f=%20#g user@host.org C:\\dir\\n $\\frac{a}{b}$ ////!!!...---===\n"
)
HARD_TEXTS = (PROBE, _CONTRACTIONS, _DIGITS, _MARKS, _EMOJI, _SPACES, _SCRIPTS, _CODE)


def check_texts(tokens: Sequence[str], points: Container[int]) -> Iterator[list[str]]:
    """Yields batches of texts that show whether two libraries encode identically, the most revealing first.

    Args:
        tokens: texts of the vocabulary.
        points: the code points to encode.
    """
    yield [*HARD_TEXTS, *(text[::-1] for text in HARD_TEXTS), ""]
    # Runs, around 16 bytes and 64 KiB, where fastokens changes its method, with and without other text at both ends.
    runs = [part * -(-size // len(part)) for part in "a \n\t0!é中\u0301" for size in (2, 3, 15, 16, 17, 40, 1000)]
    yield [text for run in runs for text in (run, f"x{run}y", f" {run}1", f"{run}\n")]
    yield [part * (70_000 // len(part)) for part in ("ab1 ", "\r\n ", " ", "Été, 中文! ")]
    # The characters of the hard texts in other orders, in short texts and in a long one.
    characters = "".join(HARD_TEXTS)
    words = philox("tokenizer check").random_raw(100_000) % len(characters)
    mixed = "".join(map(characters.__getitem__, words.tolist()))
    yield [*(mixed[start : start + 50] for start in range(0, len(mixed), 50)), mixed]
    for start in range(0, len(tokens), 4000):
        some = tokens[start : start + 4000]
        yield ["".join(some[first : first + 100]) for first in range(0, len(some), 100)]
        yield [f"{a}{b} {a} {b}\n" for a, b in zip(some[::2], some[1::2], strict=False)]
    # Characters of the first two planes may be of any kind. Elsewhere, and in the large blocks of ideographs, Hangul
    # and private use, a block behaves uniformly, and a space before each reveals most. The cost is that of the tokens.
    texts: list[str] = []
    for first in range(0, 0x110000, 256):
        block = [chr(point) for point in _valid(range(first, first + 256)) if point in points]
        if first < 0x20000 and not (0x3400 <= first < 0xA000 or 0xAC00 <= first < 0xD800 or 0xE000 <= first < 0xF900):
            texts.append("".join(f"a{c}1234 {c}{c}the\n{c}  {c}'s!" for c in block))
        else:
            texts.append("".join(f" {c}" for c in block))
        if len(texts) == 64:
            yield texts
            texts = []
    yield texts


def _valid(points: Iterable[int]) -> list[int]:
    """The code points without surrogates."""
    return [point for point in points if not 0xD800 <= point < 0xE000]


def _difference(texts: list[str], encode: Encode, reference: Encode) -> str | None:
    """Returns a short text that `encode` encodes differently; None if all of `texts` agree."""
    if all(map(np.array_equal, encode(texts), reference(texts))):
        return None

    def differs(text: str) -> bool:
        return not np.array_equal(encode([text])[0], reference([text])[0])

    text = next(filter(differs, texts))
    while len(text) > 8:
        half = len(text) // 2
        shorter = next(filter(differs, (text[:half], text[half:], text[half // 2 : half // 2 + half])), None)
        if shorter is None:
            break
        text = shorter
    return text
