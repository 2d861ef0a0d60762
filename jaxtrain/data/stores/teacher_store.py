"""Teacher stores: a teacher's records of every token of a source's documents. Written by writer.py.

A teacher's cache has one such folder per source. It is keyed only by document identity (file, row), so sequence
length, packing, mix, lanes and hosts may change. Every `part_rows` rows of a file form a part, an ArrayRecord with one
record per row: a 4-byte checksum of the document's tokens, then W bytes per token in the layout of losses/cached.py;
empty for a row without text.

The store of a teacher with its own tokenizer serves runs with any: the checksum is of the document's text in UTF-8, and
before the records come the ends of the teacher's tokens in that text, in bytes, int32 each (-1 before a space that the
tokenizer puts before a text). The token that ends a document has no record.

`cache.json` is written last: its presence means that the store is complete.
"""

import dataclasses
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from jaxtrain.data.io import names
from jaxtrain.data.stores import record_store
from jaxtrain.data.stores.record_store import ArrayRecords, Shard
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Source, SourceConfig, Tokenizer
from jaxtrain.losses.cached import Layout
from jaxtrain.tokenizers.spelling import Speller, predicts

# Documents are read one at a time in shuffled order, so reading ahead does not help.
_READER = "readahead_buffer_size:0,max_parallelism:0"
_CHECKSUM = _END = 4  # bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherManifest(record_store.Manifest):
    """The manifest of a teacher store, for one source.

    Attributes:
        add_bos: Whether documents begin with the beginning-of-document token.
        teacher: The teacher's identity.
        layout: The layout of the records.
        context: The teacher's context length in tokens.
        stride: Tokens between the windows in which the teacher saw a document longer than `context`.
        part_rows: Rows per part.
        vocabulary: If the teacher has its own tokenizer, whose identity is then `tokenizer`: the bytes of its tokens,
            each byte as the character of that number. None if it has the run's.
        parts: The parts of each file that rows were taken from, in order. Other attributes: see Manifest.
    """

    FILE = "cache.json"
    STORE = "teacher's cache"
    TOOL = "tools.cache_teacher"
    INSTEAD = "remove teacher.cache to run the teacher during training"

    add_bos: bool
    teacher: Json
    layout: Layout
    context: int
    stride: int
    part_rows: int
    vocabulary: list[str] | None = None
    parts: list[list[Shard]] = dataclasses.field(default_factory=list)

    @classmethod
    def from_content(cls, content: Json) -> Self:
        layout = content["layout"]
        made = Layout(layout["vocab_size"], layout["k"], tuple(layout["temperatures"]))
        parts = [[Shard(**part) for part in file] for file in content["parts"]]
        return cls(**{**content, "layout": made, "parts": parts})

    def shards(self) -> Iterator[tuple[str, Shard]]:
        for file, parts in enumerate(self.parts):
            for number, part in enumerate(parts):
                yield shard_name(file, number), part

    def content(self) -> Json:
        content = super().content()
        if self.vocabulary is None:  # so that a store's identity is what it was before there were others
            del content["vocabulary"]
        return content

    @property
    def by_text(self) -> bool:
        """Whether the teacher has its own tokenizer, so that the store serves runs with any."""
        return self.vocabulary is not None

    @property
    def token_bytes(self) -> int:
        """Bytes stored per token."""
        return self.layout.width + _END * self.by_text

    @property
    def identity(self) -> str:
        """The identity of the records and of how they were made."""
        return self.digest or record_store.digest_of_json(self.content())


def shard_name(file: int, part: int) -> str:
    """The file name of a part of a file, both from 0."""
    return f"{file:06d}-{part:06d}.array_record"


def head_of_tokens(tokens: np.ndarray) -> bytes:
    """What precedes the records of a document. tokens: int32 [n], special tokens included."""
    return _checksum(tokens.astype("<i4").tobytes())


def head_of_text(text: bytes, ends: np.ndarray | None) -> bytes:
    """The same if the teacher has its own tokenizer. ends: of its tokens, [n]; None if they do not spell the text."""
    return _checksum(text) + (b"" if ends is None else ends.astype("<i4").tobytes())


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(_CHECKSUM, "little")


