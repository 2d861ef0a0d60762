"""Trains a tokenizer on the run's document stream."""

import dataclasses
import io
import itertools
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from jaxtrain import cli
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.plan.stable_hash import philox
from jaxtrain.tokenizers import files
from jaxtrain.tokenizers.engine import check_engine
from jaxtrain.tokenizers.hf import HFTokenizer
from jaxtrain.tokenizers.identity import well_formed
from jaxtrain.tokenizers.sentencepiece import SentencePieceTokenizer, check_threads

# Written last, so its presence marks the tokenizer as complete.
_SETTINGS = "training.json"
# sentencepiece silently drops longer inputs (its default limit).
_PIECE_BYTES = 4192
# Fixed, because the result depends on it: each thread sums its own share of the likelihoods.
_TRAINING_THREADS = 16
_END_OF_TEXT = "<|endoftext|>"
# Of a vocabulary: far above any that is used, and what the libraries' integers hold.
_MOST_TOKENS = 10_000_000
_OWN_TOKENS = ("<unk>", "<s>", "</s>", _END_OF_TEXT)
# The round-trip check uses the first documents, which come from all lanes.
_CHECKED_DOCUMENTS, _CHECKED_CHARACTERS = 64, 20_000
# Pre-tokens within which byte-level BPE merges: English contractions, words with combining marks and the preceding
# space, up to three digits, punctuation with the following line ends, blank lines with their indentation, other spaces.
_WORDS = r"'(?i:[sdmt]|ll|re|ve)| ?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LOGGED_DOCUMENTS = 10_000  # minimum between two progress lines

logger = logging.getLogger("jaxtrain")


class NotTrainedError(UserError):
    """The config trains its tokenizer, but the work directory does not contain it yet."""


