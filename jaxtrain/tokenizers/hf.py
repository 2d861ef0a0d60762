"""Hugging Face tokenizers (`tokenizer.json`), from a folder or the Hub."""

import dataclasses
import itertools
import json
import logging
import os
import uuid
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import tokenizers
from etils import epath

from jaxtrain import cli
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.tokenizers import files
from jaxtrain.tokenizers.engine import Encode, FastEngine, check_engine
from jaxtrain.tokenizers.identity import PROBE, identity, well_formed
from jaxtrain.tokenizers.sentencepiece import SentencePieceTokenizer, check_threads

logger = logging.getLogger("jaxtrain")


@dataclasses.dataclass(kw_only=True)
class HuggingFaceTokenizer:
    """An existing tokenizer: `tokenizer.json` if present, else a sentencepiece `tokenizer.model`.

    Attributes:
        name: a folder or file (local, gs://, s3://), or a model id on the Hub.
        revision: a branch, tag or commit on the Hub; None for the newest. A resume compares the files' hash.
        eos_token: text of the token that ends a document, such as "</s>"; None for the one in the files.
        bos_token: text of the token that begins a document; None for the one in the files.
        threads: threads that encode a batch; None for all cores of the process, and for fastokens for one, since the
            data path encodes several batches at a time. Does not affect results. For tokenizer.json it sizes the thread
            pools of the whole process, once, unless RAYON_NUM_THREADS or FASTOKENS_BPE_THREADS are set.
        vocab_size: number of ids, for tools that plan offline (tools.compile_check, tools.estimate). A run uses the
            files' number and warns if it differs.
        engine: library that encodes with a tokenizer.json. "tokenizers" defines the ids. "auto" takes fastokens where a
            check shows that it gives the same, see engine.py; "fastokens" checks before the first text and ends the run
            if it does not. May change at any resume.
    """

    name: str
    revision: str | None = None
    eos_token: str | None = None
    bos_token: str | None = None
    threads: int | None = None
    vocab_size: int | None = None
    engine: str = dataclasses.field(default="auto", metadata={cli.BEFORE: "tokenizers"})

    def check(self) -> None:
        if not self.name:
            raise ValueError("name='': give a folder, a file or the id of a model on the Hub")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size}: give the number of ids, or none")
        check_threads(self.threads)
        check_engine(self.engine)

    def build(self, workdir: str) -> "HFTokenizer | SentencePieceTokenizer":
        """Loads or downloads the tokenizer. The results of an engine's check are kept in `workdir`, unless it is "".

        Raises:
            UserError: the tokenizer does not exist or cannot encode documents.
        """
        found = files.find(self.name, self.revision)
        tokens = {"eos_token": self.eos_token, "bos_token": self.bos_token}
        if files.TOKENIZER_JSON in found.content:
            built = HFTokenizer(found, **tokens, threads=self.threads, engine=self.engine, workdir=workdir)
        elif files.SENTENCEPIECE_MODEL in found.content:
            built = SentencePieceTokenizer(found, **tokens, threads=self.threads)
        else:
            raise UserError(
                f"{found.where}: neither {files.TOKENIZER_JSON} nor {files.SENTENCEPIECE_MODEL} there; save the "
                "tokenizer with transformers' save_pretrained, or give another name"
            )
        if self.vocab_size not in (None, built.vocab_size):
            logger.warning(
                "tokenizer.vocab_size=%d, but %s has %d ids: correct it, because compile checks and estimates use it.",
                self.vocab_size,
                found.where,
                built.vocab_size,
            )
        return built


