"""The compiled train step, read from its HLO: the collectives that a mesh needs, and no gather of all parameters."""

import dataclasses
import math
import re

import pytest

from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.optim.adamw import AdamW
from jaxtrain.trainer.step import StepComponents, lower_train_step
from tests.trainer.test_step import MODEL, VOCAB, make_mesh

LAYERS, BATCH, SEQ = 14, 8, 16
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def program(*shape: int) -> tuple[str, StepComponents]:
    mesh = make_mesh(*shape)
    # Fourteen layers, so that a parameter of all of them is larger than the head.
    model = dataclasses.replace(MODEL, num_layers=LAYERS).build(VOCAB, mesh)
    optimizer = AdamW(learning_rate=1e-2).build(model.axes, mesh)
    components = StepComponents(model, CrossEntropy().build(VOCAB, mesh), optimizer, mesh, 1.0)
    return lower_train_step(components, BATCH, SEQ, 1).compile().as_text(), components


def collectives(text: str) -> dict[str, list[int]]:
    """Kind → elements of every array that such an operation produces."""
    found: dict[str, list[int]] = {kind: [] for kind in COLLECTIVES}
    for line in text.splitlines():
        operation = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if operation:
            shapes = re.findall(r"\w+\[([\d,]*)\]", operation[1])
            found[operation[2]] += [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "wanted", "unwanted"),
    [
        ((8, 1, 1, 1), ("all-reduce",), ("all-gather", "all-to-all")),
        ((1, 8, 1, 1), ("all-gather", "all-reduce"), ()),
        pytest.param((2, 2, 2, 1), ("all-gather", "all-reduce"), (), marks=pytest.mark.nightly),
        pytest.param((1, 4, 2, 1), ("all-gather", "all-reduce"), (), marks=pytest.mark.nightly),
        pytest.param((1, 1, 8, 1), ("all-reduce",), (), marks=pytest.mark.nightly),
        ((2, 2, 1, 2), ("all-gather", "all-reduce", "all-to-all"), ()),
        pytest.param((1, 1, 1, 8), ("all-reduce", "all-to-all"), (), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_collectives_of_a_mesh(shape: tuple[int, ...], wanted: tuple[str, ...], unwanted: tuple[str, ...]) -> None:
    text, components = program(*shape)
    found = collectives(text)
    kinds = {kind for kind, sizes in found.items() if sizes}
    summary = {kind: (len(sizes), max(sizes)) for kind, sizes in found.items() if sizes}
    assert set(wanted) <= kinds, summary
    assert not set(unwanted) & kinds, summary
    config = components.model.config
    layer = config.hidden_size * config.intermediate_size
    head = math.prod(components.model.shapes["head"].shape)
    assert LAYERS * config.hidden_size**2 > head > layer
    assert max(found["all-gather"], default=0) <= head, summary


def test_the_reader_of_programs() -> None:
    text = """
  %a = f32[8,32]{1,0} all-gather(f32[1,32]{1,0} %x), channel_id=1
  %b = (f32[4]{0}, f32[2,3]{1,0}) all-reduce(f32[4]{0} %y, f32[2,3]{1,0} %z), to_apply=%sum
  %c = f32[] add(f32[] %all-gather, f32[] %y)
"""
    found = collectives(text)
    assert (found["all-gather"], found["all-reduce"], found["all-to-all"]) == ([256], [4, 6], [])
