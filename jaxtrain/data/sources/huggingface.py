"""Datasets on the Hugging Face Hub, and files anywhere in a format that the datasets library reads.

`resolve` fixes once what is read: the commit, the list of files, and how to decode them. The datasets library lists a
dataset's files and the reader options from its card; parquet.py, streams.py and samples.py read the files.
"""

import array
import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxtrain.data.io import retry
from jaxtrain.data.io.byte_ranges import Bytes, LocalBytes, session
from jaxtrain.data.io.locations import cache_key, check_unchanged, expand, locate, spread, stamps
from jaxtrain.data.io.names import NAMING, addresses, is_exact, lasting_name, named
from jaxtrain.data.sources.parquet import ParquetFiles, check_columns
from jaxtrain.data.sources.samples import sample_blocks
from jaxtrain.data.sources.streams import BUILDER_KWARGS, misread_reason, reader_version, stream_blocks
from jaxtrain.errors import CorruptError, TransientError, UserError
from jaxtrain.interfaces import Block, Json, Transform, versioned

BUILDERS = ("parquet", "json", "csv", "text", "arrow", "xml", "webdataset")
# Common name of a dataset → its id and configuration.
SHORT_NAMES = {
    "finewebedu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "openwebtext": ("Skylion007/openwebtext", None),
    "pg19": ("emozilla/pg19", None),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}


