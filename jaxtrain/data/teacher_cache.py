"""Teachers' caches: what a teacher says of every token of a source's documents. Written by data/cache_writer.py.

A cache has a folder for each source. It is keyed by documents' identities (file, row) and nothing else, so sequence
length, packing, mix, lanes and hosts may change. `part_rows` rows of a file make a part, an ArrayRecord with one
record for each row: 4 bytes of checksum of the document's tokens, then W bytes for each token, as losses/cached.py
lays them out; empty for a row without text. `cache.json` is written last: its presence says that all is there.
"""

import collections
import contextlib
import dataclasses
import json
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxtrain.data import faults
from jaxtrain.data.sources import token_store
from jaxtrain.data.sources.token_store import array_records, digest_of_json
from jaxtrain.data.windows import describe
from jaxtrain.interfaces import CorruptError, Json, Source, SourceConfig, Tokenizer, UserError
from jaxtrain.losses.cached import Layout
from jaxtrain.tokenizers.identity import mismatch

FORMAT = 1
MANIFEST = "cache.json"
# Documents are read one by one, in a shuffled order: nothing is gained by reading ahead.
_READER = "readahead_buffer_size:0,max_parallelism:0"
_IDLE = 32  # open readers that nobody uses now
_CHECKSUM = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Part:
    """rows, tokens: in it. size, digest: of its file."""

    rows: int
    tokens: int
    size: int
    digest: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a cache says of itself, for one source.

    source, settings, names, max_samples, transforms, tokenizer: as of a token store. teacher: its identity.
    context: the most tokens that the teacher saw at once; of a longer document it saw windows `stride` tokens apart.
    parts: by file, in order, of the files that rows were taken from.
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
    parts: list[list[Part]] = dataclasses.field(default_factory=list)

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        return json.dumps({"format": FORMAT, "digest": digest_of_json(_plain(content)), **content})

    @property
    def tokens(self) -> int:
        return sum(part.tokens for parts in self.parts for part in parts)

    @property
    def bytes(self) -> int:
        return sum(part.size for parts in self.parts for part in parts)

    @property
    def identity(self) -> str:
        """Of the records themselves, and of how they were made."""
        return digest_of_json(_plain(dataclasses.asdict(self)))


def _plain(content: Json) -> Json:
    """As it is after a way through JSON: without tuples."""
    return json.loads(json.dumps(content))


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
) -> Manifest:
    """Of a cache that is to be written."""
    return Manifest(
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


def manifest_from_json(text: str, where: str) -> Manifest:
    """Raises UserError for a damaged one or another format."""
    content: Json = {}
    try:
        content = json.loads(text)
        found, digest = content.pop("format"), content.pop("digest")
    except (ValueError, KeyError):
        found, digest = FORMAT, None
    if found != FORMAT:
        raise UserError(f"{where} has format {found}, this version reads {FORMAT}: use the version that wrote it.")
    if digest is None or digest != digest_of_json(content):
        raise UserError(f"{where} is damaged. Remove its folder and write it again with tools.cache_teacher.")
    layout = content.pop("layout")
    made = Layout(layout["vocab_size"], layout["k"], tuple(layout["temperatures"]))
    parts = [[Part(**part) for part in file] for file in content.pop("parts")]
    return Manifest(**content, layout=made, parts=parts)


def part_name(file: int, part: int) -> str:
    return f"{file:06d}-{part:06d}.array_record"


def encode(tokens: np.ndarray, records: np.ndarray) -> bytes:
    """The record of a document. tokens: int32 [n], with the special ones. records: uint8 [n, W]."""
    return checksum(tokens).to_bytes(_CHECKSUM, "little") + records.tobytes()


def checksum(tokens: np.ndarray) -> int:
    return zlib.crc32(tokens.astype("<i4").tobytes())


def size_of(tokens: int, documents: int, parts: int, layout: Layout) -> int:
    """Bytes that so much takes. ArrayRecord adds about 100 to a record, and fills a file up to blocks of 64 kB, two at
    least.
    """
    return tokens * layout.width + documents * (_CHECKSUM + 100) + parts * (2 << 16)


def exists(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, MANIFEST))


