"""How each source is read. The batches are identical bit for bit in every mode, so the mode may change at any resume.

    stream         reads the source's files as needed; keeps nothing on disk
    download       fetches the same files first, into the disk cache (data.max_disk_gb)
    pretokenized   reads only the token store; needs no network
    auto           the token store if it is complete and belongs to this run; else files downloaded earlier; else
                   streams large datasets and downloads small ones

Each source gets its own mode; "pretokenized" requires a store for every source.
"""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from jaxtrain import cli
from jaxtrain.data import pipeline, units
from jaxtrain.data.io import retry
from jaxtrain.data.io.byte_ranges import Bytes
from jaxtrain.data.io.cached_files import CachedBytes
from jaxtrain.data.io.disk_cache import DiskCache
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.huggingface import HuggingFaceSource
from jaxtrain.data.stores import record_store, token_store
from jaxtrain.data.stores.token_store import RamCache, TokenManifest, TokenStore
from jaxtrain.errors import UserError
from jaxtrain.interfaces import CacheableSource, Json, Source, SourceConfig, Tokenizer

logger = logging.getLogger("jaxtrain")

SMALL_BYTES = 2_000_000_000  # "auto" downloads sources up to this size: minutes on most networks
# Well-known datasets, so that "auto" need not query their sizes.
_LARGE = ("HuggingFaceFW/fineweb-edu", "HuggingFaceFW/fineweb", "Skylion007/openwebtext", "emozilla/pg19")
_SMALL = ("Salesforce/wikitext",)
_FETCHERS = 8  # files at once: enough to fill most networks


@dataclasses.dataclass(frozen=True)
class OpenedSource:
    """A source and how it is read.

    Attributes:
        source: The resolved source.
        mode: "stream", "download" or "pretokenized".
        why: The reason for the mode, for the log.
    """

    source: Source
    mode: str
    why: str


def store_folder(config: DataConfig, folder: str, name: str) -> str:
    """The token store's folder for source `name`: in data.token_store if set, else in `folder`, the run's own."""
    return os.path.join(config.token_store or folder, name)


def open_sources(
    config: DataConfig,
    tokenizer: Tokenizer,
    folder: str,
    identities: Mapping[str, Json] | None = None,
    streams: Mapping[str, Source] | None = None,
    chosen: Mapping[str, str] | None = None,
    cache: DiskCache | None = None,
    fetch: bool = True,
    ahead: bool = True,
) -> dict[str, OpenedSource]:
    """Opens every source in its mode.

    Args:
        config: The data config.
        tokenizer: The run's tokenizer.
        folder: The folder of the run's token stores.
        identities: Source identities from a checkpoint, as in `pipeline.resolve`.
        streams: Sources that are already resolved.
        chosen: The mode of each source, if another process has decided.
        cache: Where downloads go.
        fetch: Whether to download. If False, sources of mode "download" are returned as streams.
        ahead: Whether to download before reading. If False, each file is fetched at its first read.

    Returns:
        The opened sources by name, in the config's order.

    Raises:
        UserError: A token store is missing or belongs to another run, or as in `pipeline.resolve`.
        TransientError: As in `pipeline.resolve`.
    """
    memory = RamCache(config.ram_cache_gb * 1e9) if config.ram_cache_gb else None
    wanted = {name: config.mode if chosen is None else chosen[name] for name in config.sources}
    streams = streams or {}
    found: dict[str, OpenedSource] = {}
    for name, mode in wanted.items():
        where = store_folder(config, folder, name)
        if mode == "pretokenized" or (mode == "auto" and TokenManifest.exists(where)):
            known = (identities or {}).get(name)
            try:
                store = _store(config, name, tokenizer, where, known and known["source"], memory)
            except UserError as error:
                if mode == "pretokenized":
                    raise
                logger.warning("%s", error)
            else:
                why = "as data.mode says" if mode == "pretokenized" else f"its token store {where} is complete"
                found[name] = OpenedSource(store, "pretokenized", why)
    missing = {name: source for name, source in config.sources.items() if name not in found}
    resolved, unresolved = dict(streams), [name for name in missing if name not in streams]
    # Those to download resolve without the cache, which is attached later.
    for through, is_download in ((None, True), (cache, False)):
        sources = {name: missing[name] for name in unresolved if (wanted[name] == "download") == is_download}
        if sources:
            resolved |= pipeline.resolve(dataclasses.replace(config, sources=sources), identities, through)
    for name, source_config in missing.items():
        mode, why, source = wanted[name], "as data.mode says", resolved[name]
        if mode == "auto":
            mode, why = _choose(source_config, source, cache)
        elif mode == "download" and not _can_download(source):
            mode, why = "stream", "its files are on this machine"
        elif mode == "download" and name in streams and pipeline.wants_cache(source):
            mode, why = "stream", "through the disk cache, as for the tokenizer's training"
        found[name] = OpenedSource(source, mode, why)
    opened = {name: found[name] for name in config.sources}
    return _downloaded(config, opened, cache, ahead) if fetch else opened


def _can_download(source: Source) -> bool:
    return isinstance(source, CacheableSource) and not (isinstance(source, HuggingFaceSource) and source.is_local)


def _store(
    config: DataConfig, name: str, tokenizer: Tokenizer, where: str, identity: Json | None, memory: RamCache | None
) -> TokenStore:
    try:
        manifest = TokenManifest.load(where)
        token_store.check(manifest, where, config.sources[name], tokenizer, identity)
    except UserError as error:
        raise UserError(f"source {name!r}: {error}") from None
    return TokenStore(where, manifest, memory, identity)