@dataclasses.dataclass(kw_only=True)
class TrainTokenizer:
    """A tokenizer trained on the run's mixed stream before the first step, and saved in `workdir/tokenizer`.

    With byte_fallback every text round-trips: spaces, tabs, line ends and any character. The same documents produce the
    same tokenizer, bit for bit, on any machine with the same library version.

    Attributes:
        kind: "sentencepiece", or "bpe" (byte-level, tokenizer.json).
        vocab_size: number of tokens, including special ones. Too little text yields fewer, which is logged.
        max_samples: number of documents to train on.
        model_type: "unigram" or "bpe"; sentencepiece only.
        byte_fallback: spell unknown characters in bytes instead of replacing them with one unknown token;
            sentencepiece only.
        character_coverage: fraction of the text's characters that get their own token, above 0 and at most 1;
            sentencepiece only.
        sample_mb: megabytes of text in a uniform sample of all documents. sentencepiece trains in memory, which takes
            about 25 times as much for "unigram" and 20 times for "bpe". sentencepiece only; `kind="bpe"` keeps the
            distinct words of all documents with their counts.
        special_tokens: reserved for later use (chat roles, tools). Their ids follow the end-of-document token and, for
            sentencepiece, the ids before it: 3, 4, ... for "sentencepiece", 1, 2, ... for "bpe". No text encodes to
            them.
        threads: as in HuggingFaceTokenizer; for encoding only.
        engine: as in HuggingFaceTokenizer; for kind="bpe" only.
    """

    kind: str = "sentencepiece"
    vocab_size: int = 32_000
    max_samples: int = 1_000_000
    model_type: str = "unigram"
    byte_fallback: bool = True
    character_coverage: float = 0.9995
    sample_mb: float = 64.0
    special_tokens: tuple[str, ...] = ()
    threads: int | None = None
    engine: str = dataclasses.field(default="auto", metadata={cli.BEFORE: "tokenizers"})

    def check(self) -> None:
        if self.kind not in ("sentencepiece", "bpe"):
            raise ValueError(f"kind={self.kind!r}: give 'sentencepiece' or 'bpe'")
        if self.model_type not in ("unigram", "bpe"):
            raise ValueError(f"model_type={self.model_type!r}: give 'unigram' or 'bpe'")
        least = 300 + len(self.special_tokens)
        if self.vocab_size < least and (self.kind == "bpe" or self.byte_fallback):
            raise ValueError(
                f"vocab_size={self.vocab_size}: it must hold 256 bytes and the special tokens; give {least} or more"
            )
        if self.vocab_size > _MOST_TOKENS:
            raise ValueError(f"vocab_size={self.vocab_size}: give at most {_MOST_TOKENS:,}")
        if self.max_samples < 1:
            raise ValueError(f"max_samples={self.max_samples}: give the number of documents to train on, at least 1")
        if not 0 < self.character_coverage <= 1:
            raise ValueError(f"character_coverage={self.character_coverage}: give a share above 0, at most 1")
        if self.sample_mb <= 0:
            raise ValueError(f"sample_mb={self.sample_mb}: give the megabytes of text to keep, above 0")
        for token in self.special_tokens:
            if token in _OWN_TOKENS or re.fullmatch(r"<0x..>|", token) or re.search(r"[\s\u2581]", token):
                raise ValueError(
                    f"special_tokens={self.special_tokens}: {token!r} has another meaning; give names without spaces, "
                    "for example <|user|>"
                )
        if len(set(self.special_tokens)) < len(self.special_tokens):
            raise ValueError(f"special_tokens={self.special_tokens}: one is listed twice; give each once")
        check_threads(self.threads)
        check_engine(self.engine)

    def needs_training(self, workdir: epath.PathLike) -> bool:
        """Whether `train` must run before `build`."""
        return not (epath.Path(workdir) / "tokenizer" / _SETTINGS).exists()

    def train(
        self, documents: Iterable[str], workdir: epath.PathLike, progress: bool = True
    ) -> HFTokenizer | SentencePieceTokenizer:
        """Trains on the first `max_samples` documents and saves the result in the work directory. One process only."""
        return train(self, documents, epath.Path(workdir) / "tokenizer", progress)

    def build(self, workdir: epath.PathLike) -> HFTokenizer | SentencePieceTokenizer:
        """Loads the tokenizer that `train` saved in the work directory.

        Raises:
            NotTrainedError: `train` has not run yet.
            UserError: the saved tokenizer was trained with other settings.
        """
        folder = epath.Path(workdir) / "tokenizer"
        if self.needs_training(workdir):
            raise NotTrainedError(
                f"{folder} holds no tokenizer yet: start the training in this work directory, or run "
                f"python -m tools.train_tokenizer with --output={folder}"
            )
        try:
            saved = {**json.loads((folder / _SETTINGS).read_text())["settings"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / _SETTINGS} is damaged ({error!r}): restore it from a copy") from error
        now = self._settings()
        changed = [name for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
        if changed:
            lines = [f"  {name}: {saved.get(name)} there, {now.get(name)} in the config" for name in changed]
            raise UserError(
                "\n".join([f"{folder} was trained with other settings; delete it, or use these settings:", *lines])
            )
        return self._load(files.read(folder), self.engine, workdir)

    def _load(
        self, tokenizer_files: files.TokenizerFiles, engine: str = "tokenizers", workdir: epath.PathLike = ""
    ) -> HFTokenizer | SentencePieceTokenizer:
        if self.kind == "bpe":
            return HFTokenizer(tokenizer_files, threads=self.threads, engine=engine, workdir=workdir)
        return SentencePieceTokenizer(tokenizer_files, threads=self.threads)

    def _settings(self) -> Json:
        """The fields that determine the result."""
        names = ["kind", "vocab_size", "max_samples"]
        if self.kind == "sentencepiece":
            names += ["model_type", "byte_fallback", "character_coverage", "sample_mb"]
        special = {"special_tokens": list(self.special_tokens)} if self.special_tokens else {}
        return {name: getattr(self, name) for name in names} | special


def train(
    config: TrainTokenizer, documents: Iterable[str], folder: epath.PathLike, progress: bool = True
) -> HFTokenizer | SentencePieceTokenizer:
    """Trains a tokenizer and writes it into a new or empty folder, atomically.

    Args:
        config: settings of the tokenizer.
        documents: texts to train on; at most `config.max_samples` are read.
        folder: output folder.
        progress: whether to show progress.

    Raises:
        UserError: the folder is not empty, there are no documents, or the vocabulary is too small for them. Errors
            from `documents` propagate.
    """
    check_free(folder)
    folder = epath.Path(folder)
    seen = _Counted(itertools.islice(documents, config.max_samples), config.max_samples, progress)
    if config.kind == "bpe":
        content = _train_bpe(config, seen)
    else:
        content = {files.SENTENCEPIECE_MODEL: _train_sentencepiece(config, seen)}
    tokenizer = config._load(files.TokenizerFiles(str(folder), content))
    if tokenizer.vocab_size != config.vocab_size:
        logger.warning("Requested %d tokens, but the documents yield only %d.", config.vocab_size, tokenizer.vocab_size)
    record = {"settings": config._settings(), "samples": seen.count, "identity": tokenizer.identity}
    files.publish(tokenizer.content() | {_SETTINGS: json.dumps(record, indent=2).encode()}, folder)
    tokenizer = config._load(files.read(folder))
    _check_round_trip(tokenizer, seen.first)
    logger.info("Tokenizer trained and saved to %s", folder)
    return tokenizer


def _check_round_trip(tokenizer: HFTokenizer | SentencePieceTokenizer, texts: list[str]) -> None:
    """Logs whether the texts round-trip, and where the first that does not differs."""
    texts = well_formed(texts)
    ids, lengths = tokenizer.encode_batch(texts)
    pieces = np.split(ids, np.cumsum(lengths)[:-1])
    pairs = [(text, tokenizer.decode(piece)) for text, piece in zip(texts, pieces, strict=True)]
    wrong = [(number, text, back) for number, (text, back) in enumerate(pairs) if text != back]
    if not wrong:
        logger.info("Round trip: all %d sample documents decode to their exact text.", len(texts))
        return
    number, text, back = wrong[0]
    at = next((index for index, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), len(min(text, back)))
    logger.warning(
        "Round trip: %d of %d sample documents do not decode to their text. In document %d, from character %d, %r "
        "became %r. byte_fallback=true preserves every text.",
        *(len(wrong), len(texts), number, at, text[at : at + 20], back[at : at + 20]),
    )


def check_free(folder: epath.PathLike) -> None:
    """Raises UserError if the folder is not empty."""
    folder = epath.Path(folder)
    if (folder / _SETTINGS).exists():
        raise UserError(f"{folder} already holds a tokenizer: delete it, or choose another")
    # On an object store, leftovers of a killed run are overwritten.
    if files.is_local(folder) and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: delete it, or choose another")


class _Counted:
    """Counts documents, with a progress bar, or off a terminal a line per tenth. Raises UserError if there are none.

    Attributes:
        count: documents so far.
        first: the beginnings of the first documents, for the round-trip check.
    """

    def __init__(self, documents: Iterator[str], expected: int, progress: bool):
        self.count = 0
        self.first: list[str] = []
        self._expected = expected
        hidden = None if progress else True  # None: hidden unless the output is a terminal
        self._bar = tqdm(documents, desc="Tokenizer", total=expected, unit=" documents", disable=hidden)

    def __iter__(self) -> Iterator[str]:
        with self._bar:
            for document in self._bar:
                self.count += 1
                if len(self.first) < _CHECKED_DOCUMENTS:
                    self.first.append(document[:_CHECKED_CHARACTERS])
                if self._bar.disable and self.count % max(self._expected // 10, _LOGGED_DOCUMENTS) == 0:
                    logger.info("Tokenizer: %s of %s documents", f"{self.count:,}", f"{self._expected:,}")
                yield document
        if not self.count:
            raise UserError("there are no documents to train a tokenizer on: check the sources")
        logger.info("Collected %d samples for tokenizer...", self.count)


def _train_bpe(config: TrainTokenizer, documents: Iterable[str]) -> dict[str, bytes]:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[_END_OF_TEXT, *config.special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((well_formed([document])[0] for document in documents), trainer)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.model.save(folder)
        content = {name: (epath.Path(folder) / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    config_json = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END_OF_TEXT}
    return content | {
        files.TOKENIZER_JSON: tokenizer.to_str(pretty=True).encode(),
        files.TOKENIZER_CONFIG: json.dumps(config_json).encode(),
    }


def _train_sentencepiece(config: TrainTokenizer, documents: Iterable[str]) -> bytes:
    # Read all documents first: the library would wrap their errors in its own.
    sample = _fair_sample(_pieces(documents), int(config.sample_mb * 1e6) // _PIECE_BYTES + 1)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            # Accept fewer pieces if the text has too few, instead of failing.
            hard_vocab_limit=False,
            byte_fallback=config.byte_fallback,
            character_coverage=config.character_coverage,
            control_symbols=list(config.special_tokens),
            num_threads=_TRAINING_THREADS,
            max_sentence_length=_PIECE_BYTES,
            # Together these ensure decode(encode(text)) == text.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Indentation becomes one token; numbers split into digits.
            allow_whitespace_only_pieces=True,
            split_digits=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"vocab_size={config.vocab_size}: sentencepiece cannot train that on these documents ({error}); change "
            "vocab_size, max_samples or character_coverage"
        ) from error
    return model.getvalue()


def _pieces(documents: Iterable[str]) -> Iterator[bytes]:
    """Cuts documents into UTF-8 pieces of at most _PIECE_BYTES, before a line end or a space if possible.

    The library strips trailing line ends from its input, so line ends stay at the beginning of a piece.
    """
    for document in documents:
        text = well_formed([document])[0].encode()
        start = 0
        while len(text) - start > _PIECE_BYTES:
            end = start + _PIECE_BYTES
            cut = text.rfind(b"\n", start + 1, end)
            if cut < 0:
                cut = text.rfind(b" ", start + 1, end)
            if cut < 0:
                cut = end
                while text[cut] & 0xC0 == 0x80:  # inside a character
                    cut -= 1
            yield text[start:cut]
            start = cut
        if start < len(text):
            yield text[start:]


def _fair_sample(pieces: Iterable[bytes], size: int) -> list[bytes]:
    """Returns at most `size` pieces, a uniform sample (Vitter 1985, "Random sampling with a reservoir", R)."""
    random = philox("tokenizer sample")
    sample: list[bytes] = []
    for i, piece in enumerate(pieces):
        if i < size:
            sample.append(piece)
        elif (j := int(random.random_raw()) % (i + 1)) < size:
            sample[j] = piece
    return sample
