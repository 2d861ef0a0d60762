"""`bench width`: the best learning rate by width, with and without width transfer, on Python's standard library."""

import dataclasses
import itertools
import statistics
from typing import Any, Literal

import jax
import numpy as np

from jaxtrain.cli import Command, Flag, Flags
from jaxtrain.data import fingerprint
from jaxtrain.interfaces import Json
from jaxtrain.trainer import state
from jaxtrain.trainer.step import lower_train_step
from tools.bench.common import at_least_one, progress, result, short
from tools.coordinate_check import widths

COMMAND = Command(
    name="python -m tools.bench width",
    description="Trains a byte-level decoder of two layers at several widths and learning rates, for one pass over the "
    "same batches, with a warmup and a linear decay to 0. Shows the loss of the last fifth of the steps, and the best "
    "learning rate of each width. About 10 minutes of CPU.",
    examples=(
        "python -m tools.bench width",
        "python -m tools.bench width --width_transfer=none --widths=64,512",
        "python -m tools.bench width --optimizer=Muon --widths=64,128,256",
    ),
    flags=(
        Flag(name="optimizer", default="AdamW", help="class of jaxtrain/optim, by name"),
        Flag(name="width_transfer", type=Literal["mup", "none"], default="mup", help="as model.width_transfer"),
        Flag(name="widths", type=tuple[int, ...], default=(64, 128, 256, 512), help="the first is the base"),
        Flag(
            name="learning_rates",
            type=tuple[float, ...],
            default=(1e-3, 3e-3, 1e-2, 3e-2, 0.1),
            help="peak rates of the base width",
        ),
        Flag(name="steps", type=int, default=120, help="updates"),
        Flag(name="batch_size", type=int, default=8, help="rows"),
        Flag(name="seq_len", type=int, default=64, help="tokens of a row"),
    ),
    config="none",
)


def measure(flags: Flags) -> Json:
    at_least_one(steps=flags.steps, batch_size=flags.batch_size, seq_len=flags.seq_len)
    losses: dict[str, dict[str, float]] = {}
    for width in flags.widths:
        config = widths.model(width, flags.widths[0], flags.width_transfer)
        # About 1 / sqrt(64): with 0.02 so narrow a model learns little in so few steps.
        config = dataclasses.replace(config, initializer_std=0.1)
        one = Training(config, widths.optimizer(flags.optimizer), flags.batch_size, flags.seq_len)
        losses[str(width)] = {f"{rate:g}": short(one.loss(rate, flags.steps)) for rate in flags.learning_rates}
        progress(f"width {width}: " + ", ".join(f"{rate} {loss:.3f}" for rate, loss in losses[str(width)].items()))
    best = {width: float(min(found, key=lambda rate, found=found: found[rate])) for width, found in losses.items()}
    settings = {flag.name: getattr(flags, flag.name) for flag in COMMAND.flags}
    return result("width", {**settings, "losses": losses, "best_learning_rate": best}, device=True)


class Training:
    """A compiled step, for runs at several learning rates."""

    def __init__(self, config: Any, optimizer: Any, batch_size: int, seq_len: int):
        self._shape = (batch_size, seq_len)
        self._components = dataclasses.replace(widths.components(config, optimizer), clip_norm=1.0)
        self._step = lower_train_step(self._components, batch_size, seq_len, 1).compile()

    def loss(self, peak: float, steps: int) -> float:
        """The mean loss of the last fifth of the steps, in nats per byte; 99 if the run diverges."""
        parts = self._components
        now = state.create(parts.model, parts.optimizer, parts.mesh, seed=0)
        losses = []
        for number, batch in enumerate(itertools.islice(widths.batches(*self._shape), steps)):
            at = (number + 0.5) / steps
            rate = np.float32(peak * min(at / 0.1, (1 - at) / 0.9))
            now, metrics = self._step(now, batch, rate, fingerprint.split(0))
            losses.append(metrics["loss"])
        loss = statistics.fmean(map(float, jax.device_get(losses[-max(steps // 5, 1) :])))
        return loss if np.isfinite(loss) else 99.0
