"""The words that all layers share: shapes, batches, and the protocols of the parts that can be replaced.

Shape legend, used in names as suffixes (x_BTD is [batch, time, model width]):
    B rows of a batch        T tokens of a row (seq_len)     V vocabulary
    D model width            F MLP width                     L layers
    H query heads            K key/value heads               G query heads per key/value head (H // K)
    h head width             N rows or documents in general
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

# Fields of a batch. All are [B, T]; tokens, targets, segment_ids, positions are int32, loss_mask is bool.
#   tokens       input ids
#   targets      the next token of the stream at every position (looked up past the row's end)
#   segment_ids  1, 2, ... for the documents of the row; 0 is padding
#   positions    0, 1, ... restarting at each document (and at the row's start)
#   loss_mask    where the target counts
Batch = Mapping[str, np.ndarray]
BATCH_FIELDS = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
# With a cached teacher, also its records, uint8 [B, T, W]: what it said of the token after each (losses/cached.py).
RECORDS = "records"

# A run of consecutive rows of a source's file, by column: {"text": [row, row, ...], "int_score": [...]}. From a token
# store the only column "text" holds ids, a data.token_arrays.TokenArrays, which slices and adds as a list does.
Block = dict[str, Any]

Json = dict[str, Any]


def versioned(identity: Json) -> Json:
    """A source's identity with the version of its names and of its readers, 1 where it says nothing.

    Files' names key shuffle, holdout, skips, stores and caches, and readers decide what a row holds. A source that
    changes either records another version, and reads identities that hold an earlier one as they were read then, or
    refuses them.
    """
    return {"naming": 1, "reader": 1, **identity}


class Tokenizer(Protocol):
    """Text to ids. Ids are below `vocab_size`. `encode_batch` adds no special token: the packer does."""

    vocab_size: int
    eos_id: int
    bos_id: int | None
    token_bytes: np.ndarray  # int32 [V]: how many bytes of text a token stands for; 0 for special tokens
    identity: Json  # {"kind", "hash", "vocab_size", "eos_id", "bos_id", "probe"}: enforced at a resume

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """texts [N] → (ids int32 [sum of lengths], lengths int64 [N])."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


class TokenizerConfig(Protocol):
    """A dataclass that names a tokenizer. See tokenizers/."""

    def build(self, workdir: str) -> Tokenizer: ...


class Source(Protocol):
    """A resolved source: a list of files whose rows can be read from any position. Made by a `SourceConfig`.

    Knows nothing of lanes, shuffling, retries, holdout or caching: those live once, outside (data/). One whose files
    can be read through the disk cache is a `CacheableSource`.
    """

    @property
    def identity(self) -> Json:
        """Goes into the checkpoint; `SourceConfig.resolve(identity)` gives the same source again."""
        ...

    @property
    def files(self) -> Sequence[str]:
        """Lasting names, in the order of the listing."""
        ...

    @property
    def random_access(self) -> bool:
        """Opening at a row costs the same at any depth."""
        ...

    def row_groups(self, file: int) -> list[int]:
        """Rows in each separately readable group of a random-access file, from its footer."""
        ...

    def open(self, file: int, row: int, stop: int | None = None) -> Iterator[Block]:
        """Consecutive blocks from `row` on, to the end of the file; blocks may have any size above 0.

        stop: the row from which on nothing is wanted, so that nothing needs to be read for it; more may be given.

        Raises TransientError, CorruptError or UserError; an exception never looks like the end of the file.
        """
        ...


@runtime_checkable
class CacheableSource(Source, Protocol):
    """A source that reads its files as `Bytes` (data/io/byte_ranges.py), and so can read them through a disk cache."""

    @property
    def needs_cache(self) -> bool:
        """In every mode: its files are read from the beginning to the end, and again at each resume."""
        ...

    @property
    def file_bytes(self) -> Sequence[int] | None:
        """The sizes of all files, or None where nobody has asked."""
        ...

    def through(self, cached: Callable[[Any, str], Any]) -> "Source":
        """The same source, same identity, each file's Bytes replaced by `cached(it, key)`.

        key: names the file and its version among all sources and for ever: what the identity says of it.
        """
        ...


class Transform(Protocol):
    """A pure function of one document (its columns → its columns), or None to drop it. Hashed into the identity."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reads besides the text."""
        ...

    def __call__(self, document: dict[str, Any]) -> dict[str, Any] | None: ...


class SourceConfig(Protocol):
    """A dataclass that names a source. `resolve` does the network work, once, at start."""

    max_samples: int | None
    transforms: tuple[Transform, ...]

    def resolve(self, identity: Json | None = None) -> Source:
        """identity: None to look the dataset up now; from a checkpoint, to have exactly what it had."""
        ...


class ScheduleConfig(Protocol):
    """See plan/schedules.py."""

    def build(self) -> "Schedule": ...


class LossFn(Protocol):
    """Hidden states and head → sums over the batch, never [B, T, V]. See losses/."""

    def __call__(self, x_BTD: Any, w_DV: Any, targets_BT: Any, mask_BT: Any) -> dict[str, Any]: ...


Schedule = Callable[
    [int, int | None], float
]  # (tokens trained before the step, total tokens) → factor on the peak rate
