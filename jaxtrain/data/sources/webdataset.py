"""Tar shards ("WebDataset"): archives of small files, with one document per file or per line.

A shard has no random access: a resume decodes it from the beginning, without parsing the skipped documents. Shards are
therefore read through the disk cache (data/io/disk_cache.py) if there is one.
"""

import collections
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from jaxtrain.data.io.byte_ranges import Bytes
from jaxtrain.data.io.locations import braces, cache_key, check_unchanged, expand, locate, stamps
from jaxtrain.data.io.names import NAMING, addresses, is_exact, lasting_name, named
from jaxtrain.data.io.tar import Archive, BrokenError
from jaxtrain.data.sources.json_rows import parsed
from jaxtrain.data.sources.rows import RowError, blocks_of, clean, kind_of
from jaxtrain.errors import CorruptError, UserError
from jaxtrain.interfaces import Block, Json, Transform, versioned

KINDS = ("json", "jsonl", "txt")


@dataclasses.dataclass(kw_only=True)
class WebDataset:
    """Tar archives by URL pattern, uncompressed or compressed with gzip, bzip2, xz or zstd.

    Attributes:
        urls: local paths and http(s), s3, gs and hf:// URLs. Braces expand: `shard-{00000..01000}.tar.bz2`,
            `{en,de}/*.tar`. Local paths and buckets also support `*`, `?` and `**`.
        column: the key of the text in .json and .jsonl members. Documents with a null text keep their row.
        members: suffixes of the members that contain documents: "json" (one object), "jsonl" (one object per line;
            blank lines are skipped), "txt" (the whole member, UTF-8). Others are ignored, as are hidden files
            (`._a.json`). A document that is not valid UTF-8 keeps its row, with text "".
        max_samples: read only the first N documents, in order of shards and members. None for all.
        transforms: functions on one document, applied in order. Their columns are other keys of .json and .jsonl
            members; a missing key is None.
    """

    urls: tuple[str, ...]
    column: str = "text"
    members: tuple[str, ...] = KINDS
    max_samples: int | None = None
    transforms: tuple[Transform, ...] = ()

    def check(self) -> None:
        if not self.urls or not self.column:
            raise UserError("urls and column may not be empty.")
        if not self.members or not set(self.members) <= set(KINDS):
            raise UserError(f"members={self.members} must be some of {', '.join(map(repr, KINDS))}.")
        if self.max_samples is not None and self.max_samples < 1:
            raise UserError(f"max_samples={self.max_samples} must be at least 1.")
        columns = self.columns()
        if columns and self.members == ("txt",):
            raise UserError(f"transforms read the columns {', '.join(columns)}, but txt members have only text.")
        for url in self.urls:
            if re.search(r"\.(jsonl?|parquet|csv|txt|arrow)(\.\w+)?$", braces(url)[-1]):
                raise UserError(
                    f"urls={url!r} are not tar archives: read them with HuggingFace and name='json' (or parquet, csv, "
                    "text, arrow) and these files in data_files"
                )

    def columns(self) -> tuple[str, ...]:
        """The columns that the transforms read besides the text."""
        wanted = (name for transform in self.transforms for name in transform.columns if name != "text")
        return tuple(dict.fromkeys(wanted))

    def resolve(self, identity: Json | None = None) -> "WebDatasetSource":
        """Lists the shards, or checks that a checkpoint's shards are unchanged.

        Args:
            identity: the source's identity in a checkpoint; None for a new run.

        Raises:
            UserError: a shard is missing or has changed, or its documents have no text.
        """
        naming = NAMING if identity is None else versioned(identity)["naming"]
        about = {
            "kind": "webdataset",
            "urls": [lasting_name(url, naming) for url in self.urls],
            "column": self.column,
            "members": list(self.members),
        }
        if identity is not None:
            return self._resume(identity, about)
        shards = named(self._addresses())
        files = [locate(address) for address in shards.values()]
        found = {**about, "naming": NAMING, "files": list(shards), "stamps": stamps(list(shards), files)}
        source = WebDatasetSource(self, found, list(shards.values()), files)
        # Check now: the stage that needs this source may be days away. Damage is left to the readers, which retry.
        with contextlib.suppress(CorruptError):
            next(source.open(0, 0), None)
        return source

    def _addresses(self) -> Iterator[str]:
        """Yields the addresses of all shards. Only wildcards need a lookup: `stamps` detects missing shards."""
        for url in self.urls:
            if url.startswith("hf://") or (not url.startswith(("http://", "https://")) and re.search(r"[*?\[]", url)):
                yield from expand([url]).values()
            else:
                yield from braces(url)

    def _resume(self, identity: Json, about: Json) -> "WebDatasetSource":
        for key, now in about.items():
            if identity.get(key) != now:
                raise UserError(f"source {key}: the checkpoint has {identity.get(key)!r}, the config has {now!r}.")
        # Only the config has credentials and URL signatures.
        known = (address for url in self.urls for address in braces(url))
        found = addresses(identity, known if is_exact(identity) else self._addresses())
        files = [locate(address) for address in found]
        check_unchanged(identity["stamps"], identity["files"], files)
        return WebDatasetSource(self, identity, found, files)