class HFTokenizer:
    """Implements interfaces.Tokenizer with the `tokenizers` library, or a faster one that gives the same ids.

    It adds no special tokens and never encodes text to one, so no document can forge its own end. It ignores
    truncation, padding and dropout settings in the files. `token_bytes` sums to the text's UTF-8 length for byte-level
    tokenizers, and for those with byte fallback and no normalization.
    """

    def __init__(
        self,
        tokenizer_files: files.TokenizerFiles,
        *,
        eos_token: str | None = None,
        bos_token: str | None = None,
        threads: int | None = None,
        engine: str = "tokenizers",
        workdir: epath.PathLike = "",
    ):
        """Loads the tokenizer.

        Args:
            tokenizer_files: the tokenizer's files.
            eos_token: as in HuggingFaceTokenizer.
            bos_token: as in HuggingFaceTokenizer.
            threads: as in HuggingFaceTokenizer.
            engine: as in HuggingFaceTokenizer.
            workdir: keeps the result of an engine's check; "" to keep none.

        Raises:
            UserError: the files are unusable, or the engine named gives other ids.
        """
        self._files = tokenizer_files
        self._fast: FastEngine | None = None
        if threads is not None:
            os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
        # With one thread it makes 244 MB per CPU second, with a pool of two 177.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", str(threads or 1))
        content = tokenizer_files.content[files.TOKENIZER_JSON]
        try:
            self._tokenizer = self._encoder = _load(content)
        except Exception as error:  # The library raises Exception itself.
            raise UserError(
                f"{tokenizer_files.where}: {files.TOKENIZER_JSON} cannot be loaded by tokenizers "
                f"{tokenizers.__version__}: {error}"
            ) from error
        spec = tokenizer_files.json(files.TOKENIZER_JSON)
        parts = json.dumps([spec.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")])
        byte_level = '"type": "ByteLevel"' in parts
        if byte_level and self._tokenizer.decoder is None:
            self._tokenizer.decoder = tokenizers.decoders.ByteLevel()
        vocabulary = self._tokenizer.get_vocab()
        # Ids may have gaps, so the token count is not a bound.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        eos_id = files.special_id(tokenizer_files, "eos_token", eos_token, vocabulary)
        if eos_id is None:
            special = [token["content"] for token in spec.get("added_tokens", ()) if token["special"]]
            raise UserError(
                f"{tokenizer_files.where}: no file there names the token that ends a document; set `eos_token`, "
                f"for example {' or '.join(map(repr, special[:5])) or 'one of its tokens'}"
            )
        self.eos_id: int = eos_id
        self.bos_id = files.special_id(tokenizer_files, "bos_token", bos_token, vocabulary)
        unknown = {vocabulary.get(spec["model"].get("unk_token")), spec["model"].get("unk_id")}
        self.spellings = self._spellings(spec, vocabulary, byte_level, unknown)
        self.token_bytes = np.array(list(map(len, self.spellings)), np.int32)
        self._renamed = self._seal(spec, unknown)
        self.identity = identity(
            self,
            "tokenizer.json",
            content,
            sealed=bool(self._renamed),
            library=tokenizers.__version__,
            revision=tokenizer_files.revision,
        )
        if engine != "tokenizers":
            self._fast = fast = FastEngine(self._spec, self._encode, self._vocabulary_texts, self.identity, workdir)
            if engine == "fastokens":
                fast.start()
                if fast.refused:
                    raise UserError(
                        f"{tokenizer_files.where}: engine='fastokens', but {fast.refused}; set `engine` to 'auto' or "
                        "'tokenizers'"
                    )

    @property
    def reference(self) -> Encode | None:
        """Encodes as `encode_batch` with the library that defines the ids; None unless a faster one may serve."""
        return self._encode if self._fast and self._fast.encode else None

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts; lone surrogates become U+FFFD.

        Args:
            texts: N texts.

        Returns:
            The ids, int32 [sum of lengths], and the lengths, int64 [N].
        """
        texts = list(texts)
        if self._fast is not None:
            if self._fast.encode is None:
                self._fast.note(sum(map(len, texts)))
            if self._fast.encode is not None:
                return self._fast.encode(texts)
        return self._encode(texts)

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            encodings = self._encoder.encode_batch_fast(well_formed(texts), add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        # 44 M tokens/s; half the time goes into the library's lists. One array per text is as fast, array.array slower
        # (28 M). Encoding itself runs at 1.5 M tokens/s per core, outside the GIL.
        ids = itertools.chain.from_iterable(encoding.ids for encoding in encodings)
        return np.fromiter(ids, np.int32, int(lengths.sum())), lengths

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids`, omitting special tokens."""
        text = [id for id in np.asarray(ids, np.int64).tolist() if id not in (self.eos_id, self.bos_id)]
        return self._tokenizer.decode(text, skip_special_tokens=True)

    def save(self, folder: epath.PathLike) -> None:
        """Writes the tokenizer's files, with a tokenizer_config.json for transformers' AutoTokenizer."""
        files.write(self.content(), folder)

    def content(self, add_bos: bool | None = None) -> dict[str, bytes]:
        """Returns the files to save, name to bytes.

        Args:
            add_bos: data.add_bos, so that transformers adds the same tokens as training. None keeps the files' rules.
        """
        token = self._tokenizer.id_to_token
        bos = None if self.bos_id is None else token(self.bos_id)
        content = files.content_to_save(self._files, {"eos_token": token(self.eos_id), "bos_token": bos}, add_bos)
        if add_bos is not None:
            spec = self._files.json(files.TOKENIZER_JSON)
            changes = {"post_processor": _post_processor(spec, (bos, self.bos_id) if add_bos else None)}
            if spec["model"].get("dropout") is not None:
                changes["model"] = spec["model"] | {"dropout": None}
            if any(spec.get(name) != value for name, value in changes.items()):
                content[files.TOKENIZER_JSON] = json.dumps(spec | changes, ensure_ascii=False, indent=2).encode()
        return content

    def _spellings(
        self, spec: Json, vocabulary: dict[str, int], byte_level: bool, unknown: Collection[int | None]
    ) -> list[bytes]:
        # Each character of a byte-level token is a byte. "▁" is a space if spaces are marked as in sentencepiece.
        byte_fallback = spec["model"].get("byte_fallback", False)
        found = [b""] * self.vocab_size
        for token, id in vocabulary.items():
            if byte_level:
                found[id] = bytes(_BYTE_LEVEL.get(character, 0xFF) for character in token)
            elif byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                found[id] = bytes.fromhex(token[3:5])
            else:
                found[id] = token.replace("\u2581", " ").encode()
        for id, added in self._tokenizer.get_added_tokens_decoder().items():
            found[id] = b"" if added.special else added.content.encode()
        for id in {self.eos_id, self.bos_id, *unknown} - {None}:
            found[id] = b""
        return found

    def _spec(self) -> Json:
        """The tokenizer.json that the encoder was loaded from."""
        spec = self._files.json(files.TOKENIZER_JSON)
        return _without(spec, self._renamed) if self._renamed else spec

    def _vocabulary_texts(self) -> list[str]:
        return self._tokenizer.decode_batch([[id] for id in range(self.vocab_size)], skip_special_tokens=False)

    def _seal(self, spec: Json, unknown: Collection[int | None]) -> set[str]:
        """Stops the encoder from matching special tokens in text. Returns those that it had to rename.

        The library matches tokens added with `special: false`, and special tokens in the vocabulary of a WordLevel,
        WordPiece or Unigram model where they stand alone in the text.

        Raises:
            UserError: this is impossible, or some texts cannot be encoded at all.
        """
        where = self._files.where
        ends = {id for id in (self.eos_id, self.bos_id) if id is not None}
        special = {id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        tokens = {id: str(self._tokenizer.id_to_token(id)) for id in (special - {*unknown}) | ends}
        # Each token by itself, at the start and end of a text, inside a word, between spaces, and alone on a line.
        texts = [f"{token} a{token}a a {token} a\n{token}\n{token}" for token in tokens.values()]
        texts += tokens.values()
        try:
            self.encode_batch([PROBE])
            found = tokens.keys() & set(self.encode_batch(texts)[0].tolist())
        except Exception as error:  # The library raises Exception itself.
            raise UserError(
                f"{where}: it cannot encode every text ({error}); give its model an unknown token that is in the "
                "vocabulary, or choose another tokenizer"
            ) from error
        if not found:
            return set()
        renamed = {tokens[id] for id in found}
        self._encoder = _load(json.dumps(_without(spec, renamed)).encode())
        for id in ends & found:
            if not len(self.encode_batch([tokens[id]])[0]):
                raise UserError(
                    f"{where}: {tokens[id]!r} is ordinary text that no other token can spell, so it cannot end or "
                    "begin a document; set `eos_token` and `bos_token` to special tokens"
                )
        if self.eos_id in self.encode_batch([*texts, PROBE])[0]:
            raise UserError(
                f"{where}: {tokens[self.eos_id]!r} also stands for unknown text, so it cannot end a document; set "
                "`eos_token` to another token"
            )
        return renamed


def _byte_level() -> dict[str, int]:
    """The bytes that the characters of byte-level tokens stand for: printable ones themselves (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level()


def _load(content: bytes) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if hasattr(tokenizer.model, "dropout"):
        tokenizer.model.dropout = None
    tokenizer.encode_special_tokens = True
    return tokenizer


def _without(spec: Json, tokens: Collection[str]) -> Json:
    """Returns a tokenizer.json with the same ids that matches `tokens` in no text."""
    # Renamed rather than removed, since ids are positions. The new names are random per process, so no text has them.
    prefix = uuid.uuid4().hex

    def renamed(token: Any) -> Any:
        return prefix + token if token in tokens else token

    model = dict(spec["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed(token): id for token, id in model["vocab"].items()}
    else:
        model["vocab"] = [[renamed(token), score] for token, score in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = renamed(model["unk_token"])
    if "merges" in model:
        joint = model.get("continuing_subword_prefix") or ""
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b.removeprefix(joint)} & set(tokens)]
    added = [token | {"content": renamed(token["content"])} for token in spec.get("added_tokens", ())]
    return spec | {"model": model, "added_tokens": added}


def _post_processor(spec: Json, bos: tuple[str | None, int | None] | None) -> Json | None:
    """Returns a tokenizer.json post-processor that adds only the BOS token, if given."""
    given = spec.get("post_processor")
    parts = given["processors"] if given and given["type"] == "Sequence" else [given]
    parts = [part for part in parts if part and part["type"] == "ByteLevel"]  # Only trims offsets.
    if bos is not None:
        token, id = bos
        sequences = [
            [{"SpecialToken": {"id": token, "type_id": type_id}}, {"Sequence": {"id": name, "type_id": type_id}}]
            for type_id, name in enumerate("AB")
        ]
        template = {"single": sequences[0], "pair": sequences[0] + sequences[1]}
        special = {token: {"id": token, "ids": [id], "tokens": [token]}}
        parts.append({"type": "TemplateProcessing", **template, "special_tokens": special})
    return {"type": "Sequence", "processors": parts} if len(parts) > 1 else parts[0] if parts else None