@dataclasses.dataclass(kw_only=True)
class HuggingFace:
    """A dataset on the Hub, or any files read with a builder.

    Attributes:
        name: the Hub dataset ("org/name", or one of the SHORT_NAMES: "finewebedu", "openwebtext", "pg19",
            "wikitext-103"), or a builder ("parquet", "json", "csv", "text", ...) for `data_files`.
        config_name: the dataset's configuration (subset), if it has several. A short name implies its own.
        split: the split. With a builder, all files belong to it.
        column: the column with the text.
        revision: branch, tag or commit of a Hub dataset; None for the main branch. Resolved to a commit once.
        data_files: file patterns: paths within the Hub dataset or, with a builder, local paths and http(s), s3, gs and
            hf:// URLs. Braces expand: `part-{000..005}.jsonl.gz`. () for all files of the split.
        max_samples: read only the first N documents, in file order. None for all.
        fetch_rows: approximate rows per request to a parquet file (within 256 kB to 16 MB). Larger values use more
            memory per reader, smaller ones need more round trips.
        transforms: functions on one document, applied in order.
    """

    name: str
    config_name: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    max_samples: int | None = None
    fetch_rows: int = 1024
    transforms: tuple[Transform, ...] = ()

    def check(self) -> None:
        if not self.name or not self.column or not self.split:
            raise UserError("name, column and split may not be empty.")
        if self.name in BUILDERS and not self.data_files:
            raise UserError(f"name={self.name!r} is a builder and needs data_files: paths, patterns or URLs.")
        if self.name in BUILDERS and self.revision is not None:
            raise UserError(
                "revision belongs to a Hub dataset. In data_files write hf://datasets/ORG/NAME@REVISION/PATH."
            )
        known = {*BUILDERS, *SHORT_NAMES}
        if self.name not in known and (self.name.count("/") != 1 or self.name.startswith((".", "/"))):
            builders, short = ", ".join(BUILDERS), ", ".join(SHORT_NAMES)
            raise UserError(
                f"name={self.name!r} is neither a Hub dataset (ORG/NAME, or for short {short}) nor a builder "
                f"({builders}). For your own files, use the builder of their format and give their paths in "
                "data_files."
            )
        if "[" in self.split:
            raise UserError(f"split={self.split!r}: slices are not supported. Limit the documents with max_samples.")
        if self.fetch_rows < 1 or (self.max_samples is not None and self.max_samples < 1):
            raise UserError(f"fetch_rows={self.fetch_rows} and max_samples={self.max_samples} must be at least 1.")

    def columns(self) -> tuple[str, ...]:
        """The columns that the transforms read besides the text. Transforms see the chosen column as "text"."""
        wanted = (name for transform in self.transforms for name in transform.columns if name != "text")
        return tuple(dict.fromkeys(wanted))

    def full_name(self) -> "HuggingFace":
        """Returns the config with a short name replaced by the full dataset id and configuration."""
        if self.name not in SHORT_NAMES:
            return self
        name, config_name = SHORT_NAMES[self.name]
        return dataclasses.replace(self, name=name, config_name=self.config_name or config_name)

    def resolve(self, identity: Json | None = None) -> "HuggingFaceSource":
        """Looks the dataset up, or reopens exactly the files of a checkpoint.

        Args:
            identity: the source's identity in a checkpoint; None to look the dataset up now.

        Raises:
            UserError: the dataset or a file does not exist, is not accessible, has changed, or lacks the column.
            TransientError: the network or a server failed; the caller may retry.
        """
        session()  # what the Hub's client does keeps the deadline from here on
        if self.name in SHORT_NAMES:
            return self.full_name().resolve(identity)
        if identity is not None:
            return self._resume(identity)
        if self.name in BUILDERS:
            found = expand(self.data_files)
            kwargs = BUILDER_KWARGS.get(self.name, {})
            return self._found(list(found), list(found.values()), None, self.name, kwargs, None)
        return self._look_up_dataset()

    def _about(self) -> Json:
        """The part of the identity that comes from the config alone."""
        return {
            "kind": "huggingface",
            "name": self.name,
            "config": self.config_name,
            "split": self.split,
            "column": self.column,
        }

    def _look_up_dataset(self) -> "HuggingFaceSource":
        sha = self._sha()
        builder = self._builder(sha)
        if builder.name not in BUILDERS:
            raise UserError(
                f"dataset {self.name} has the format {builder.name!r}, which is not one of {', '.join(BUILDERS)}. Try "
                "its parquet files with revision='refs/convert/parquet'."
            )
        addresses = self._split(builder)
        named(addresses)  # raises if two files share a name
        names = [lasting_name(address).removeprefix(self._root(sha)) for address in addresses]
        features = getattr(builder.config, "features", None) or builder.info.features
        return self._found(names, addresses, sha, builder.name, _builder_kwargs(builder, features), features)

    def _found(
        self, names: list[str], addresses: list[str], sha: str | None, builder: str, kwargs: Json, features: Any
    ) -> "HuggingFaceSource":
        """The source of these files, its columns checked. features: datasets.Features, if the card declares them."""
        files = [locate(address) for address in addresses]
        identity = {
            **self._about(),
            "naming": NAMING,
            "revision": sha,
            "files": names,
            "stamps": stamps(names, files),
            "reader": reader_version(builder, names),
            "builder": builder,
            "builder_kwargs": kwargs,
        }
        source = HuggingFaceSource(self, identity, addresses, files)
        source.check_schema(features)
        return source

    def _root(self, sha: str) -> str:
        """The address prefix of the dataset's own files."""
        return f"hf://datasets/{self.name}@{sha}/"

    def _split(self, builder: Any) -> list[str]:
        """The addresses of the split's files."""
        by_split = builder.config.data_files or {}
        if self.split not in by_split:
            splits = ", ".join(repr(str(split)) for split in by_split)
            raise UserError(f"dataset {self.name} has no split {self.split!r}. It has {splits or 'no files'}.")
        return [str(address) for address in by_split[self.split]]

    def _sha(self) -> str:
        """The commit that `revision` currently points to."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        what = f"dataset {self.name}"
        try:
            sha = HfApi().dataset_info(self.name, revision=self.revision).sha
        except RevisionNotFoundError:
            raise UserError(f"{what} has no revision {self.revision!r}. {self._branches()}") from None
        except Exception as error:
            fault = retry.classify(error, what)
            if isinstance(error, RepositoryNotFoundError) and (names := self._similar()):
                fault = UserError(f"{fault} Similar names: {', '.join(names)}.")
            raise _as_fault(fault, error, what) from None
        assert sha is not None
        return sha

    def _builder(self, sha: str) -> Any:
        import datasets
        from huggingface_hub import HfApi

        what = f"dataset {self.name}" + (f" with data_files={self.data_files}" if self.data_files else "")
        try:
            builder = datasets.load_dataset_builder(
                self.name,
                self.config_name,
                data_files=[file for pattern in self.data_files for file in spread(pattern)] or None,
                revision=sha,
            )
        except Exception as error:
            fault = retry.classify(error, what)
            if isinstance(error, FileNotFoundError):
                # The library hides the cause with `from None`, and the client's file system reports a server's 503 as a
                # missing file. Look at the hidden exception, and check that listing works at all.
                hidden = retry.classify(error.__context__ or error, what)
                fault = hidden if isinstance(hidden, TransientError) else fault
                with retry.classified(f"dataset {self.name}"):
                    next(iter(HfApi().list_repo_tree(self.name, revision=sha, repo_type="dataset")), None)
            raise _as_fault(fault, error, what) from None
        if builder.name == "cache":
            raise TransientError(f"{what}: the Hub cannot be reached (a prepared copy is in the datasets cache)")
        return builder

    def _similar(self) -> list[str]:
        """Names of Hub datasets similar to the one given."""
        from huggingface_hub import HfApi

        try:
            found = [info.id for info in HfApi().list_datasets(search=self.name.split("/")[-1], limit=50)]
        except Exception:
            return []  # suggestions are optional: the unknown name is reported either way
        return difflib.get_close_matches(self.name, found, n=3, cutoff=0.3)

    def _branches(self) -> str:
        from huggingface_hub import HfApi

        try:
            refs = HfApi().list_repo_refs(self.name, repo_type="dataset")
        except Exception:
            return ""
        return f"It has {', '.join(ref.name for ref in [*refs.branches, *refs.tags])}."

    def _resume(self, identity: Json) -> "HuggingFaceSource":
        for key, now in self._about().items():
            if identity[key] != now:
                raise UserError(f"source {key}: the checkpoint has {identity[key]!r}, the config has {now!r}.")
        if reason := misread_reason(identity, self.columns(), is_stored=False):
            raise UserError(
                f"{self.name}: the checkpoint's documents were read by version 0.1; {reason}. The documents would "
                "change: start a new run in another --workdir."
            )
        # Only the config has credentials and URL signatures.
        known = [file for pattern in self.data_files if pattern.startswith("http") for file in spread(pattern)]
        sha, root = identity["revision"], ""
        if sha is not None:
            root = self._root(sha)
            paths = [root + path for path in self._paths(sha)]
            if versioned(identity)["naming"] == 1 and any(lasting_name(path, 1) != path for path in paths):
                known += self._split(self._builder(sha))
        elif not is_exact(identity):
            known += expand(self.data_files).values()
        found = addresses(identity, known, root)
        files = [locate(address) for address in found]
        check_unchanged(identity["stamps"], identity["files"], files)
        return HuggingFaceSource(self, identity, found, files)

    def _paths(self, sha: str) -> list[str]:
        """The paths of all files at a checkpoint's commit. Raises UserError if the Hub no longer has the commit."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RevisionNotFoundError

        what = f"dataset {self.name}"
        try:
            info = HfApi().dataset_info(self.name, revision=sha)
            return [file.rfilename for file in info.siblings or ()]
        except RevisionNotFoundError:
            raise UserError(
                f"{what}: the checkpoint's revision {sha} is gone from the Hub; {self.revision or 'main'} is now "
                f"{self._sha()}. Its documents may differ: start a new run in another --workdir."
            ) from None
        except Exception as error:
            raise _as_fault(retry.classify(error, what), error, what) from None


