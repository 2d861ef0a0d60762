"""Loss on held-out documents: the same documents in the same rows at any step and on any hardware."""

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.data.feed import Feed, local_lanes
from jaxtrain.data.pipeline import DataConfig, Pools, StepBatch, host_batches
from jaxtrain.data.skipped_files import SkippedFiles
from jaxtrain.data.source_reader import SourceReader
from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Source, Tokenizer
from jaxtrain.plan import Plan
from jaxtrain.trainer.state import abstract
from jaxtrain.trainer.step import Batch, StepComponents, abstract_batch, eval_step, split_batch


def lower_eval_step(components: StepComponents, batch_size: int, seq_len: int, micro_batches: int) -> Any:
    """Traces the evaluation step for one shape; `.compile()` returns the executable.

    The executable maps (params, batch, token_bytes int32 [V]) to sums over the batch: `nats`, `tokens`, `bytes`.
    """
    mesh, model = components.mesh, components.model
    whole = sharding.replicated(mesh)
    step = eval_step(components)

    def sums(params: Any, batch: Batch, token_bytes_V: jax.Array) -> dict[str, jax.Array]:
        if micro_batches == 1:
            return step(params, batch, token_bytes_V)
        found = jax.lax.map(lambda part: step(params, part, token_bytes_V), split_batch(batch, micro_batches, mesh))
        return {name: values.sum(dtype=values.dtype) for name, values in found.items()}

    options = components.compiler_options(batch_size // micro_batches, seq_len)
    function = jax.jit(sums, out_shardings=whole, compiler_options=options)
    params = abstract(model, components.optimizer, mesh)["params"]
    token_bytes = jax.ShapeDtypeStruct((model.vocab_size,), jnp.int32, sharding=whole)
    return function.lower(params, abstract_batch(mesh, batch_size, seq_len), token_bytes)


class Evaluator:
    """Reads the held-out rows once in the background, keeps them in host memory, and measures the loss on them.

    The rows of a plan cover at most one epoch of the held-out documents. If those have too few tokens, the rest is
    padding.

    Args:
        plans: the evaluation's plans, of one stage and one shape: of the mix under "", of single sources by name.
        data: the run's data config.
        resolved: the sources by name.
        skipped: corrupt files that the run skips.
        scratch: a local folder for temporary files.
        executable: returns the compiled evaluation step for a batch, given its `StepBatch.documents`.
    """

    def __init__(
        self,
        plans: Mapping[str, Plan],
        data: DataConfig,
        resolved: dict[str, Source],
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        threads: Pools,
        seed: int,
        skipped: SkippedFiles,
        scratch: str,
        executable: Callable[[np.ndarray], Any],
    ):
        self._data, self._mesh, self._threads = data, mesh, threads
        self._executable = executable
        self._token_bytes = np.asarray(tokenizer.token_bytes, np.int32)
        self._lanes = local_lanes(mesh, data.num_lanes)
        self._rows = data.row_spec(tokenizer, 1)
        self._build = functools.partial(_readers, data, resolved, seed, skipped, scratch)
        self._batches: dict[str, list[StepBatch]] = {}
        self._error: BaseException | None = None
        self._reading = threading.Thread(target=self._read, args=(plans,), name="jaxtrain-held-out", daemon=True)
        self._reading.start()

    def _read(self, plans: Mapping[str, Plan]) -> None:
        try:
            for name, plan in plans.items():
                # A plan of one source has readers of its own: it reads its rows again, from the start.
                batches = host_batches(
                    self._build(plan), plan, self._rows, self._lanes, self._threads, after=0, states={}, prefetch=1
                )
                self._batches[name] = list(batches)
                batches.close()
        except BaseException as error:
            self._error = error

    def run(self, params: object) -> Json:
        """Measures the loss of the parameters. All processes must call it.

        Returns:
            `eval_loss` (nats per token), `eval_bits_per_byte`, `eval_tokens`; and, with several sources,
            `eval_by_source`: name → `loss`, `bits_per_byte` (None without held-out documents), `tokens`.

        Raises:
            UserError: no document is held out. Errors of the background reader are raised too.
        """
        self._reading.join()
        if self._error is not None:
            raise self._error
        found = {name: self._measure(params, batches) for name, batches in self._batches.items()}
        mix = found.pop("")
        if mix["loss"] is None:
            raise UserError(
                f"no document is held out: data.holdout={self._data.holdout} selects none from the sources. Set it "
                "higher (for example 0.01), use a larger source, or eval.every_steps=none and eval.every_tokens=none."
            )
        values: Json = {f"eval_{name}": value for name, value in mix.items()}
        return values | ({"eval_by_source": found} if found else {})

    def _measure(self, params: object, batches: Sequence[StepBatch]) -> dict[str, float | None]:
        sums = np.zeros(3)
        for batch in Feed(iter(batches), self._mesh, self._lanes, self._data.num_lanes):
            measured = self._executable(batch.documents)(params, batch.arrays, self._token_bytes)
            sums += [float(measured[name]) for name in ("nats", "tokens", "bytes")]
        nats, tokens, byte_count = sums.tolist()
        if not tokens or not byte_count:
            return {"loss": None, "bits_per_byte": None, "tokens": tokens}
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / byte_count, "tokens": tokens}


def _readers(
    data: DataConfig, resolved: dict[str, Source], seed: int, skipped: SkippedFiles, scratch: str, plan: Plan
) -> list[SourceReader]:
    """Readers of the held-out documents of a plan's sources."""
    data = dataclasses.replace(data, sources={name: data.sources[name] for name in plan.source_names})
    return data.build(resolved, seed=seed, held_out=True, skipped=skipped, scratch=scratch)
