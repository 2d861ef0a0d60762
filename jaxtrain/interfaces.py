"""The contracts of everything that can be replaced: models, losses, optimizers, sources, tokenizers.

Each is a protocol. A component from outside the package implements one, and its config, a keyword-only dataclass whose
`build` or `resolve` makes it, goes into the root config; nothing has to be registered. CONTRIBUTING.md has a guide for
each, and `examples/` has one file for each. This module does not import JAX: `Array` is `jax.Array`.

Shape legend, used as suffixes of names (x_BTD is [batch, time, model width]):
    B rows of a batch        T tokens of a row (seq_len)     V vocabulary
    D model width            F MLP width                     L layers
    H query heads            K key/value heads               G query heads per key/value head (H // K)
    h head width             N rows, documents or positions in general
"""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np

Array = Any  # jax.Array
Mesh = Any  # jax.sharding.Mesh, with the axes of distributed/sharding.py
Params = dict[str, Any]  # nested dicts with str keys; leaves are arrays
Axes = Any  # the tree of Params with a tuple of logical axes for each leaf: ("embed", "mlp")
Json = dict[str, Any]

# Fields of a batch. All are [B, T]; tokens, targets, segment_ids, positions are int32, loss_mask is bool.
#   tokens       input ids
#   targets      the next token of the stream at every position (looked up past the row's end)
#   segment_ids  1, 2, ... for the documents of the row; 0 is padding
#   positions    0, 1, ... restarting at each document (and at the row's start)
#   loss_mask    where the target counts
Batch = Mapping[str, np.ndarray]
BATCH_FIELDS = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
# With a cached teacher a batch also has its records, uint8 [B, T, W]: the teacher's most likely next tokens
# (losses/cached.py).
RECORDS = "records"


# ---- Models


class Dataclass(Protocol):
    """Configs are keyword-only dataclasses of plain values, compared, overridden and recorded field by field."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class ModelConfig(Dataclass, Protocol):
    """A dataclass that describes a model.

    Fields named `remat`, `scan_layers`, `attention` and `max_seq_len` determine how the model is computed, and may
    change at a resume. All others determine what it computes; a resume refuses a change. The trainer sets `remat` if
    it is "auto", to "none", "dots" or "full", and `scan_layers` if it is None, in the `config` of a shallow copy of the
    model (trainer/tuning.py). A frozen teacher gets the teacher's `dtype`, remat="none", scan_layers=True and
    attention="auto", if it has these fields.
    """

    @property
    def max_seq_len(self) -> int:
        """The longest row in tokens."""
        ...

    def build(self, vocab_size: int, mesh: Mesh | None) -> "Model":
        """The model for ids below `vocab_size`; makes no parameters yet.

        Raises:
            UserError: The mesh does not divide the model.
        """
        ...


class Hidden(NamedTuple):
    """What a model's layers return.

    Attributes:
        x: Final hidden states [B, T, D], after the last norm, in the compute dtype. `x @ head` are the logits.
        losses: Auxiliary losses by name, fp32 scalars, each a mean over the rows given and already weighted, such as a
            router's load balance. They are added to the loss, weighted by the tokens of each micro-batch.
        metrics: fp32 scalars to report, averaged in the same way.
        max_logits: The largest attention logit of each head, fp32 [L, H]; None unless asked for (ClippableModel).
    """

    x: Array
    losses: Mapping[str, Array] = {}
    metrics: Mapping[str, Array] = {}
    max_logits: Array | None = None


class Model(Protocol):
    """Pure functions of a tree of fp32 parameters, called inside `jax.jit`.

    `model.base.BaseModel` derives the attributes from `axes` and `init`, and has defaults for the last two methods; a
    subclass of it writes `init`, `hidden`, `head` and `flops_per_token`. Optional abilities are separate protocols, and
    the attribute `width_ratio`: see `WidthScaledConfig`.

    Attributes:
        config: What built it, with derived values filled in.
        mesh: None for a single device.
        vocab_size: Ids in use. The head may have more columns: padding, which losses mask.
        axes: The logical axes of each parameter, from which sharding, weight decay and Muon's matrices follow: see
            `distributed.sharding.RULES`. "layers" comes first on parameters stacked over layers. A table looked up by
            token is ("vocab", "embed"), the output head ("embed", "vocab"). None is an axis that is never sharded.
        shapes: The parameters as `jax.ShapeDtypeStruct`s.
        num_params: Parameters without the vocabulary's padding.
        num_params_non_embedding: Parameters without token embedding and output head.
        num_active_params: Those of them that a token uses: of experts, only the ones that it chooses.
        padded_vocab_size: Columns of the head.
    """

    config: Any
    mesh: Mesh | None
    vocab_size: int
    axes: Axes
    shapes: Params
    num_params: int
    num_params_non_embedding: int
    num_active_params: int
    padded_vocab_size: int

    @abc.abstractmethod
    def init(self, key: Array) -> Params:
        """Fresh parameters. Runs under jit with `out_shardings`, so they are created sharded."""
        ...

    @abc.abstractmethod
    def hidden(self, params: Params, tokens_BT: Array, segment_ids_BT: Array, positions_BT: Array) -> Hidden:
        """The layers. A token sees itself and earlier tokens of its own segment. Inputs are int32 [B, T]."""
        ...

    @abc.abstractmethod
    def head(self, params: Params) -> Array:
        """The output head, fp32 [D, V], such that hidden states `x @ head` are the logits. V is `padded_vocab_size`.

        A model that bounds its logits returns `losses.head.SoftCapped`.
        """
        ...

    @abc.abstractmethod
    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of training (forward and backward) for one token in rows of `seq_len`; recomputation does not count."""
        ...

    def compiler_options(self, batch_size: int, seq_len: int) -> dict[str, str]:
        """Options of XLA that a program with this model's layers needs. The shape is a micro-batch's."""
        ...

    def memory_advice(self) -> tuple[str, ...]:
        """Changes to the config that would take less memory, for the message when a step does not fit."""
        ...