def load(folder: str) -> Manifest:
    """The manifest of a complete cache whose parts are all there. Raises UserError."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = manifest_from_json(file.read(), path)
    except FileNotFoundError:
        raise UserError(
            f"the teacher's cache {folder} is not finished: run tools.cache_teacher again, which goes on where it "
            "stopped."
            if os.path.isdir(folder)
            else f"there is no teacher's cache {folder}. Write one with tools.cache_teacher, or leave out "
            "teacher.cache to run the teacher as the student trains."
        ) from None
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    for name, part in _named(manifest):
        if sizes.get(name) != part.size:
            has = f"has {sizes[name]:,} bytes, not {part.size:,}" if name in sizes else "is missing"
            raise UserError(f"teacher's cache {folder}: {name} {has}. Remove the cache and write it again.")
    return manifest


def verify(folder: str) -> Manifest:
    """As `load`, and every part is read and its digest compared."""
    manifest = load(folder)
    for name, part in _named(manifest):
        if token_store.digest_of(os.path.join(folder, name)) != part.digest:
            raise UserError(f"teacher's cache {folder}: {name} is not what was written. Write the cache again.")
    return manifest


def _named(manifest: Manifest) -> Iterator[tuple[str, Part]]:
    for file, parts in enumerate(manifest.parts):
        for number, part in enumerate(parts):
            yield part_name(file, number), part


def check(manifest: Manifest, folder: str, config: SourceConfig, source: Source, tokenizer: Tokenizer) -> None:
    """Raises UserError, both sides shown, if the cache is not of the documents and tokens that `config` reads."""
    has, wanted = manifest.source, source.identity
    lines = [
        f"  source {name}: the cache has {_short(has.get(name))}, the run {_short(wanted.get(name))}"
        for name in sorted(wanted.keys() | has.keys())
        if wanted.get(name) != has.get(name)
    ]
    transforms = [describe(transform) for transform in config.transforms]
    if transforms != manifest.transforms:
        lines.append(f"  transforms: the cache has {manifest.transforms}, the config {transforms}")
    if manifest.max_samples is not None and (config.max_samples is None or config.max_samples > manifest.max_samples):
        lines.append(f"  max_samples: the cache has {manifest.max_samples}, the config {config.max_samples}")
    if manifest.tokenizer != tokenizer.identity:
        different = mismatch(manifest.tokenizer, tokenizer.identity)
        if different is not None:
            lines.append(f"  tokenizer: {different}")
    if lines:
        raise UserError(
            f"the teacher's cache {folder} is not of this run:\n" + "\n".join(lines) + "\nSet these back, write "
            "another with tools.cache_teacher, or leave out teacher.cache to run the teacher as the student trains."
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."


class CachedRecords:
    """The records of one source's documents. Implements data.tokenizing.Records. Safe for several threads."""

    def __init__(self, folder: str, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self._idle: collections.deque[tuple[str, Any]] = collections.deque()
        self._lock = threading.Lock()

    def read(self, file: int, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
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
            size, stored = len(record) - _CHECKSUM, int.from_bytes(record[:_CHECKSUM], "little")
            if size != length * width or stored != checksum(tokens[begin:end]):
                raise UserError(
                    f"the teacher's cache {self.folder} has {max(size, 0) // width} tokens for row {row} of "
                    f"{self.manifest.names[file]}, and the run reads {length} there, or others: its text, tokenizer or "
                    "data.add_bos is not what the cache was made with. Write the cache again with tools.cache_teacher."
                )
            out[begin:end] = np.frombuffer(record, np.uint8, offset=_CHECKSUM).reshape(length, width)
            begin = end
        return out

    def _part(self, file: int, part: int, rows: Sequence[int]) -> list[bytes]:
        parts = self.manifest.parts[file] if file < len(self.manifest.parts) else []
        first = part * self.manifest.part_rows
        if part >= len(parts) or max(rows) >= first + parts[part].rows:
            raise UserError(
                f"the teacher's cache {self.folder} has no row {max(rows)} of {self.manifest.names[file]}: the file "
                "has grown. Write the cache again with tools.cache_teacher."
            )
        path = os.path.join(self.folder, part_name(file, part))
        try:
            with self._reader(path) as reader:
                return reader.read([row - first for row in rows])
        except OSError as error:
            raise faults.classify(error, path) from None
        except (RuntimeError, ValueError, IndexError) as error:
            raise CorruptError(
                f"{path} is damaged ({error}); remove the teacher's cache and write it again with tools.cache_teacher",
                path,
                rows[0],
            ) from None

    @contextlib.contextmanager
    def _reader(self, path: str) -> Iterator[Any]:
        """For one thread. Who had it before leaves it open for a while."""
        with self._lock:
            kept = next((entry for entry in self._idle if entry[0] == path), None)
            if kept is not None:
                self._idle.remove(kept)
        if kept is None:
            os.stat(path)  # for an error that tells more
            kept = (path, array_records().ArrayRecordReader(path, _READER))
        yield kept[1]  # one that failed is not used again
        with self._lock:
            self._idle.append(kept)
            closed = self._idle.popleft() if len(self._idle) > _IDLE else None
        if closed is not None:
            closed[1].close()
