"""Patterns of layers: their text, the order in which layers run, and programs that do not grow with depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.errors import UserError
from jaxtrain.model import pattern
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.model.pattern import Kind

LOCAL, GLOBAL, NOPE, EXPERTS = Kind(local=True), Kind(), Kind(rotary=False), Kind(experts=True)
CONFIG = LlamaConfig(hidden_size=16, intermediate_size=16, num_layers=12, num_heads=2, num_kv_heads=1, remat="full")


@pytest.mark.parametrize(
    ("text", "kinds", "short"),
    [
        ("5 local : 1 global", [LOCAL] * 5 + [GLOBAL], "5 local : 1 global"),
        ("local:global", [LOCAL, GLOBAL], "1 local : 1 global"),
        ("3 global : 1 global nope", [GLOBAL] * 3 + [NOPE], "3 global : 1 global nope"),
        ("2 global : 2 global", [GLOBAL], "1 global"),
        ("global : 3 global  experts", [GLOBAL] + [EXPERTS] * 3, "1 global : 3 global experts"),
        ("local nope experts", [Kind(True, False, True)], "1 local nope experts"),
        ("local : global : local : global", [LOCAL, GLOBAL], "1 local : 1 global"),
    ],
)
def test_a_pattern_is_its_text(text, kinds, short):
    assert pattern.parse(text) == tuple(kinds)
    assert pattern.text_of(kinds) == short
    assert pattern.parse(short) == tuple(kinds)


@pytest.mark.parametrize("text", ["", "0 local", "local global", "5 local :", "nope", "-1 local", "70000 local"])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(UserError, match="is not a number of layers and their kind"):
        pattern.parse(text)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "1 global"),
        ({"sliding_window": 8}, "1 local"),
        ({"no_rope_every": 4}, "3 global : 1 global nope"),
        ({"no_rope_every": 1, "sliding_window": 8}, "1 local nope"),
        ({"no_rope_every": 10**9}, "1 global"),
    ],
)
def test_older_fields_are_patterns(settings, text):
    assert pattern.text_of(dataclasses.replace(CONFIG, **settings).pattern) == text


@pytest.mark.parametrize("num_layers", [2, 3, 6, 8])
@pytest.mark.parametrize("scan", [True, False])
def test_layers_run_in_order_with_their_own_parameters(num_layers, scan):
    kinds = (LOCAL, LOCAL, GLOBAL)
    layers = {
        LOCAL: lambda x, w, extra: (2 * x + w, None if extra is None else extra + x),
        GLOBAL: lambda x, w, extra: (w - x, None if extra is None else extra - x),
    }
    weights = jnp.arange(1.0, num_layers + 1)

    def run(weights, extras=None):
        return pattern.run(layers, kinds, num_layers, jnp.float32(1), {"layers": weights}, extras, scan)

    def plain(weights):
        x = jnp.float32(1)
        for i in range(num_layers):
            x = layers[kinds[i % 3]](x, weights[i], None)[0]
        return x

    x, extras = run(weights)
    assert (x, jax.tree.leaves(extras)) == (plain(weights), [])
    np.testing.assert_array_equal(jax.grad(lambda w: run(w)[0])(weights), jax.grad(plain)(weights))
    repeats = num_layers // 3 if scan else 0
    zeros = ((jnp.zeros(repeats),) * 3, (jnp.zeros(()),) * (num_layers - 3 * repeats))
    _, (scanned, last) = run(weights, zeros)
    assert [len(last), *map(len, scanned)] == [num_layers - 3 * repeats] + [repeats] * (3 if repeats else 0)


def test_a_program_does_not_grow_with_depth():
    def operations(num_layers: int) -> int:
        config = dataclasses.replace(CONFIG, num_layers=num_layers, layers="3 local : 1 global", sliding_window=4)
        model = config.build(50, None)
        batch = [jnp.zeros((1, 8), jnp.int32)] * 3
        return str(jax.make_jaxpr(jax.grad(lambda p: model.hidden(p, *batch).x.sum()))(model.shapes)).count(" = ")

    assert operations(8) == operations(80)


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 4}, {"no_rope_every": 1}])
def test_equal_layers_are_scanned_as_they_are_stored(settings):
    """A view of a stack is a copy of it in every pass on CPUs: 64 MB of temporary memory instead of 12."""
    model = dataclasses.replace(CONFIG, **settings).build(50, None)
    batch = [jnp.zeros((1, 8), jnp.int32)] * 3
    leaves, structure = jax.tree.flatten(model.shapes)
    jaxpr = jax.make_jaxpr(lambda *p: model.hidden(jax.tree.unflatten(structure, p), *batch).x)(*leaves).jaxpr
    stacked = [var for var, leaf in zip(jaxpr.invars, leaves, strict=True) if leaf.shape[0] == CONFIG.num_layers]
    assert len(stacked) == 9
    users = [eqn.primitive.name for eqn in jaxpr.eqns for var in eqn.invars if any(var is one for one in stacked)]
    assert users == ["scan"] * 9