def size_of(tokens: int, documents: int, parts: int, token_bytes: int) -> int:
    """Estimates the bytes of a store.

    ArrayRecord adds about 100 bytes per record and pads a file to blocks of 64 kB, at least two.
    """
    return tokens * token_bytes + documents * (_CHECKSUM + 100) + parts * (2 << 16)


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
    has, wanted = names.comparable(manifest.source), names.comparable(source.identity)
    lines = manifest.differences(has, wanted, config, None if manifest.by_text else tokenizer)
    if lines:
        raise UserError(
            f"the {manifest.STORE} {folder} does not belong to this run:\n"
            + "\n".join(lines)
            + "\nSet these back, write "
            f"another with {manifest.TOOL}, or {manifest.INSTEAD}."
        )


class TeacherStore:
    """The records of one source's documents. Implements data.tokenizing.Records. Thread-safe."""

    def __init__(self, folder: str, manifest: TeacherManifest, speller: Speller | None = None):
        """Opens a store. speller: of the run's tokenizer, for a teacher with its own."""
        self.folder, self.manifest, self._speller = folder, manifest, speller
        self._files = ArrayRecords(_READER, "remove the teacher's cache and write it again with tools.cache_teacher")

    def read(self, file: int, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """See data.tokenizing.Records. Records of zeros where no token of the teacher ends with the run's."""
        width, found = self.manifest.layout.width, dict.fromkeys(rows.tolist(), b"")
        by_part: dict[int, list[int]] = {}
        for row in found:
            by_part.setdefault(row // self.manifest.part_rows, []).append(row)
        for part, wanted in by_part.items():
            found.update(zip(wanted, self._part(file, part, wanted), strict=True))
        out = np.zeros((int(lengths.sum()), width), np.uint8)
        begin = 0
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
            record, end = found[row], begin + length
            fill = self._as_stored if self._speller is None else self._aligned
            if not fill(record, tokens[begin:end], out[begin:end]):
                what = "other tokens"
                if self._speller is None:
                    what = f"{max(len(record) - _CHECKSUM, 0) // width} tokens"
                raise UserError(
                    f"the teacher's cache {self.folder} has {what} for row {row} of {self.manifest.names[file]}, but "
                    f"the run reads {length} there, or different ones: its text, tokenizer or data.add_bos has changed "
                    "since. Write the cache again with tools.cache_teacher."
                )
            begin = end
        return out

    def _as_stored(self, record: bytes, tokens: np.ndarray, out: np.ndarray) -> bool:
        """Writes the records of a document's tokens to `out`, [n, W]. Returns whether they are of these tokens."""
        if len(record) != _CHECKSUM + out.size or record[:_CHECKSUM] != head_of_tokens(tokens):
            return False
        out[:] = np.frombuffer(record, np.uint8, offset=_CHECKSUM).reshape(out.shape)
        return True

    def _aligned(self, record: bytes, tokens: np.ndarray, out: np.ndarray) -> bool:
        """The same if the teacher has its own tokenizer. Returns whether they are of the text of these tokens."""
        assert self._speller is not None
        spelled, ends = self._speller.follow(tokens)
        if record[:_CHECKSUM] != _checksum(spelled):
            if spelled[:1] != b" " or record[:_CHECKSUM] != _checksum(spelled[1:]):
                # A tokenizer that normalizes changes some texts: these are not aligned.
                return bool(record) and not self._speller.lossless
            ends -= 1
        count = (len(record) - _CHECKSUM) // self.manifest.token_bytes
        if count:
            theirs = np.frombuffer(record, "<i4", count, offset=_CHECKSUM)
            records = np.frombuffer(record, np.uint8, offset=_CHECKSUM + _END * count).reshape(count, -1)
            at = theirs.searchsorted(ends, side="right") - 1
            found = predicts(ends) & (theirs[at] == ends)
            out[found] = records[at[found]]
        return True

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
