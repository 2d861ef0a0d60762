"""jaxtrain's compiled train step on one device, for benchmarks."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain.distributed import sharding
from jaxtrain.distributed.sharding import MeshConfig, batch_sharding
from jaxtrain.interfaces import Json
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.losses.distillation import Distillation
from jaxtrain.model.llama import Llama, LlamaConfig
from jaxtrain.optim.adamw import AdamW
from jaxtrain.trainer import state
from jaxtrain.trainer.step import Distilled, StepComponents, lower_train_step

LEARNING_RATE, CLIP_NORM = 1e-4, 1.0


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the shape of its batch."""

    model: LlamaConfig
    vocab_size: int
    batch_size: int
    seq_len: int

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len


def batch(size: Size, document_tokens: int | None = None) -> dict[str, np.ndarray]:
    """Returns a batch of random tokens.

    Args:
        size: The model and the shape of the batch.
        document_tokens: Mean length of documents; None for one document per row.
    """
    rng = np.random.default_rng(0)
    shape = (size.batch_size, size.seq_len)
    tokens = rng.integers(0, size.vocab_size, (size.batch_size, size.seq_len + 1)).astype(np.int32)
    segment_ids = segments(shape, document_tokens)
    same = np.arange(size.seq_len)[None]
    starts = np.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    positions = same - np.maximum.accumulate(np.where(starts, same, 0), axis=1)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segment_ids,
        "positions": positions.astype(np.int32),
        "loss_mask": np.ones(shape, bool),
    }


def segments(shape: tuple[int, int], document_tokens: int | None) -> np.ndarray:
    """Returns ids of packed documents, starting at 1, int32 [B, T].

    Each token begins a document with probability 1 / document_tokens; None makes each row one document.
    """
    if document_tokens is None:
        return np.ones(shape, np.int32)
    begins = np.random.default_rng(1).random(shape) < 1 / document_tokens
    begins[:, 0] = True
    return begins.cumsum(axis=1).astype(np.int32)


class JaxStep:
    """A compiled step with its state.

    Args:
        size: The model and the shape of its batch.
        seed: Seed of the parameters.
        teacher: Config of a teacher with random parameters, to distill from.
    """

    def __init__(self, size: Size, seed: int = 0, teacher: LlamaConfig | None = None):
        mesh = MeshConfig().build(jax.devices()[:1])
        self.model: Llama = size.model.build(size.vocab_size, mesh)
        optimizer = AdamW(learning_rate=LEARNING_RATE).build(self.model.axes, mesh)
        loss = CrossEntropy().build(size.vocab_size, mesh)
        self.teacher: Llama | None = None
        self.teaching: tuple[Any, ...] = ()
        distilled = None if teacher is None else self._distilled(teacher, size.vocab_size, mesh)
        components = StepComponents(self.model, loss, optimizer, mesh, CLIP_NORM, distilled)
        self.compiled = lower_train_step(components, size.batch_size, size.seq_len, 1).compile()
        self.state = state.create(self.model, optimizer, mesh, seed)
        self._layout = batch_sharding(mesh)
        self._whole = state.shardings(self.model, optimizer, mesh)["meta"]["step"]
        self.use(batch(size))

    def _distilled(self, config: LlamaConfig, vocab_size: int, mesh: Mesh) -> Distilled:
        model = self.teacher = config.build(vocab_size, mesh)
        places = sharding.tree_shardings(mesh, model.axes)
        shapes = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, config.dtype, sharding=place), model.shapes, places
        )
        init = jax.jit(
            lambda key: jax.tree.map(lambda leaf: leaf.astype(config.dtype), model.init(key)), out_shardings=places
        )
        weights = (jax.device_put(np.float32(0.5), sharding.replicated(mesh)),) * 2
        self.teaching = ((init(jax.random.key(1)), *weights),)
        return Distilled(model, shapes, Distillation().build(vocab_size, mesh, CrossEntropy()))

    def use(self, arrays: dict[str, np.ndarray]) -> None:
        """Sets the batch for all following steps."""
        self.batch = {name: jax.device_put(array, self._layout) for name, array in arrays.items()}

    def run(self, steps: int = 1) -> float:
        """Trains `steps` steps, waits, and returns the last loss. Raises ArithmeticError if it is not finite."""
        metrics: dict[str, Any] = {}
        rate, zero = (jax.device_put(value, self._whole) for value in (np.float32(LEARNING_RATE), np.uint32(0)))
        for _ in range(steps):
            self.state, metrics = self.compiled(self.state, self.batch, rate, (zero, zero), *self.teaching)
        jax.block_until_ready(self.state)
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss}")
        return loss

    def memory(self) -> Json:
        """Memory in MB as reported by the compiler: the step's arguments and its temporaries."""
        return memory(self.compiled)


def memory(compiled: Any) -> Json:
    """Returns MB of an executable's arguments and temporaries; null if the compiler does not report them."""
    analysis = compiled.memory_analysis()
    names = {"arguments_mb": "argument_size_in_bytes", "temporaries_mb": "temp_size_in_bytes"}
    # Not the reported peak: on CPU it omits memory freed during the run (measured).
    return {name: None if analysis is None else getattr(analysis, field) / 1e6 for name, field in names.items()}