def _choose(config: SourceConfig, source: Source, cache: DiskCache | None) -> tuple[str, str]:
    """The choice of "auto" without a token store: (mode, reason)."""
    if not isinstance(source, HuggingFaceSource) or not _can_download(source):
        return "stream", "no token store, and nothing to download first"
    if cache is None:
        return "stream", "no token store, and data.max_disk_gb=0 leaves no room to download"
    name: str = source.identity["name"]
    if os.path.exists(_marker(cache, source)):
        return "download", "no token store, and its files are already downloaded"
    if config.max_samples is not None:
        return "stream", "no token store, and max_samples limits what is read"
    if name in _LARGE:
        return "stream", f"no token store, and {name} is large"
    if name in _SMALL:
        return "download", f"no token store, and {name} is small"
    size = _bytes_of(source)
    if size is None:
        return "stream", "no token store, and its size is not known"
    comparison = "no more" if size <= min(SMALL_BYTES, cache.limit) else "more"
    why = f"no token store, and it has {cli.size(size)}, {comparison} than {SMALL_BYTES / 1e9:g} or the disk cache"
    return ("download" if comparison == "no more" else "stream"), why


def _bytes_of(source: HuggingFaceSource) -> int | None:
    if source.file_bytes is not None:
        return sum(source.file_bytes)
    try:
        return source.hub_bytes()
    except Exception as error:  # the size only decides how the files are read
        logger.warning("The size of %s: %s", source.identity["name"], retry.redact(str(error)))
        return None


def _downloaded(
    config: DataConfig, opened: Mapping[str, OpenedSource], cache: DiskCache | None, ahead: bool
) -> dict[str, OpenedSource]:
    """Routes sources of mode "download" through the cache. With `ahead`, fetches as many files as fit now."""
    found, left = dict(opened), 0 if cache is None else cache.limit
    for name, one in opened.items():
        source = one.source
        if one.mode != "download":
            continue
        assert isinstance(source, CacheableSource)
        if cache is None:
            raise UserError(
                "data.mode=download keeps files on disk, and data.max_disk_gb=0 allows none. Set it higher."
            )
        files: list[CachedBytes] = []

        def cached(file: Bytes, key: str, files: list[CachedBytes] = files) -> Bytes:
            files.append(CachedBytes(file, key, cache, 60 * config.retry_minutes))
            return files[-1]

        found[name] = dataclasses.replace(one, source=source.through(cached))
        if ahead:
            deadline = 60 * config.retry_minutes
            wanted = _files_with(name, source, config.sources[name].max_samples, deadline)
            marker = _marker(cache, source) if wanted == len(files) else None
            left -= _fetch(name, files[:wanted], left, deadline, marker)
    return found


def _files_with(name: str, source: Source, max_samples: int | None, deadline: float) -> int:
    """The number of leading files that hold the wanted documents; 0 if only reading them shows it."""
    count = len(source.files)
    if max_samples is None:
        return count
    if not source.random_access:
        logger.info("Source %s: only reading shows which files max_samples needs: each is fetched then.", name)
        return 0

    def groups(file: int) -> list[int]:
        read = functools.partial(source.row_groups, file)
        return retry.attempt(read, what=source.files[file], deadline=deadline)

    with ThreadPoolExecutor(_FETCHERS, "jaxtrain-footers") as executor:
        found = units.groups_within(count, max_samples, lambda some: list(executor.map(groups, some)))
    return max((file + 1 for file, sizes in enumerate(found) if sizes), default=0)


def _fetch(name: str, files: Sequence[CachedBytes], room: int, deadline: float, marker: str | None) -> int:
    """Fetches files into the cache in order, as far as there is room, with a progress bar. Returns the bytes fetched.

    marker: File to write once all files are there and they are the whole source; None otherwise.
    """
    with ThreadPoolExecutor(_FETCHERS, "jaxtrain-download") as executor:
        asked = [executor.submit(retry.attempt, file.size, what=file.what, deadline=deadline) for file in files]
        sizes = [future.result() for future in asked]
        fitting, taken = [], 0
        for file, size in zip(files, sizes, strict=True):
            if taken + size <= room:
                fitting.append((file, size))
                taken += size
        if taken < sum(sizes):
            logger.warning(
                "Source %s has %s, and data.max_disk_gb leaves room for %s: the rest is fetched every time it is read.",
                name,
                cli.size(sum(sizes)),
                cli.size(taken),
            )
        with tqdm(total=taken, desc=f"Downloading {name}", unit="B", unit_scale=True, disable=None) as bar:

            def one(file: CachedBytes, size: int) -> None:
                retry.attempt(functools.partial(file.fetch, 0, 1), what=file.what, deadline=deadline)
                bar.update(size)

            for future in [executor.submit(one, *each) for each in fitting]:
                future.result()
    if marker is not None and taken == sum(sizes):
        with open(marker, "w", encoding="utf-8") as out:
            json.dump({"source": name, "bytes": taken}, out)
    return taken


def _marker(cache: DiskCache, source: Source) -> str:
    """The file that marks a source as fully downloaded. It lies beside the cache, which manages its own folder."""
    return f"{cache.directory}-{record_store.digest_of_json(source.identity)}.json"