class HuggingFaceSource:
    """A resolved `HuggingFace`. Implements interfaces.Source. Thread-safe."""

    def __init__(self, config: HuggingFace, identity: Json, addresses: Sequence[str], files: Sequence[Bytes]):
        self.addresses = addresses
        self.config = config
        self.identity = versioned(identity)
        self.files: list[str] = identity["files"]
        self.random_access: bool = identity["builder"] == "parquet"
        self.text = config.column
        self.columns = config.columns()
        self._files = files
        self._parquet = ParquetFiles(files, config.fetch_rows)

    def row_groups(self, file: int) -> list[int]:
        """The number of rows in each row group of a parquet file."""
        assert self.random_access, self.identity["builder"]
        return self._parquet.row_groups(file)

    def known_row_groups(self) -> list[tuple[int, list[int]]]:
        """Returns (file, its row groups) for every file whose footer has been read."""
        return [(file, rows.tolist()) for file, rows in list(self._parquet.rows.items())]

    def learn_row_groups(self, known: Sequence[tuple[int, list[int]]]) -> None:
        """Takes over the result of another process's `known_row_groups`."""
        for file, rows in known:
            self._parquet.rows.setdefault(file, array.array("q", rows))

    def open(self, file: int, row: int, stop: int | None = None) -> Iterator[Block]:
        """Yields blocks of up to 512 rows: "text" and the columns that the transforms need."""
        if self.random_access:
            return self._parquet.blocks(file, row, self.text, self.columns, stop)
        about = self.identity
        if about["builder"] == "webdataset":
            return sample_blocks(self._files[file], row, self.text, self.columns)
        return stream_blocks(
            self._files[file],
            self.files[file],
            row,
            self.text,
            self.columns,
            about["builder"],
            about["builder_kwargs"],
        )

    @property
    def needs_cache(self) -> bool:
        return False

    @property
    def file_bytes(self) -> list[int] | None:
        """The size of each file in bytes, from the stamps; None if any file has no stamp. Makes no request."""
        found = [self.identity["stamps"].get(name, {}).get("size") for name in self.files]
        return None if None in found else found

    @property
    def is_local(self) -> bool:
        return all(isinstance(file, LocalBytes) for file in self._files)

    def through(self, cached: Callable[[Bytes, str], Bytes]) -> "HuggingFaceSource":
        """Returns the source with its remote files wrapped by `cached`. Local files are read directly."""
        files = []
        for name, address, file in zip(self.files, self.addresses, self._files, strict=True):
            key = cache_key(address, self.identity["stamps"].get(name))
            files.append(file if isinstance(file, LocalBytes) else cached(file, key))
        made = HuggingFaceSource(self.config, self.identity, self.addresses, files)
        # Reading a footer through the cache would download its whole file, which may never be needed.
        made._parquet.rows = self._parquet.rows
        return made

    def hub_bytes(self) -> int | None:
        """The total size of all files in bytes, from one request to the Hub; None if the Hub does not report it."""
        from huggingface_hub import HfApi

        if self.identity["revision"] is None:
            return None
        sha, wanted = self.identity["revision"], set(self.files)
        info = HfApi().dataset_info(self.identity["name"], revision=sha, files_metadata=True)
        sizes = {one.rfilename: one.size for one in info.siblings or ()}
        found = [sizes.get(name) for name in wanted]
        return None if None in found else sum(size or 0 for size in found)

    def check_schema(self, features: Any) -> None:
        """Checks at startup that the columns exist: the stage that needs them may be days away.

        A corrupt first file is ignored here and left to its readers.

        Args:
            features: the datasets.Features of the dataset card, if it declares any.

        Raises:
            UserError: a column is missing.
        """
        with contextlib.suppress(CorruptError):
            if self.random_access or features is not None:
                schema = self._parquet.schema(0) if self.random_access else features.arrow_schema
                check_columns(schema, self.text, self.columns, self._files[0].what)
            else:
                # The columns are known only from the rows. Reading the first block checks them.
                next(self.open(0, 0), None)


def _builder_kwargs(builder: Any, features: Any) -> Json:
    """Our reader options, overridden by those of the dataset card (a separator, a field, ...)."""
    config = builder.config
    plain = type(config)()
    kwargs: Json = dict(BUILDER_KWARGS.get(builder.name, {}))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("name", "version", "data_dir", "data_files", "description", "features", "converters"):
            continue
        if value != getattr(plain, field.name) and isinstance(value, str | int | float | bool | list | None):
            kwargs[field.name] = value
    if builder.name == "json" and features is not None:
        # Declared features allow columns that appear only in later rows.
        kwargs["features"] = features.to_dict()
    return kwargs


def _as_fault(fault: BaseException, error: BaseException, what: str) -> BaseException:
    """The exception to raise for a failed lookup. The client's errors about names and settings become UserErrors."""
    if fault is not error or not isinstance(error, ValueError | RuntimeError | NotImplementedError | ImportError):
        return fault
    text = retry.redact(str(error)).strip()
    if "scripts are no longer supported" in text:
        text += ". jaxtrain runs no code of datasets: try its parquet files with revision='refs/convert/parquet'."
    return UserError(f"{what}: {text}")
