"""Tokenizers of the Hugging Face libraries (`tokenizer.json`), from a folder or from the Hub."""

import dataclasses
import itertools
import logging
import os
from collections.abc import Sequence

import numpy as np
import tokenizers
from etils import epath

from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.tokenizers import files
from jaxtrain.tokenizers.identity import identity, well_formed
from jaxtrain.tokenizers.sentencepiece import SentencePieceTokenizer, check_threads

logger = logging.getLogger("jaxtrain")


@dataclasses.dataclass(kw_only=True)
class HuggingFaceTokenizer:
    """A tokenizer that exists already: `tokenizer.json`, or else a sentencepiece `tokenizer.model`.

    name: a folder or file (local, gs://, s3://), or the id of a model on the Hub.
    revision: a branch, tag or commit of the Hub; None for the newest. What counts at a resume is the files' hash.
    eos_token: the token that ends a document, where the files name none or another; its text, such as "</s>".
    bos_token: the token that begins a document, likewise.
    threads: threads that encode a batch; None for all cores of the process. No result depends on it. With
        tokenizer.json it sets the pool of the whole process, once, unless RAYON_NUM_THREADS is set.
    vocab_size: how many ids it has, for tools that plan without the network (tools.compile_check, tools.estimate); a
        run takes what the files say, and warns where that is another number.
    """

    name: str
    revision: str | None = None
    eos_token: str | None = None
    bos_token: str | None = None
    threads: int | None = None
    vocab_size: int | None = None

    def check(self) -> None:
        if not self.name:
            raise ValueError("name='': give a folder, a file or the id of a model on the Hub")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size}: give the number of ids, or none")
        check_threads(self.threads)

    def build(self, workdir: str) -> "HFTokenizer | SentencePieceTokenizer":
        """Loads or downloads it; needs nothing of `workdir`. Raises UserError."""
        found = files.find(self.name, self.revision)
        if files.TOKENIZER_JSON in found.content:
            kind = HFTokenizer
        elif files.SENTENCEPIECE_MODEL in found.content:
            kind = SentencePieceTokenizer
        else:
            raise UserError(
                f"{found.where}: neither {files.TOKENIZER_JSON} nor {files.SENTENCEPIECE_MODEL} there; save the "
                "tokenizer with transformers' save_pretrained, or give another name"
            )
        built = kind(found, eos_token=self.eos_token, bos_token=self.bos_token, threads=self.threads)
        if self.vocab_size not in (None, built.vocab_size):
            logger.warning(
                "tokenizer.vocab_size=%d, but %s has %d ids: correct it, compile checks and estimates count with it.",
                self.vocab_size,
                found.where,
                built.vocab_size,
            )
        return built


class HFTokenizer:
    """Implements interfaces.Tokenizer with the `tokenizers` library.

    Adds no special token, finds none in a text (a document cannot forge its own end; only models of type Unigram, whose
    vocabulary holds them, do), and ignores the truncation, padding and dropout that some files ask for. `token_bytes`
    adds up to the text's UTF-8 length for byte-level tokenizers and those with byte fallback that do not normalize.
    """

    def __init__(
        self,
        tokenizer_files: files.TokenizerFiles,
        *,
        eos_token: str | None = None,
        bos_token: str | None = None,
        threads: int | None = None,
    ):
        self._files = tokenizer_files
        if threads is not None:
            os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
        content = tokenizer_files.content[files.TOKENIZER_JSON]
        spec = tokenizer_files.json(files.TOKENIZER_JSON)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # The library raises Exception itself.
            raise UserError(
                f"{tokenizer_files.where}: {files.TOKENIZER_JSON} cannot be loaded by tokenizers "
                f"{tokenizers.__version__}: {error}"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if "dropout" in spec["model"]:
            self._tokenizer.model.dropout = None
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab()
        # Ids may have gaps, so the number of tokens is no bound.
        self.vocab_size = max(vocabulary.values()) + 1
        eos_id = files.special_id(tokenizer_files, "eos", eos_token, self.vocab_size, vocabulary.get)
        if eos_id is None:
            raise UserError(
                f"{tokenizer_files.where}: no file there names the token that ends a document; set `eos_token`, "
                f"for example {_likely(spec)}"
            )
        self.eos_id: int = eos_id
        self.bos_id = files.special_id(tokenizer_files, "bos", bos_token, self.vocab_size, vocabulary.get)
        self.token_bytes = self._token_bytes(spec, vocabulary)
        self.identity = identity(
            self, "tokenizer.json", content, library=tokenizers.__version__, revision=tokenizer_files.revision
        )

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """texts [N] → (ids int32 [sum of lengths], lengths int64 [N]). Lone surrogates become U+FFFD."""
        texts = list(texts)
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            encodings = self._tokenizer.encode_batch_fast(well_formed(texts), add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        # 44 M tokens/s, of which the library's own lists take half; an array for each text is as fast, array.array
        # slower (28). Encoding itself does 1.5 a core, outside the GIL.
        ids = itertools.chain.from_iterable(encoding.ids for encoding in encodings)
        return np.fromiter(ids, np.int32, int(lengths.sum())), lengths

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; special tokens have none."""
        return self._tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)

    def save(self, folder: epath.PathLike) -> None:
        """Writes the tokenizer's files, with a tokenizer_config.json for transformers' AutoTokenizer."""
        files.write(self.content(), folder)

    def content(self) -> dict[str, bytes]:
        """What `save` writes: name → bytes."""
        token = self._tokenizer.id_to_token
        bos = None if self.bos_id is None else token(self.bos_id)
        return files.content_to_save(self._files, {"eos_token": token(self.eos_id), "bos_token": bos})

    def _token_bytes(self, spec: Json, vocabulary: dict[str, int]) -> np.ndarray:
        # A character of a byte-level token is a byte; "▁" is a space where spaces are marked as sentencepiece does.
        byte_level = "ByteLevel" in _types(spec["decoder"])
        byte_fallback = spec["model"].get("byte_fallback", False)
        count = np.zeros(self.vocab_size, np.int32)
        for token, id in vocabulary.items():
            if byte_level:
                count[id] = len(token)
            elif byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                count[id] = 1
            else:
                count[id] = len(token.replace("\u2581", " ").encode())
        for id, added in self._tokenizer.get_added_tokens_decoder().items():
            count[id] = 0 if added.special else len(added.content.encode())
        unknown = vocabulary.get(spec["model"].get("unk_token")), spec["model"].get("unk_id")
        special = (self.eos_id, self.bos_id, *unknown)
        count[[id for id in special if id is not None]] = 0
        return count


def _types(decoder: Json | None) -> set[str]:
    """The types of a decoder and of those inside it."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_types(inner) for inner in decoder.get("decoders", [])))


def _likely(spec: Json) -> str:
    special = [token["content"] for token in spec["added_tokens"] if token["special"]]
    return " or ".join(map(repr, special[:5])) or "one of its tokens"
