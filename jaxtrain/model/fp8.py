"""Matrix products with weights in 8-bit floating point, for `precision="fp8"`.

The factors of each product, forward and backward, are rounded to 8 bits: weights and activations to e4m3, gradients of
outputs to e5m2 (Micikevicius et al. 2022, arXiv:2209.05433). Each array has one scale, computed from the array itself
("current scaling"), so there is no state. Products are written as those of the rounded values times their scales in the
compute dtype. XLA:GPU makes each one cuBLAS call on the 8-bit values (`__cublas$lt$matmul$f8`, compute capability 8.9
or higher); every other compiler computes what is written.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
Rounded = tuple[Array, Array]  # 8-bit values, and their scale

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
# XLA's pass that makes Triton kernels of products comes first, and does not see the 8 bits (jax 0.10.2).
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": "False"}
_SMALLEST = -100  # the exponent of a scale: smaller ones would be subnormal in fp32, which XLA flushes to zero


def rounded(x: Array, dtype: jnp.dtype) -> Rounded:
    """Rounds x to 8 bits: x is about values * scale. Arrays that are not finite give values that are not.

    The scale is a power of two, so it is exact in every dtype, and leaves the largest element within a factor of four
    of the largest value of `dtype`. No element can overflow.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    _, exponent = jnp.frexp(jnp.max(jnp.abs(wide)))
    exponent = jnp.maximum(exponent - (jnp.finfo(dtype).maxexp - 1), _SMALLEST)
    scale = jnp.ldexp(jnp.ones((), wide.dtype), exponent)
    return (wide / scale).astype(dtype), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Array, w_DF: Array, gather: Callable[[Array], Array]) -> Array:
    """x @ w for x [..., D], in x's dtype.

    Args:
        x: Activations.
        w_DF: Weights in x's dtype.
        gather: Constrains w's 8-bit values to the sharding that the product needs, so that FSDP moves 8 bits.
    """
    return _forward(x, w_DF, gather)[0]


def _forward(x, w_DF, gather):
    x8, w8 = rounded(x, FORWARD), rounded(w_DF, FORWARD)
    y = _product(x8, (gather(w8[0]), w8[1]), ((x.ndim - 1,), (0,)), x.dtype)
    return y, (x8, w8)


def _backward(gather, saved, dy):
    (x8, w8), dy8, rows = saved, rounded(dy, BACKWARD), tuple(range(dy.ndim - 1))
    dx = _product(dy8, (gather(w8[0]), w8[1]), ((dy.ndim - 1,), (1,)), dy.dtype)
    return dx, _product(x8, dy8, (rows, rows), dy.dtype)


matmul.defvjp(_forward, _backward)


def _product(a8: Rounded, b8: Rounded, contracted: tuple[tuple[int, ...], tuple[int, ...]], dtype: jnp.dtype) -> Array:
    a, b = (values.astype(dtype) * scale.astype(dtype) for values, scale in (a8, b8))
    return jax.lax.dot_general(a, b, (contracted, ((), ())))
