"""Loss on held-out documents: always the same ones, in the same rows, whenever and wherever it runs."""

import math
import threading

import jax
import numpy as np

from jaxtrain.config import EvalConfig
from jaxtrain.data.feed import Feed, local_lanes
from jaxtrain.data.pipeline import DataConfig, HostBatch, Pools, host_batches
from jaxtrain.data.skips import Skips
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Source, Tokenizer
from jaxtrain.plan import Plan
from jaxtrain.trainer.step import StepComponents, eval_step


class Evaluator:
    """Reads the held-out rows once, in the background, keeps them in the host's memory, and measures the loss on them.

    An epoch of the held-out documents is the most there is: if they are fewer than `tokens`, the rest is padding.
    """

    def __init__(
        self,
        config: EvalConfig,
        data: DataConfig,
        train: Plan,
        resolved: dict[str, Source],
        tokenizer: Tokenizer,
        parts: StepComponents,
        threads: Pools,
        seed: int,
        skips: Skips,
        scratch: str,
    ):
        self._plan = config.plan(train, data.num_lanes)
        self._parts, self._data = parts, data
        self._token_bytes = np.asarray(tokenizer.token_bytes, np.int32)
        self._lanes = local_lanes(parts.mesh, data.num_lanes)
        self._dealers = data.build(resolved, seed=seed, held_out=True, skips=skips, scratch=scratch)
        self._rows, self._threads = data.rows(tokenizer, 1), threads
        self._batches: list[HostBatch] = []
        self._error: BaseException | None = None
        self._reading = threading.Thread(target=self._read, name="jaxtrain-held-out", daemon=True)
        (stage,) = self._plan.stages
        options = parts.model.compiler_options(stage.batch_size, stage.seq_len)
        self._step = jax.jit(eval_step(parts), compiler_options=options)
        self._reading.start()

    def _read(self) -> None:
        try:
            self._batches = list(
                host_batches(
                    self._dealers, self._plan, self._rows, self._lanes, self._threads, after=0, states={}, prefetch=1
                )
            )
        except BaseException as error:
            self._error = error

    def run(self, params: object) -> dict[str, float]:
        """eval_loss (nats a token), eval_bits_per_byte, eval_tokens. Raises what reading raised, or UserError."""
        self._reading.join()
        if self._error is not None:
            raise self._error
        sums = np.zeros(3)
        feed = Feed(iter(self._batches), self._parts.mesh, self._lanes, self._data.num_lanes, ahead=1)
        for batch in feed:
            measured = self._step(params, batch.arrays, self._token_bytes)
            sums += [float(measured[name]) for name in ("nats", "tokens", "bytes")]
        nats, tokens, byte_count = sums.tolist()
        if not tokens or not byte_count:
            raise UserError(
                f"no document is held out: data.holdout={self._data.holdout} of the sources gives none. Set it higher "
                "(for example 0.01), use a larger source, or eval.every_steps=none and eval.every_tokens=none."
            )
        bits = nats / math.log(2) / byte_count
        return {"eval_loss": nats / tokens, "eval_bits_per_byte": bits, "eval_tokens": tokens}