@runtime_checkable
class AttentionModel(Protocol):
    """A model with several attention implementations. The choice is logged for each stage."""

    def attention_choice(self, batch_size: int, seq_len: int) -> Any:
        """An object with the attributes `name` and `reason`, both str."""
        ...


@runtime_checkable
class BoundedModel(Protocol):
    """A model with a bound on the number of documents in a batch. A batch with more runs through `unbounded()`."""

    def most_documents(self, batch_size: int, seq_len: int) -> tuple[int, int] | None:
        """(rows, documents): any `rows` of a batch of this shape may contain that many documents together. A document's
        part in a row counts as one, and so does a row's padding. None: there is no bound."""
        ...

    def unbounded(self) -> Model:
        """The same model, with the same parameters, for any number of documents."""
        ...


@runtime_checkable
class EightBitModel(Protocol):
    """A model that `precision="fp8"` is for."""

    def in_fp8(self) -> Model:
        """The same model, with the same parameters, whose products with its layers' weights are of 8-bit values."""
        ...


@runtime_checkable
class ClippableModel(Protocol):
    """A model that QK-clip (an optimizer's `qk_clip`) is for."""

    def watching_logits(self) -> Model:
        """The same model, with the same parameters, whose `hidden` also returns `max_logits`.

        Raises:
            UserError: Scaling the weights would not bound the logits.
        """
        ...

    def clip_logits(self, params: Params, max_logits_LH: Array, threshold: float) -> Params:
        """Scales the weights of queries and keys, so that logits of heads above the threshold shrink to it."""
        ...


@runtime_checkable
class CachingModel(Protocol):
    """A model that generates with a key/value cache. For any other, each new token recomputes the whole text.

    Prompts are padded on the left, so that all rows write the same slot. S is the length of the cache in tokens.
    """

    @property
    def decoding_options(self) -> dict[str, str]:
        """Options of XLA for programs with these two methods."""
        ...

    def prefill(self, params: Params, tokens_BT: Array, start_B: Array, length: int) -> tuple[Array, Any]:
        """Reads the prompts, row b from column `start_B[b]` on: (hidden states of the last column [B, D], a cache with
        S = `length` slots)."""
        ...

    def decode_one(self, params: Params, token_B: Array, slot: Array, start_B: Array, cache: Any) -> tuple[Array, Any]:
        """Reads one more token of each row into slot `slot` (int32 scalar): (hidden states [B, D], the cache)."""
        ...


