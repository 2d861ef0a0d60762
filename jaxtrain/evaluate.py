"""Loss on held-out documents: always the same ones, in the same rows, whenever and wherever it runs."""

import dataclasses
import math
import threading

import jax
import numpy as np

from jaxtrain.data.feed import Feed, local_lanes
from jaxtrain.data.pipeline import DataConfig, HostBatch, Pools, host_batches
from jaxtrain.data.skips import Skips
from jaxtrain.interfaces import Source, Tokenizer, UserError
from jaxtrain.model.attention import compiler_options
from jaxtrain.plan import Plan, Stage, StepPlan, build_plan
from jaxtrain.step import Parts, eval_step


@dataclasses.dataclass(kw_only=True)
class EvalConfig:
    """Evaluation on the documents that `data.holdout` keeps out of training.

    Attributes:
        every_steps: evaluate after each multiple of so many steps, and at the end; None: not by steps.
        every_tokens: evaluate after each step that reaches or passes a multiple of so many trained tokens, and at the
            end: changes of batch size do not bend it; this or every_steps. Neither: never.
        tokens: how many held-out tokens. To find them a stream is read from its start: about tokens / data.holdout.
        seq_len: of the rows; None: that of the last stage.
        batch_size: rows of a batch, a multiple of data.num_lanes; None: that of the last stage.
        weights: share of each source; None: those of the last stage.
    """

    every_steps: int | None = None
    every_tokens: int | None = None
    tokens: int = 262_144
    seq_len: int | None = None
    batch_size: int | None = None
    weights: dict[str, float] | None = None

    def check(self) -> None:
        for name in ("every_steps", "every_tokens", "tokens", "seq_len", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: give 1 or more")
        if self.every_steps is not None and self.every_tokens is not None:
            raise UserError(
                f"every_steps={self.every_steps} and every_tokens={self.every_tokens}: give one of them and set the "
                "other to none"
            )

    @property
    def is_on(self) -> bool:
        return self.every_steps is not None or self.every_tokens is not None

    def due(self, at: StepPlan) -> bool:
        """Whether an evaluation comes after this step: a function of the plan alone, so a resume changes nothing."""
        if self.every_tokens is not None:
            return at.tokens_after // self.every_tokens > at.tokens_before // self.every_tokens
        return self.every_steps is not None and at.step % self.every_steps == 0

    def plan(self, train: Plan, num_lanes: int) -> Plan:
        """The rows of an evaluation, as a plan of their own. Raises UserError."""
        last = train.stages[-1]
        weights = self.weights or {name: float(weight) for name, weight in last.weights.items()}
        stage = Stage(
            name="evaluation",
            seq_len=self.seq_len or last.seq_len,
            batch_size=self.batch_size or last.batch_size,
            weights=weights,
        )
        return build_plan(
            (stage,),
            source_names=train.source_names,
            num_lanes=num_lanes,
            seed=0,
            total_tokens=self.tokens,
            steps=None,
            epochs=None,
            learning_rate=0.0,
            schedule=lambda tokens, total: 0.0,
        )


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
        parts: Parts,
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
        kernel = parts.model.attention_choice(stage.batch_size, stage.seq_len).name
        self._step = jax.jit(eval_step(parts), compiler_options=compiler_options(parts.mesh, kernel))
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