class WebDatasetSource:
    """A resolved `WebDataset`. Implements interfaces.CacheableSource. Thread-safe."""

    random_access = False
    needs_cache = True

    def __init__(self, config: WebDataset, identity: Json, addresses: Sequence[str], files: Sequence[Bytes]):
        self.addresses = addresses
        self.identity = versioned(identity)
        self.files: list[str] = identity["files"]
        self._config = config
        self._columns = config.columns()
        self._files = files

    @property
    def file_bytes(self) -> list[int] | None:
        known = self.identity["stamps"]
        return [known[name]["size"] for name in self.files] if set(known) >= set(self.files) else None

    def through(self, cached: Callable[[Bytes, str], Bytes]) -> "WebDatasetSource":
        known = self.identity["stamps"]
        keys = [cache_key(at, known.get(name)) for name, at in zip(self.files, self.addresses, strict=True)]
        return WebDatasetSource(self._config, self.identity, self.addresses, list(map(cached, self._files, keys)))

    def row_groups(self, file: int) -> list[int]:
        raise AssertionError("tar archives have no index")

    def open(self, file: int, row: int, stop: int | None = None) -> Iterator[Block]:
        """Yields blocks of up to 512 rows: "text" and the keys that the transforms need."""
        source = self._files[file]
        archive = Archive(source)
        rows = self._documents(archive, source.what, row)
        return blocks_of(rows, source, self._columns, first=row, row=row, is_sound=archive.is_sound)

    def _documents(self, archive: Archive, what: str, skip: int) -> Iterator[Json]:
        """Yields the documents of a shard after the first `skip`, which are not parsed."""
        seen: collections.Counter[str] = collections.Counter()
        for name, content in archive.members():
            base = name.rsplit("/", 1)[-1]
            kind = base.rsplit(".", 1)[-1].lower() if "." in base else ""
            if base.startswith("."):
                continue
            seen[kind] += 1
            if kind not in self._config.members:
                continue
            if kind == "jsonl":
                lines = (line for line in content if line.strip())
                for line in lines:
                    if skip:
                        skip -= 1
                    else:
                        yield self._from_json(line, name)
            elif skip:
                skip -= 1
            else:
                yield self._from_json(content.read(), name) if kind == "json" else self._from_text(content)
        if seen and not any(kind in seen for kind in self._config.members):
            has = ", ".join(f"{count:,} x {f'.{kind}' if kind else 'no suffix'}" for kind, count in seen.most_common(8))
            wanted = " or ".join(f".{kind}" for kind in self._config.members)
            raise UserError(f"{what} has no {wanted} members. It has {has}.")

    def _from_text(self, content: IO[bytes]) -> Json:
        try:
            text = content.read().decode()
        except UnicodeDecodeError:
            text = ""
        return {**dict.fromkeys(self._columns), "text": text}

    def _from_json(self, data: bytes, name: str) -> Json:
        try:
            document = parsed(data)
        except UnicodeDecodeError:
            return {**dict.fromkeys(self._columns), "text": ""}
        except (ValueError, RecursionError) as error:
            raise BrokenError(f"member {name!r} is not JSON ({error})") from None
        column = self._config.column
        if not isinstance(document, dict) or column not in document:
            has = f"the keys {', '.join(map(repr, document))}" if isinstance(document, dict) else kind_of(document)
            raise RowError(
                f"member {name!r} has no key {column!r}. It has {has}. Set column to the key of the text, or members "
                "to the types that hold documents."
            )
        text = document[column]
        if not isinstance(text, str | None):
            raise RowError(f"{column!r} of member {name!r} holds {kind_of(text)}, not text.")
        return {**{key: clean(document.get(key)) for key in self._columns}, "text": clean(text or "")}
