"""A model's layers as a pattern of kinds, repeated over its depth: "5 local : 1 global".

A layer's kind says what sets it apart from the others: its attention, whether it has rotary positions, and whether its
MLP is a mixture of experts. Layers whose kinds have the same parameters are stacked, [L, ...], in the order of the
model. The forward pass scans over the repeats of the pattern, with one period written out in the loop's body, so
compile time does not grow with depth.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.errors import UserError

_PART = re.compile(r"(?:(\d+) +)?(local|global)((?: +nope)?)((?: +experts)?)")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Attributes:
        local: Whether attention sees `sliding_window` tokens; otherwise all earlier ones.
        rotary: Whether queries and keys have rotary positions.
        experts: Whether its MLP is a mixture of experts.
    """

    local: bool = False
    rotary: bool = True
    experts: bool = False

    @property
    def stack(self) -> str:
        """The name, in the model's parameters, of the stack of all layers with the same parameters."""
        return "expert_layers" if self.experts else "layers"

    def __str__(self) -> str:
        return ("local" if self.local else "global") + " nope" * (not self.rotary) + " experts" * self.experts


def parse(text: str) -> tuple[Kind, ...]:
    """Reads a pattern: parts such as "5 local" with ":" between them.

    A part is a number of layers (1 if there is none), "local" or "global", "nope" if they have no rotary positions, and
    "experts" if their MLPs are mixtures of experts.

    Raises:
        UserError: The text is not a pattern.
    """
    kinds: list[Kind] = []
    for part in text.split(":"):
        found = _PART.fullmatch(part.strip())
        if found is None or (found[1] and not 1 <= int(found[1]) <= 1 << 16):
            raise UserError(
                f"layers='{text}': '{part.strip()}' is not a number of layers and their kind. A pattern is written as "
                "'5 local : 1 global', layers without rotary positions as '1 global nope', those with experts as "
                "'1 global experts'."
            )
        kinds += [Kind(found[2] == "local", not found[3], bool(found[4]))] * int(found[1] or 1)
    return shortest(kinds)


def shortest(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """The shortest pattern whose repeats begin with `kinds`."""
    return next(
        tuple(kinds[:period])
        for period in range(1, len(kinds) + 1)
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds))
    )


def text_of(pattern: Sequence[Kind]) -> str:
    """The inverse of `parse`."""
    parts: list[tuple[int, Kind]] = []
    for kind in pattern:
        count = parts.pop()[0] if parts and parts[-1][1] == kind else 0
        parts.append((count + 1, kind))
    return " : ".join(f"{count} {kind}" for count, kind in parts)


def stacks(pattern: Sequence[Kind], num_layers: int) -> dict[str, list[int]]:
    """The layers in each stack, by their numbers in the model."""
    found: dict[str, list[int]] = {}
    for layer in range(num_layers):
        found.setdefault(pattern[layer % len(pattern)].stack, []).append(layer)
    return found


# The extra inputs or outputs of layers: for each layer of a period a tree stacked over the repeats, and a tree for each
# of the layers after them.
Extras = tuple[tuple[Any, ...], tuple[Any, ...]]


def run(
    layers: Mapping[Kind, Callable[[Any, Any, Any], tuple[Any, Any]]],
    pattern: Sequence[Kind],
    num_layers: int,
    x: Any,
    params: Mapping[str, Any],
    extras: Extras | None,
    scan: bool,
) -> tuple[Any, Extras]:
    """Runs all layers: those of whole periods in a scan over the repeats, the rest after it.

    Args:
        layers: Of each kind, (x, a layer's parameters, its extra input) -> (x, its extra output).
        pattern: The kinds of a period.
        num_layers: All layers.
        x: What the first layer gets.
        params: The stacks, by name.
        extras: Extra inputs; None gives each layer None.
        scan: False writes out all layers.

    Returns:
        What the last layer returns, and the extra outputs.
    """
    period = len(pattern)
    repeats = num_layers // period if scan else 0
    rest = [pattern[i % period] for i in range(repeats * period, num_layers)]
    scanned, last = extras or ((None,) * period, (None,) * len(rest))
    per_period = {name: len(found) for name, found in stacks(pattern, period).items()}
    cut = {name: _cut(params[name], repeats * per_period.get(name, 0)) for name in params}

    def some(x: Any, kinds: Sequence[Kind], left: Mapping[str, list[Any]], extras: Sequence[Any]) -> tuple[Any, tuple]:
        outputs = []
        for kind, extra in zip(kinds, extras, strict=True):
            x, output = layers[kind](x, left[kind.stack].pop(0), extra)
            outputs.append(output)
        return x, tuple(outputs)

    outputs: tuple[Any, ...] = ()
    if repeats:

        def one_period(x: Any, inputs: tuple[dict[str, Any], Sequence[Any]]) -> tuple[Any, tuple]:
            left = {name: [stack] if per_period[name] == 1 else _unstacked(stack) for name, stack in inputs[0].items()}
            return some(x, pattern, left, inputs[1])

        # A stack with one layer in a period stays as it is: XLA on CPUs copies any view of it in every pass.
        periods = {
            name: head if count == 1 else jax.tree.map(lambda x, n=count: x.reshape(repeats, n, *x.shape[1:]), head)
            for name, count in per_period.items()
            for head, _ in [cut[name]]
        }
        x, outputs = jax.lax.scan(one_period, x, (periods, scanned))
    x, after = some(x, rest, {name: _unstacked(tail) for name, (_, tail) in cut.items()}, last)
    return x, (outputs, after)


def in_order(outputs: Extras) -> jax.Array:
    """The extra outputs of all layers, if each is one array of the same shape, [L, ...]."""
    scanned, after = outputs
    periods = [jnp.stack(scanned, axis=1).reshape(-1, *scanned[0].shape[1:])] if scanned else []
    return jnp.concatenate([*periods, *(output[None] for output in after)])


def _cut(stack: Any, at: int) -> tuple[Any, Any]:
    """The first `at` layers of a stack, and the others. A copy of the parameters unless one of the two is empty."""
    size = jax.tree.leaves(stack)[0].shape[0]
    if at in (0, size):
        return (stack, None) if at else (None, stack)
    # The gradient of `split` is one concatenation, that of slices a sum of padded arrays.
    parts = jax.tree.map(lambda leaf: jax.lax.split(leaf, (at, size - at)), stack)
    return tuple(jax.tree.transpose(jax.tree.structure(stack), jax.tree.structure((0, 0)), parts))


def _unstacked(stack: Any) -> list[Any]:
    """A stack's layers. `stack` may be None."""
    leaves, tree = jax.tree.flatten(stack)
    return [tree.unflatten(layer) for layer in zip(*map(jnp.unstack, leaves), strict=True)]
