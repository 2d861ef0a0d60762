"""The tests that every optimizer must pass. A new one gets all of them with a class in its test file:

class TestMine(Battery):
    config = Mine()
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.distributed.sharding import MeshConfig, is_axes, tree_shardings
from jaxtrain.errors import UserError
from jaxtrain.interfaces import AveragingOptimizer, Optimizer
from jaxtrain.optim.base import state_axes

# One parameter of each kind that the models have; 3 layers, so that no mesh of 8 divides them.
SIZES = {"layers": 3, "vocab": 32, "embed": 16, "heads": 4, "head_dim": 8, "mlp": 24, "norm": 16}
SIZES |= {"experts": 2, "router": 2}
AXES = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "norm": {"scale": ("norm",)},
    "layers": {
        "norm": {"scale": ("layers", "norm")},
        "query": {"kernel": ("layers", "embed", "heads", "head_dim"), "bias": ("layers", "heads", "head_dim")},
        "out": {"kernel": ("layers", "heads", "head_dim", "embed")},
        "up": ("layers", "embed", "mlp"),
        "down": ("layers", "mlp", "embed"),
        "experts": {
            "up": ("layers", "experts", "embed", "mlp"),
            "down": ("layers", "experts", "mlp", "embed"),
            "router": ("layers", "embed", "router"),
        },
    },
}


def sample(seed: int, scale: float = 1.0, dtype: Any = jnp.float32) -> Any:
    """A tree of AXES with normal entries."""
    rng = np.random.default_rng(seed)
    draw = lambda axes: jnp.asarray(scale * rng.normal(size=[SIZES[axis] for axis in axes]), dtype)  # noqa: E731 (one use)
    return jax.tree.map(draw, AXES, is_leaf=is_axes)


def run(optimizer: Optimizer, params: Any, gradients: list[Any], rate: float = 0.01) -> tuple[Any, Any]:
    state = jax.jit(optimizer.init)(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        params, state = update(gradient, state, params, jnp.float32(rate))
    return params, state


def assert_trees_close(actual: Any, expected: Any, rtol: float, atol: float = 0) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def all_finite(tree: Any) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


class Battery:
    config: Any
    unused_size = 0  # of placeholders in the state
    sharded_rtol = 1e-5  # of a step, sharded against unsharded
    wrong_fields = ({"learning_rate": 0.0}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}, {"epsilon": 0.0})

    @pytest.fixture
    def optimizer(self) -> Optimizer:
        return self.config.build(AXES, None)

    def test_state_is_a_plain_tree_of_arrays(self, optimizer):
        def walk(node):
            if isinstance(node, dict):
                assert all(isinstance(key, str) for key in node)
                children = node.values()
            elif isinstance(node, tuple):
                children = node
            else:
                assert isinstance(node, jax.Array)
                children = ()
            for child in children:
                walk(child)

        walk(optimizer.init(sample(0)))

    def test_state_axes_fit_the_state(self, optimizer):
        def check(axes, leaf):
            # Only what has one element has an axis without a name: nothing of a parameter's size is replicated.
            assert leaf.shape == tuple(1 if axis is None else SIZES[axis] for axis in axes)

        jax.tree.map(check, state_axes(optimizer, AXES, sample(0)), optimizer.init(sample(0)), is_leaf=is_axes)

    def test_memory_is_given_back(self, optimizer):
        params, gradient = sample(0), sample(1)
        state = jax.jit(optimizer.init)(params)
        update = jax.jit(optimizer.update, donate_argnums=(1, 2))
        new_params, new_state = update(gradient, state, params, jnp.float32(0.01))  # an unusable donation warns
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state, params)) if leaf.size > self.unused_size)
        assert jax.tree.structure(new_params) == jax.tree.structure(gradient)
        assert jax.tree.structure(new_state) == jax.tree.structure(optimizer.init(gradient))

    def test_learning_rate_is_traced(self, optimizer):
        traces = []

        @jax.jit
        def update(*arguments):
            traces.append(arguments)
            return optimizer.update(*arguments)

        params, gradient = sample(0), sample(1)
        state = jax.jit(optimizer.init)(params)
        still, _ = update(gradient, state, params, jnp.float32(0))
        moved, _ = update(gradient, state, params, jnp.float32(0.01))
        assert len(traces) == 1
        assert_trees_close(still, params, rtol=0)
        assert all((np.asarray(a) != b).any() for a, b in zip(*map(jax.tree.leaves, (moved, params)), strict=True))

    def test_zero_gradients_change_nothing_but_by_decay(self):
        optimizer = dataclasses.replace(self.config, weight_decay=0.0).build(AXES, None)
        params, state = run(optimizer, sample(0), 2 * [sample(1, scale=0.0)])
        assert_trees_close(params, sample(0), rtol=0)
        assert all_finite(state)

    @pytest.mark.parametrize("scale", [1e-20, 1e15])
    def test_finite_for_any_scale_of_gradients(self, optimizer, scale):
        assert all_finite(run(optimizer, sample(0), [sample(1, scale), sample(2, scale)]))

    def test_dtypes_are_kept(self, optimizer):
        before = (sample(0, dtype=jnp.bfloat16), optimizer.init(sample(0, dtype=jnp.bfloat16)))
        after = run(optimizer, before[0], [sample(1, dtype=jnp.bfloat16)])
        assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, before)

    @pytest.mark.parametrize(
        "sizes",
        [
            pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
            pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
            {"expert": 2, "fsdp": 2, "tensor": 2},
            pytest.param({"data": 2, "fsdp": 1, "context": 4}, marks=pytest.mark.nightly),
        ],
        ids=str,
    )
    def test_sharded_equals_unsharded(self, optimizer, sizes):
        mesh = MeshConfig(**sizes).build()
        sharded = self.config.build(AXES, mesh)
        param_shardings = tree_shardings(mesh, AXES)
        state_shardings = tree_shardings(mesh, state_axes(sharded, AXES, sample(0)))
        params = jax.device_put(sample(0), param_shardings)
        state = jax.jit(sharded.init, out_shardings=state_shardings)(params)
        update = jax.jit(sharded.update, out_shardings=(param_shardings, state_shardings))
        gradients = [sample(1), sample(2)]
        for gradient in gradients:
            params, state = update(jax.device_put(gradient, param_shardings), state, params, jnp.float32(0.01))
        expected_params, expected_state = run(optimizer, sample(0), gradients)
        step = lambda after: jax.tree.map(lambda a, b: (a - b) / 0.01, jax.device_get(after), sample(0))  # noqa: E731 (two uses)
        assert_trees_close(step(params), step(expected_params), rtol=self.sharded_rtol, atol=2e-4)
        assert_trees_close(state, expected_state, rtol=1e-5, atol=1e-6)

    def test_a_checkpoint_restores_on_another_mesh(self, tmp_path):
        """Bit for bit, and training goes on as it would have."""
        meshes = [MeshConfig(data=2, fsdp=2, tensor=2).build(), MeshConfig(fsdp=8).build()]
        optimizers = [self.config.build(AXES, mesh) for mesh in meshes]
        params, opt = run(optimizers[0], sample(0), [sample(1)])
        layouts = [
            (tree_shardings(mesh, AXES), tree_shardings(mesh, state_axes(optimizer, AXES, sample(0))))
            for mesh, optimizer in zip(meshes, optimizers, strict=True)
        ]
        saved: dict[str, Any] = dict(zip(("params", "opt"), jax.device_put((params, opt), layouts[0]), strict=True))
        checkpointer = CheckpointConfig().build(tmp_path)
        checkpointer.save(1, saved, {})
        checkpointer.wait()
        wanted = jax.tree.map(
            lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
            saved,
            dict(zip(("params", "opt"), layouts[1], strict=True)),
        )
        restored = checkpointer.restore(1, wanted)
        checkpointer.close()
        assert jax.tree.structure(restored) == jax.tree.structure(saved)
        assert_trees_close(restored, saved, rtol=0)
        update = jax.jit(self.config.build(AXES, None).update)
        first, then = (
            update(sample(2), jax.device_get(one["opt"]), jax.device_get(one["params"]), jnp.float32(0.01))
            for one in (saved, restored)
        )
        assert_trees_close(then, first, rtol=0)

    def test_goes_downhill(self, optimizer):
        target = sample(1)

        def distance(params):
            return sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (params, target)), strict=True))

        params, gradient, before = sample(0), jax.jit(jax.grad(distance)), distance(sample(0))
        state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
        for _ in range(20):
            averages = isinstance(optimizer, AveragingOptimizer)
            point = optimizer.gradient_at(params, state) if averages else params
            params, state = update(gradient(point), state, params, jnp.float32(0.1))
        assert distance(params) < 0.5 * before

    def test_refuses_wrong_fields(self):
        self.config.check()
        for wrong in self.wrong_fields:
            with pytest.raises(UserError, match=next(iter(wrong))):
                dataclasses.replace(self.config, **wrong).check()
