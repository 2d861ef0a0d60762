"""Token stores: the tokens of a source's rows, read in place of its text. Written by writer.py.

A store stands in for its source. It has the source's identity, files and row groups, so it is divided into the same
units, and one record for each row of each file, empty for an empty or filtered document. It is a TFDS folder
(`tfds.builder_from_directory(folder).as_data_source("train")`) with one ArrayRecord shard for each file that has rows,
plus `store.json`. A record is a serialized tf.train.Example with the single feature "tokens", the bytes of the ids. Its
layout follows from its length, so parsing it needs no library.
"""

import collections
import dataclasses
import functools
import json
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np

from jaxtrain import cli
from jaxtrain.data.io import names
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.data.sources.streams import misread_reason
from jaxtrain.data.stores import record_store
from jaxtrain.data.stores.record_store import ArrayRecord, ArrayRecords, Shard
from jaxtrain.data.token_arrays import TokenArrays
from jaxtrain.data.transforms import AtLeast, MinLength
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Block, Json, SourceConfig, Tokenizer, versioned

# Readahead speeds up reading ranges of records (735 M tokens/s instead of 95 to 214). One thread is enough, since every
# lane has its own reader.
_READER = "readahead_buffer_size:1M,max_parallelism:0"
_BLOCK_TOKENS = 1 << 20
_LOOKED_AT_ROWS = 32  # at the end of each file, to find what version 0.1 misread
# The bytes before the ids, except for lengths: Example.features, .feature (a map entry), its key, its value,
# Feature.bytes_list, BytesList.value.
_KEY = b"\n\x06tokens\x12"


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


@functools.lru_cache(maxsize=1 << 14)  # 3 microseconds each otherwise
def header(size: int) -> bytes:
    """The bytes of a record that precede `size` bytes of ids."""
    head = b""
    for before in (b"\n", b"\n", _KEY, b"\n", b"\n"):
        head = before + _varint(len(head) + size) + head
    return head


def _headers() -> tuple[np.ndarray, np.ndarray]:
    """The record lengths at which the header grows, ascending, and the header sizes."""
    found: dict[int, int] = {}
    for bits in range(0, 35, 7):
        for size in range(max((1 << bits) - 40, 0), (1 << bits) + 1) if bits else (0,):
            found.setdefault(len(header(size)), size + len(header(size)))
    return np.array(list(found.values())), np.array(list(found))


_FROM, _HEADER_BYTES = _headers()


