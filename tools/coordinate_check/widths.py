"""A small decoder at several widths, trained on the bytes of Python's standard library."""

import dataclasses
import math
import pathlib
import sysconfig
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import optim
from jaxtrain.cli import kinds
from jaxtrain.data import fingerprint
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Params
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.optim import base
from jaxtrain.trainer import state
from jaxtrain.trainer.step import StepComponents, lower_train_step

VOCAB, HEADS, LAYERS = 256, 4, 2
_RATES = {"Lion": 3e-4, "Signum": 3e-4}

Moves = list[dict[str, float]]  # of each step, by activation


def model(width: int, base_width: int, width_transfer: str) -> LlamaConfig:
    """The decoder at a width. All its heads and the MLP grow with it."""
    transfer: Any = {}
    if width_transfer == "mup":
        transfer = {"width_transfer": "mup", "base_width": base_width, "base_head_dim": base_width // HEADS}
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        dtype="float32",
        remat="none",
        **transfer,
    )


def optimizer(name: str, learning_rate: float | None = None) -> Any:
    """The config of a built-in optimizer, with its default settings.

    Raises:
        UserError: There is none of this name.
    """
    place = f"{optim.__name__}."
    known = {kinds.class_of(kind).__name__: kinds.class_of(kind) for kind, p in kinds.BUILT_IN.items() if place in p}
    cls = kinds.chosen(name, known)
    if cls is None:
        raise UserError(f"--optimizer={name}: choose {' or '.join(known)}")
    config: Any = cls(learning_rate=learning_rate or _RATES.get(cls.__name__, 3e-3))
    config.check()
    return config


def batches(batch_size: int, seq_len: int) -> Iterator[dict[str, np.ndarray]]:
    """Rows of consecutive bytes of the standard library's modules, in order of their names, without end."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    data = np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8).astype(np.int32)
    # Rows of a batch lie far apart: files differ, and so would steps.
    rows = data[: (len(data) - 1) // (batch_size * seq_len) * batch_size * seq_len + 1]
    tokens, targets = (x.reshape(batch_size, -1) for x in (rows[:-1], rows[1:]))
    shape = (batch_size, seq_len)
    while True:
        for begin in range(0, tokens.shape[1], seq_len):
            part = np.s_[:, begin : begin + seq_len]
            yield {
                "tokens": np.ascontiguousarray(tokens[part]),
                "targets": np.ascontiguousarray(targets[part]),
                "segment_ids": np.ones(shape, np.int32),
                "positions": np.broadcast_to(np.arange(seq_len, dtype=np.int32), shape).copy(),
                "loss_mask": np.ones(shape, bool),
            }


def components(config: LlamaConfig, optimizer: Any) -> StepComponents:
    """A step on one device."""
    mesh = MeshConfig().build(jax.devices()[:1])
    built = config.build(VOCAB, mesh)
    return StepComponents(built, CrossEntropy().build(VOCAB, mesh), base.built(optimizer, built, mesh), mesh, None)


def moves(config: LlamaConfig, optimizer: Any, steps: int, batch_size: int = 4, seq_len: int = 64) -> Moves:
    """How far each step has moved the activations from the beginning, as a root mean square over all coordinates.

    The head begins at zero (Tensor Programs V, section D.2): what a random one makes of moving hidden states shrinks
    with the root of the width. So the layers begin to move at the second step.
    """
    parts, batch = components(config, optimizer), jax.device_put(next(batches(batch_size, seq_len)))
    step = lower_train_step(parts, batch_size, seq_len, 1).compile()
    depths = [dataclasses.replace(config, num_layers=depth).build(VOCAB, parts.mesh) for depth in range(1, LAYERS + 1)]

    @jax.jit
    def activations(params: Params) -> dict[str, jax.Array]:
        found = {}
        for depth, cut in enumerate(depths, start=1):
            some = {**params, "layers": jax.tree.map(lambda leaf, depth=depth: leaf[:depth], params["layers"])}
            x = cut.hidden(some, batch["tokens"], batch["segment_ids"], batch["positions"]).x
            found[f"layer {depth}"] = x * config.width_ratio  # as the last norm leaves it
            found["logits"] = x @ cut.head(some)
        return found

    now = state.create(parts.model, parts.optimizer, parts.mesh, seed=0)
    now["params"]["head"] = jnp.zeros_like(now["params"]["head"])
    first, found = activations(now["params"]), []
    for _ in range(steps):
        now, _ = step(now, batch, np.float32(optimizer.learning_rate), fingerprint.split(0))
        after = activations(now["params"])
        found.append({name: float(jnp.sqrt(jnp.mean((after[name] - x) ** 2))) for name, x in first.items()})
    return found


def worst(moves: Mapping[int, Moves]) -> dict[str, float]:
    """Of each activation, the largest ratio between two widths at any step."""
    by_step = list(zip(*moves.values(), strict=True))

    def ratio(values: list[float]) -> float:
        return max(values) / min(values) if min(values) else math.inf if max(values) else 1.0

    return {name: max(ratio([found[name] for found in at]) for at in by_step) for name in by_step[0][0]}


def table(moves: Mapping[int, Moves], worst: Mapping[str, float]) -> list[str]:
    """Lines with the moves after the second and the last step."""
    steps = len(next(iter(moves.values())))
    lines = [f"{'moved':<10}{'step':>5}" + "".join(f"{width:>10,}" for width in moves) + f"{'ratio':>10}"]
    for name, ratio in worst.items():
        for step in sorted({min(2, steps), steps}):
            values = "".join(f"{found[step - 1][name]:>10.4f}" for found in moves.values())
            lines.append(f"{name:<10}{step:>5}{values}" + (f"{ratio:>10.2f}" if step == steps else ""))
    return lines