# ---- Losses


class LossFn(Protocol):
    """A loss as the train step calls it."""

    def __call__(self, x_BTD: Array, w_DV: Array, targets_BT: Array, mask_BT: Array) -> dict[str, Array]:
        """Sums over the positions where the mask is True, fp32 scalars; the trainer divides by their number.

        Args:
            x_BTD: Final hidden states in the compute dtype.
            w_DV: The output head, fp32. Columns from the vocabulary's size on are padding.
            targets_BT: int32 ids; anything where the mask is False.
            mask_BT: bool.

        Returns:
            "loss", which is differentiated with respect to x and w. Everything else is reported in the metrics;
            "ce_loss", the plain cross-entropy in nats, is what perplexity and evaluation show.
        """
        ...


class LossConfig(Dataclass, Protocol):
    """A dataclass that describes a loss."""

    def build(self, vocab_size: int, mesh: Mesh | None) -> LossFn:
        """`losses.chunks.from_function` turns a plain differentiable function of (hidden, head, targets, mask) into a
        LossFn that is computed in chunks of positions and sharded."""
        ...


# ---- Optimizers

Schedule = Callable[[int, int | None], float]  # (tokens trained before, total tokens) -> factor on the peak rate


class ScheduleConfig(Dataclass, Protocol):
    """A dataclass that describes a learning-rate schedule. See plan/schedules.py."""

    def build(self) -> Schedule: ...


class Optimizer(Protocol):
    """Pure functions, called inside `jax.jit`."""

    def init(self, params: Params, /) -> Any:
        """The state: a tree of arrays. An array with a parameter's path and shape is sharded like the parameter."""
        ...

    def update(self, grads: Params, state: Any, params: Params, learning_rate: Array, /) -> tuple[Params, Any]:
        """(new parameters, new state).

        Args:
            grads: The mean gradient, clipped, fp32.
            learning_rate: fp32 scalar, including the schedule. This method applies weight decay.
        """
        ...


@runtime_checkable
class AveragingOptimizer(Optimizer, Protocol):
    """An optimizer whose parameters are an average: good to evaluate, while gradients are taken elsewhere."""

    def gradient_at(self, params: Params, state: Any, /) -> Params:
        """The parameters whose loss and gradient a step computes."""
        ...


class OptimizerConfig(Dataclass, Protocol):
    """A dataclass that describes an optimizer. `optim.base.OptaxConfig` makes one of any optax transformation.

    Attributes:
        learning_rate: The peak rate.
        schedule: Scales the peak rate over the run.
        qk_clip: Optional: the largest attention logit that the train step leaves (ClippableModel); None for any.
    """

    learning_rate: float
    schedule: ScheduleConfig

    def build(self, axes: Axes, mesh: Mesh | None) -> Optimizer:
        """axes: the parameters' logical axes, which distinguish matrices, embeddings and biases."""
        ...


@runtime_checkable
class WidthScaledConfig(Protocol):
    """An optimizer's config that a model with width transfer, whose `width_ratio` is not 1, can use."""

    def build_scaled(self, axes: Axes, mesh: Mesh | None, width_ratio: float) -> Optimizer:
        """As `build`, with the learning rates of the matrices of layers for a model so many times as wide.

        Raises:
            UserError: The optimizer has no rule for it.
        """
        ...


# ---- Tokenizers