def decode(records: Sequence[bytes], dtype: np.dtype[Any]) -> TokenArrays:
    """Decodes the ids of several records of a store with ids of type `dtype`."""
    sizes = np.fromiter(map(len, records), np.int64, len(records))
    heads = _HEADER_BYTES[_FROM.searchsorted(sizes, side="right") - 1]
    payloads = [record[head:] for record, head in zip(records, heads.tolist(), strict=True)]
    return TokenArrays(np.frombuffer(b"".join(payloads), dtype), (sizes - heads) // dtype.itemsize)


def encode(ids: np.ndarray) -> bytes:
    """Encodes the record of a document. ids: little-endian, in the store's dtype."""
    payload = ids.tobytes()
    return header(len(payload)) + payload


def dtype_of(vocab_size: int) -> np.dtype[Any]:
    """The integer type of a store's ids for a vocabulary of `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredFile(Shard):
    """One file of the source.

    Attributes:
        row_groups: The source's row groups; None if it has none.
        shard: The name of its ArrayRecord; None for a file without rows. Other attributes: see Shard.
    """

    row_groups: list[int] | None
    shard: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenManifest(record_store.Manifest):
    """The manifest of a token store.

    Attributes:
        random_access: Whether the source can be read from any row.
        vocab_size: Size of the vocabulary.
        files: The files that rows were taken from, in order. Other attributes: see Manifest.
    """

    FILE = "store.json"
    STORE = "token store"
    TOOL = "tools.pretokenize"
    INSTEAD = "set data.token_store"

    random_access: bool
    vocab_size: int
    files: list[StoredFile] = dataclasses.field(default_factory=list)

    @classmethod
    def from_content(cls, content: Json) -> Self:
        return cls(**{**content, "files": [StoredFile(**file) for file in content["files"]]})

    def shards(self) -> Iterator[tuple[str, StoredFile]]:
        return ((file.shard, file) for file in self.files if file.shard is not None)


_PATTERNS = ("data_files", "urls", "patterns")  # settings that select files


class RamCache:
    """An LRU cache of blocks of token stores. Thread-safe."""

    def __init__(self, limit: float):
        """limit: The most bytes to hold."""
        self._limit = limit
        self._blocks: collections.OrderedDict[tuple[str, int], TokenArrays] = collections.OrderedDict()
        self._lock = threading.Lock()
        self.used = 0

    def get(self, key: tuple[str, int]) -> TokenArrays | None:
        """The block, or None if it is not cached."""
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
            return self._blocks.get(key)

    def put(self, key: tuple[str, int], block: TokenArrays) -> None:
        """Adds a block and evicts the least recently used ones."""
        with self._lock:
            if key in self._blocks or block.nbytes > self._limit:
                return
            self._blocks[key] = block
            self.used += block.nbytes
            while self.used > self._limit:
                _, evicted = self._blocks.popitem(last=False)
                self.used -= evicted.nbytes


class TokenStore:
    """A resolved source whose rows are token ids. Implements interfaces.Source. Thread-safe.

    Its identity, files, random_access and row groups are those of the source it was written from.
    """

    def __init__(
        self, folder: str, manifest: TokenManifest, cache: RamCache | None = None, identity: Json | None = None
    ):
        """Reads the store in `folder`.

        Args:
            folder: The store's folder.
            manifest: Its manifest.
            cache: Where to keep blocks in memory; None to keep none.
            identity: The source's identity from a checkpoint that the store was checked against, if any.
        """
        self.folder = folder
        self.manifest = manifest
        self.identity = versioned(identity or manifest.source)
        self.files = manifest.names
        self.random_access = manifest.random_access
        self._dtype = dtype_of(manifest.vocab_size)
        self._cache = cache
        self._shards = ArrayRecords(_READER, "remove the store and write it again with tools.pretokenize")

    def row_groups(self, file: int) -> list[int]:
        """See interfaces.Source."""
        if file >= len(self.manifest.files):
            return []  # past max_samples
        groups = self.manifest.files[file].row_groups
        assert groups is not None
        return groups

    def open(self, file: int, row: int, stop: int | None = None) -> Iterator[Block]:
        """See interfaces.Source."""
        about = self.manifest.files[file] if file < len(self.manifest.files) else None
        if about is None or about.shard is None or row >= about.rows:
            return
        size = int(min(max(_BLOCK_TOKENS * about.rows / max(about.tokens, 1), 16), 512))
        # Cached blocks begin at fixed rows, so that all readers of the file share them.
        kept = self._cache is not None
        stop = about.rows if stop is None else min(stop, about.rows)
        with self._shards.open(os.path.join(self.folder, about.shard), about.rows) as shard:
            while row < stop:
                first = row - row % size if kept else row
                block = self._block(shard, first, min(first + size, about.rows if kept else stop))
                yield {"text": block[row - first :] if row > first else block}
                row = first + size

    def _block(self, shard: ArrayRecord, first: int, end: int) -> TokenArrays:
        if self._cache is None:
            return decode(shard.range(first, end), self._dtype)
        found = self._cache.get((shard.path, first))
        if found is None:
            found = decode(shard.range(first, end), self._dtype)
            self._cache.put((shard.path, first), found)
        return found


def check(
    manifest: TokenManifest, folder: str, config: SourceConfig, tokenizer: Tokenizer, identity: Json | None
) -> None:
    """Checks that the store holds what `config` reads with `tokenizer`.

    Args:
        manifest: The store's manifest.
        folder: The store's folder.
        config: The run's source config.
        tokenizer: The run's tokenizer.
        identity: The source's identity from a checkpoint; None to compare the config alone.

    Raises:
        UserError: The store holds something else; the message shows both sides.
    """
    # Version 0.1 redacted its settings, so settings with a redacted part differ from the current ones.
    wanted, has = record_store.settings_of(config), manifest.settings
    if identity is None:
        before = cli.complete({cli.KIND: wanted[cli.KIND]})
        wanted = {name: text for name, text in wanted.items() if name in has or text != repr(before.get(name))}
    else:
        patterns = [name for name in _PATTERNS if name in has and versioned(manifest.source)["naming"] == 1]
        wanted = {**names.comparable(identity), **{f"config's {name}": wanted.get(name) for name in patterns}}
        has = {**names.comparable(manifest.source), **{f"config's {name}": has[name] for name in patterns}}
    has, wanted = ({name: value for name, value in one.items() if name != "reader"} for one in (has, wanted))
    lines = manifest.differences(has, wanted, config, tokenizer)
    if not lines and (reason := _misread_reason(manifest, folder, config, tokenizer)):
        lines.append(f"  source: version 0.1 read its files; {reason}")
    if lines:
        raise UserError(
            f"the token store {folder} does not belong to this run:\n" + "\n".join(lines) + "\n"
            "Write another with tools.pretokenize, set data.token_store to its folder, or set data.mode=stream."
        )


def _misread_reason(manifest: TokenManifest, folder: str, config: SourceConfig, tokenizer: Tokenizer) -> str | None:
    """Why the store may hold other documents than its files do; None if it does not."""
    source = manifest.source
    if source.get("kind") != "huggingface":
        return None
    if source["builder"] != "json" or source.get("reader", 1) > 1:
        return misread_reason(source, config.columns() if isinstance(config, HuggingFace) else (), is_stored=True)
    if not all(isinstance(transform, AtLeast | MinLength) for transform in config.transforms):
        return "a text that is not a string turned later texts into JSON, and transforms hide whether one did"
    if _decoded(tokenizer, tokenizer.encode_batch(['"a"'])[0]) != '"a"':
        return "a text that is not a string turned later texts into JSON, and the tokenizer hides whether one did"
    # Version 0.1 misread everything from such a text to the file's end, so the last text shows it. A healthy file whose
    # last text is a string of JSON is refused, too: nothing tells the two apart.
    store = TokenStore(folder, manifest)
    for number, file in enumerate(manifest.files):
        if file.shard is None or not os.path.exists(os.path.join(folder, file.shard)):
            continue
        texts = [
            _decoded(tokenizer, block["text"][row : row + 1].ids)
            for block in store.open(number, max(file.rows - _LOOKED_AT_ROWS, 0))
            for row in range(len(block["text"]))
        ]
        if _ends_in_json(texts):
            return f"a text in {manifest.names[number]} that is not a string turned later texts into JSON"
    return misread_reason(source, (), is_stored=True)


def _decoded(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist()).strip()


def _ends_in_json(texts: Sequence[str]) -> bool:
    """Whether the last text that is neither empty nor another value of JSON is a string of JSON."""
    for text in reversed(texts):
        try:
            if isinstance(json.loads(text), str):
                return True
        except ValueError:
            if text:
                return False
    return False
