"""Teacher stores: a teacher's records of every token of a source's documents. Written by writer.py.

A teacher's cache has one such folder per source. It is keyed only by document identity (file, row), so sequence
length, packing, mix, lanes and hosts may change. Every `part_rows` rows of a file form a part, an ArrayRecord with one
record per row: a 4-byte checksum of the document's tokens, then W bytes per token in the layout of losses/cached.py;
empty for a row without text. `cache.json` is written last: its presence means that the store is complete.
"""

import dataclasses
import os
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from jaxtrain.data.io import names
from jaxtrain.data.source_reader import describe
from jaxtrain.data.stores import record_store, token_store
from jaxtrain.data.stores.record_store import ArrayRecords
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Source, SourceConfig, Tokenizer
from jaxtrain.losses.cached import Layout

MANIFEST = "cache.json"
# Documents are read one at a time in shuffled order, so reading ahead does not help.
_READER = "readahead_buffer_size:0,max_parallelism:0"
_CHECKSUM = 4  # bytes


@dataclasses.dataclass(frozen=True)
class TeacherShard:
    """One part of a file.

    Attributes:
        rows: Rows in the shard.
        tokens: Tokens in the shard.
        size: Bytes of its file.
        digest: Digest of its file.
    """

    rows: int
    tokens: int
    size: int
    digest: str


@dataclasses.dataclass(frozen=True)
class TeacherManifest:
    """The manifest of a teacher store, for one source.

    Attributes:
        source, settings, names, max_samples, transforms, tokenizer: As in a token store's manifest.
        add_bos: Whether documents begin with the beginning-of-document token.
        teacher: The teacher's identity.
        layout: The layout of the records.
        context: The teacher's context length in tokens.
        stride: Tokens between the windows in which the teacher saw a document longer than `context`.
        part_rows: Rows per part.
        parts: The parts of each file that rows were taken from, in order.
        digest: The digest of the text it was parsed from, perhaps by an earlier version; None otherwise.
    """

    source: Json
    settings: Json
    names: list[str]
    max_samples: int | None
    transforms: list[Json]
    tokenizer: Json
    add_bos: bool
    teacher: Json
    layout: Layout
    context: int
    stride: int
    part_rows: int
    parts: list[list[TeacherShard]] = dataclasses.field(default_factory=list)
    # Not compared: the text may come from an earlier version.
    digest: str | None = dataclasses.field(default=None, compare=False)

    def to_json(self) -> str:
        """The manifest's text, with its digest."""
        return record_store.sealed(self._content())

    def _content(self) -> Json:
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "digest"}

    @property
    def tokens(self) -> int:
        """Tokens in the store."""
        return sum(part.tokens for parts in self.parts for part in parts)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(part.size for parts in self.parts for part in parts)

    @property
    def identity(self) -> str:
        """The identity of the records and of how they were made."""
        return self.digest or record_store.digest_of_json(self._content())


def manifest_of(
    source: Source,
    config: SourceConfig,
    tokenizer: Tokenizer,
    *,
    add_bos: bool,
    teacher: Json,
    layout: Layout,
    context: int,
    stride: int,
    part_rows: int,
) -> TeacherManifest:
    """The manifest of a store to be written, without parts. Arguments: see TeacherManifest."""
    return TeacherManifest(
        source=source.identity,
        settings=token_store.settings_of(config),
        names=list(source.files),
        max_samples=config.max_samples,
        transforms=[describe(transform) for transform in config.transforms],
        tokenizer=tokenizer.identity,
        add_bos=add_bos,
        teacher=teacher,
        layout=layout,
        context=context,
        stride=stride,
        part_rows=part_rows,
    )


def manifest_from_json(text: str, where: str) -> TeacherManifest:
    """Parses a manifest. Raises UserError if it is damaged or has another format."""
    content, digest = record_store.unsealed(text, where, "tools.cache_teacher")
    layout = content.pop("layout")
    made = Layout(layout["vocab_size"], layout["k"], tuple(layout["temperatures"]))
    parts = [[TeacherShard(**part) for part in file] for file in content.pop("parts")]
    return TeacherManifest(**content, layout=made, parts=parts, digest=digest)


def planned(folder: str) -> TeacherManifest | None:
    """The manifest of a finished store or the plan of one in progress; None if there is neither."""
    return record_store.planned(folder, MANIFEST, manifest_from_json)


def shard_name(file: int, part: int) -> str:
    """The file name of a part of a file, both from 0."""
    return f"{file:06d}-{part:06d}.array_record"


def encode(tokens: np.ndarray, records: np.ndarray) -> bytes:
    """Encodes the record of a document. tokens: int32 [n], special tokens included. records: uint8 [n, W]."""
    return checksum(tokens).to_bytes(_CHECKSUM, "little") + records.tobytes()


def checksum(tokens: np.ndarray) -> int:
    """The checksum of a document's tokens, 32 bits."""
    return zlib.crc32(tokens.astype("<i4").tobytes())