class Tokenizer(Protocol):
    """Text to ids. `encode_batch` adds no special token: the packer does.

    Attributes:
        vocab_size: All ids are below it.
        eos_id: Ends every document.
        bos_id: Begins every document if `data.add_bos` is set; None if there is none.
        token_bytes: int32 [V], the bytes of a token's text; 0 for special tokens.
        identity: {"kind", "hash", "vocab_size", "eos_id", "bos_id", "probe"}; a resume refuses another one.
    """

    vocab_size: int
    eos_id: int
    bos_id: int | None
    token_bytes: np.ndarray
    identity: Json

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """N texts -> (ids int32 [sum of lengths], lengths int64 [N])."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


@runtime_checkable
class SpellingTokenizer(Tokenizer, Protocol):
    """A tokenizer that knows the bytes of its tokens, so that they can be aligned with those of another tokenizer.

    Attributes:
        spellings: The bytes of each id's text, [V]; b"" for special tokens.
    """

    spellings: list[bytes]


class TokenizerConfig(Dataclass, Protocol):
    """A dataclass that names a tokenizer. See tokenizers/."""

    def build(self, workdir: str) -> Tokenizer: ...


# ---- Sources

# Consecutive rows of a source's file by column: {"text": [row, row, ...], "int_score": [...]}. A token store has the
# single column "text", which holds ids: a data.token_arrays.TokenArrays, which slices and adds as a list does.
Block = dict[str, Any]


class Source(Protocol):
    """A resolved source: a list of files whose rows can be read from any position.

    It knows nothing of lanes, shuffling, retries, holdout or caching; `data/` adds those to every source.
    """

    @property
    def identity(self) -> Json:
        """Identifies the data: `SourceConfig.resolve(identity)` returns this source again. Checkpointed."""
        ...

    @property
    def files(self) -> Sequence[str]:
        """Lasting names in the order of the listing. Shuffle, holdout, skips and caches are keyed by them."""
        ...

    @property
    def random_access(self) -> bool:
        """Whether opening at a row costs the same at any depth."""
        ...

    def row_groups(self, file: int) -> list[int]:
        """Rows in each separately readable group of a random-access file, from its footer."""
        ...

    def open(self, file: int, row: int, stop: int | None = None) -> Iterator[Block]:
        """Consecutive blocks from `row` to the end of the file, of any size above 0.

        Args:
            file: Index into `files`.
            row: The first row, from 0.
            stop: Rows from it on are not needed; the source may return them.

        Raises:
            TransientError: Worth a retry.
            CorruptError: The file is damaged.
            UserError: The user must change something. No exception may look like the end of the file.
        """
        ...


@runtime_checkable
class CacheableSource(Source, Protocol):
    """A source that reads its files as `Bytes` (data/io/byte_ranges.py), so that a disk cache can sit in between."""

    @property
    def needs_cache(self) -> bool:
        """Whether it needs the cache in every mode: files are read from the beginning, and again at each resume."""
        ...

    @property
    def file_bytes(self) -> Sequence[int] | None:
        """The sizes of all files, or None if they have not been looked up."""
        ...

    def through(self, cached: Callable[[Any, str], Any]) -> "Source":
        """The same source and identity with each file's Bytes replaced by `cached(bytes, key)`.

        The key is a lasting name of the file and its version, unique among all sources.
        """
        ...


class Transform(Protocol):
    """A pure function of one document (its columns -> its columns), or None to drop it. Part of the identity."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that it reads besides the text."""
        ...

    def __call__(self, document: dict[str, Any]) -> dict[str, Any] | None: ...


class SourceConfig(Dataclass, Protocol):
    """A dataclass that names a source.

    Attributes:
        max_samples: Maximum documents to read per epoch; None for all.
        transforms: Applied to each document in order.
    """

    max_samples: int | None
    transforms: tuple[Transform, ...]

    def resolve(self, identity: Json | None = None) -> Source:
        """Does the network access, once, at start.

        Args:
            identity: None looks the data up now; one from a checkpoint gives exactly what it had.
        """
        ...


def versioned(identity: Json) -> Json:
    """The identity with its naming and reader versions, 1 if it lacks them.

    Files' names key shuffle, holdout, skips, stores and caches, and readers decide what a row holds. A source that
    changes either records a higher version, and reads an older identity as the older version did, or refuses it.
    """
    return {"naming": 1, "reader": 1, **identity}
