"""A loss as a plain function, chunked and sharded from outside, against the hand-written one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.losses.chunks import from_function
from jaxtrain.losses.cross_entropy import CrossEntropy
from tests.losses.test_cross_entropy import VOCAB, assert_close, evaluate, example, on_mesh


class Plain:
    """Cross-entropy as anyone would write it."""

    def build(self, vocab_size, mesh):
        def loss(x_CD, w_DV, targets_C, mask_C):
            logits_CV = jnp.dot(x_CD, w_DV, preferred_element_type=jnp.float32)[:, :vocab_size]
            nats_C = -jnp.take_along_axis(jax.nn.log_softmax(logits_CV), targets_C[:, None], axis=1)[:, 0]
            total = jnp.where(mask_C, nats_C, 0).sum()
            return {"loss": total, "ce_loss": total}

        return from_function(loss, mesh, chunk_tokens=5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_equals_the_hand_written_loss(dtype):
    arrays = example(dtype=dtype)
    wanted = evaluate(CrossEntropy(chunk_tokens=7), None, arrays)
    assert_close(evaluate(Plain(), None, arrays), wanted, rtol=1e-5 if dtype == jnp.float32 else 2**-7)


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"data": 1, "tensor": 4, "context": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_any_mesh_equals_one_device(sizes):
    mesh, arrays = MeshConfig(**sizes).build(), example()
    assert_close(evaluate(Plain(), mesh, on_mesh(mesh, arrays)), evaluate(Plain(), None, arrays))


def test_it_may_return_the_loss_alone():
    x, w, targets, mask = example()
    loss = from_function(lambda x, w, targets, mask: jnp.where(mask, (x @ w)[:, 0], 0).sum(), None, 5)
    sums = loss(x, w, targets, mask)
    assert set(sums) == {"loss"}
    np.testing.assert_allclose(sums["loss"], ((x @ w)[..., 0] * mask).sum(), rtol=1e-5)
    assert w.shape[1] > VOCAB