def size_of(tokens: int, documents: int, parts: int, layout: Layout) -> int:
    """Estimates the bytes of a store.

    ArrayRecord adds about 100 bytes per record and pads a file to blocks of 64 kB, at least two.
    """
    return tokens * layout.width + documents * (_CHECKSUM + 100) + parts * (2 << 16)


def exists(folder: str) -> bool:
    """Whether the folder holds a complete store."""
    return os.path.exists(os.path.join(folder, MANIFEST))


def load(folder: str) -> TeacherManifest:
    """The manifest of a complete store. Raises UserError if the store or one of its parts is missing."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = manifest_from_json(file.read(), path)
    except FileNotFoundError:
        raise UserError(
            f"the teacher's cache {folder} is not finished: run tools.cache_teacher again to continue where it stopped."
            if os.path.isdir(folder)
            else f"there is no teacher's cache {folder}. Write one with tools.cache_teacher, or remove teacher.cache "
            "to run the teacher during training."
        ) from None
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    for name, part in _named(manifest):
        if sizes.get(name) != part.size:
            has = f"has {sizes[name]:,} bytes, not {part.size:,}" if name in sizes else "is missing"
            raise UserError(f"teacher's cache {folder}: {name} {has}. Remove the cache and write it again.")
    return manifest


def verify(folder: str) -> TeacherManifest:
    """Like `load`, but also reads every part and compares its digest."""
    manifest = load(folder)
    for name, part in _named(manifest):
        if record_store.digest_of(os.path.join(folder, name)) != part.digest:
            raise UserError(f"teacher's cache {folder}: {name} does not match its checksum. Write the cache again.")
    return manifest


def _named(manifest: TeacherManifest) -> Iterator[tuple[str, TeacherShard]]:
    for file, parts in enumerate(manifest.parts):
        for number, part in enumerate(parts):
            yield shard_name(file, number), part


def check(manifest: TeacherManifest, folder: str, config: SourceConfig, source: Source, tokenizer: Tokenizer) -> None:
    """Checks that the store holds the documents and tokens that `config` reads.

    Args:
        manifest: The store's manifest.
        folder: The store's folder.
        config: The run's source config.
        source: The resolved source.
        tokenizer: The run's tokenizer.

    Raises:
        UserError: The store holds something else; the message shows both sides.
    """
    lines = record_store.differences(
        "cache", manifest, names.comparable(manifest.source), names.comparable(source.identity), config, tokenizer
    )
    lines += names.inexact(manifest.source)
    if lines:
        raise UserError(
            f"the teacher's cache {folder} does not belong to this run:\n" + "\n".join(lines) + "\n"
            "Set these back, write another with tools.cache_teacher, or remove teacher.cache to run the teacher "
            "during training."
        )


class TeacherStore:
    """The records of one source's documents. Implements data.tokenizing.Records. Thread-safe."""

    def __init__(self, folder: str, manifest: TeacherManifest):
        self.folder, self.manifest = folder, manifest
        self._files = ArrayRecords(_READER, "remove the teacher's cache and write it again with tools.cache_teacher")

    def read(self, file: int, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """See data.tokenizing.Records."""
        width, found = self.manifest.layout.width, dict.fromkeys(rows.tolist(), b"")
        by_part: dict[int, list[int]] = {}
        for row in found:
            by_part.setdefault(row // self.manifest.part_rows, []).append(row)
        for part, wanted in by_part.items():
            found.update(zip(wanted, self._part(file, part, wanted), strict=True))
        out = np.empty((int(lengths.sum()), width), np.uint8)
        begin = 0
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
            record, end = found[row], begin + length
            size, record_store = len(record) - _CHECKSUM, int.from_bytes(record[:_CHECKSUM], "little")
            if size != length * width or record_store != checksum(tokens[begin:end]):
                raise UserError(
                    f"the teacher's cache {self.folder} has {max(size, 0) // width} tokens for row {row} of "
                    f"{self.manifest.names[file]}, but the run reads {length} there, or different ones: its text, "
                    "tokenizer or data.add_bos has changed since. Write the cache again with tools.cache_teacher."
                )
            out[begin:end] = np.frombuffer(record, np.uint8, offset=_CHECKSUM).reshape(length, width)
            begin = end
        return out

    def _part(self, file: int, part: int, rows: Sequence[int]) -> Sequence[bytes]:
        parts = self.manifest.parts[file] if file < len(self.manifest.parts) else []
        first = part * self.manifest.part_rows
        if part >= len(parts) or max(rows) >= first + parts[part].rows:
            raise UserError(
                f"the teacher's cache {self.folder} has no row {max(rows)} of {self.manifest.names[file]}: the file "
                "has grown. Write the cache again with tools.cache_teacher."
            )
        with self._files.open(os.path.join(self.folder, shard_name(file, part)), parts[part].rows) as opened:
            return opened.some([row - first for row in rows])
