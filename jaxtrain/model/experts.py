"""Mixture of experts (Shazeer et al. 2017, arXiv:1701.06538): each token passes through the k MLPs that it chooses.

No token is ever dropped: experts take as many as choose them. `MixtureOfExperts` is the module of a layer. On each
device it does the following:

1. A router in fp32 gives each token its k experts and their weights.
2. The choices are sorted by expert, and one grouped product (`jax.lax.ragged_dot`) runs all experts.
3. Each token adds up its k results.

If the mesh axis `expert` splits the experts, step 2 sends each choice to its expert's device and gets the result back,
by all-to-all. Shapes are static, so an exchange has room for `SLACK` times an even load, and a device with more repeats
it (`_exchanged`): usually once, and memory does not depend on how uneven the load is.

Sums have a fixed order: there are only gathers, whose gradients are written as gathers too (`_permuted`), so a step
gives the same bits each time.

Shapes beyond the legend of interfaces.py: E experts (on this device), k experts of a token, M = N * k choices of the
N tokens on a device, P devices along `expert`, C choices for one of them in one exchange.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jaxtrain.distributed.sharding import constrain, spec
from jaxtrain.errors import UserError

if TYPE_CHECKING:
    from jaxtrain.model.llama import LlamaConfig

SAVED = "experts"  # the checkpoint name of the experts' products, as SAVED of attention_xla.py
# Room of an exchange, in even loads. A trained router's loads are within a factor of 2, mostly within 1.5.
SLACK = 1.5

Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate_EDF, up_EDF, down_EFD


@dataclasses.dataclass(kw_only=True)
class Experts:
    """The experts of a layer, each a SwiGLU.

    Attributes:
        num_experts: Experts of a layer.
        experts_per_token: Experts that each token passes through.
        intermediate_size: Width of an expert.
        shared_size: Width of an MLP that all tokens pass through as well; 0 for none. Several shared experts are one of
            their summed width (DeepSeekMoE, Dai et al. 2024, arXiv:2401.06066).
        normalize: Whether a token's weights are divided by their sum (Mixtral, Qwen3) or are the router's probabilities
            (OLMoE).
        balance_loss: Weight of the load-balance loss, E * sum(share of choices * mean probability) over the experts
            (Fedus et al. 2021, arXiv:2101.03961, equation 4), of each layer's tokens in a micro-batch, averaged over
            layers. k when even.
        z_loss: Weight of the mean squared log-normalizer of the router (Zoph et al. 2022,
            arXiv:2202.08906, equation 5).
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_size: int = 0
    normalize: bool = True
    balance_loss: float = 0.01
    z_loss: float = 0.001

    def check(self) -> None:
        for name, least, most in (
            ("num_experts", 1, 1 << 16),
            ("experts_per_token", 1, self.num_experts),
            ("intermediate_size", 1, 1 << 24),
            ("shared_size", 0, 1 << 24),
        ):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"experts.{name}={getattr(self, name)}: it must be from {least} to {most:,}.")
        for name in ("balance_loss", "z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"experts.{name}={getattr(self, name)}: it must be 0 or above.")


class MixtureOfExperts(nnx.Module):
    """The MLP of a layer with experts. Its parameters stay in the compute dtype with `precision="fp8"`."""

    def __init__(self, config: "LlamaConfig", experts: Experts, mesh: Mesh | None, rngs: nnx.Rngs):
        D, E, F = config.hidden_size, experts.num_experts, experts.intermediate_size

        def normal(std: float, sizes: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(rngs.params(), sizes, jnp.float32), axes=axes)

        self.router = normal(config.hidden_std, (D, E), ("embed", "router"))
        self.gate = normal(config.hidden_std, (E, D, F), ("experts", "embed", "mlp"))
        self.up = normal(config.hidden_std, (E, D, F), ("experts", "embed", "mlp"))
        self.down = normal(config.output_std, (E, F, D), ("experts", "mlp", "embed"))
        self.experts = experts
        self.mesh = mesh

    def __call__(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Applies the experts.

        Args:
            x: [B * T, D] or [B, T, D].
            real: Bool, without D. Tokens where it is False are padding: they get 0 and do not count.

        Returns:
            What the experts add to x, and the statistics of `_statistics`.
        """
        wide = jnp.promote_types(x.dtype, jnp.float32)
        router_DE = constrain(self.router[...].astype(wide), self.mesh, (None, None))
        logits = jnp.dot(x.astype(wide), router_DE, precision="highest")
        weights = (self.gate[...], self.up[...], self.down[...])
        device = functools.partial(_device, self.experts, x.dtype)
        if self.mesh is None or self.mesh.size == 1:
            y, ids = device({}, x, logits, real, *weights)
        else:
            ways = {name: size for name, size in self.mesh.shape.items() if size > 1}
            # In decoding a single column is not split by `context`.
            split = x.ndim == 3 and x.shape[1] % self.mesh.shape["context"] == 0
            rows = spec(("batch",) if x.ndim == 2 else ("batch", "sequence" if split else None))
            stacks = (self.gate, self.up, self.down)
            y, ids = jax.shard_map(
                functools.partial(device, ways),
                mesh=self.mesh,
                in_specs=(rows, rows, rows, *(spec(leaf.get_metadata("axes")) for leaf in stacks)),
                out_specs=(rows, rows),
                check_vma=False,  # weights and rows are copied over the axes that their specs leave out
            )(x, logits, real, *weights)
        return y, _statistics(self.experts, logits, ids, real)


def _statistics(experts: Experts, logits: jax.Array, ids: jax.Array, real: jax.Array) -> dict[str, jax.Array]:
    """What the losses and metrics need, of all real tokens: "balance", "z", "entropy" (scalars) and "load" [E].

    "load" is each expert's choices, relative to an even load.
    """
    E, k = experts.num_experts, experts.experts_per_token
    tokens = jnp.maximum(real.sum(dtype=jnp.int32), 1).astype(logits.dtype)

    def mean(values: jax.Array) -> jax.Array:
        kept = jnp.where(real.reshape(*real.shape, *(1,) * (values.ndim - real.ndim)), values, 0)
        return kept.sum(tuple(range(real.ndim))) / tokens

    log_probs = jax.nn.log_softmax(logits)
    probs = jnp.exp(log_probs)
    share_E = mean(jax.nn.one_hot(ids, E, dtype=logits.dtype).sum(-2))
    return {
        "balance": E * jnp.sum(share_E * mean(probs)),
        "z": mean(jnp.square(jax.nn.logsumexp(logits, axis=-1))),
        "entropy": -mean((probs * log_probs).sum(-1)),
        "load": share_E * E / k,
    }


def losses_and_metrics(experts: Experts, statistics: list[Any]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The auxiliary losses, weighted, and the metrics of a model.

    Args:
        experts: The experts of all layers.
        statistics: Of each layer, or of several stacked layers, what `MixtureOfExperts` returned.
    """
    stacked = {
        name: jnp.concatenate([jnp.reshape(one[name], (-1, *tail)) for one in statistics])
        for name, tail in (("balance", ()), ("z", ()), ("entropy", ()), ("load", (experts.num_experts,)))
    }
    losses = {
        "router_balance_loss": experts.balance_loss * stacked["balance"].mean(),
        "router_z_loss": experts.z_loss * stacked["z"].mean(),
    }
    return losses, {
        "expert_load_max": stacked["load"].max(),
        "expert_load_min": stacked["load"].min(),
        "router_entropy": stacked["entropy"].mean(),
        # Of all choices, none: the shares of a layer's experts add up to 1.
        "expert_dropped": jnp.abs(1 - stacked["load"].mean(1)).max(),
    }


# ---- On one device


def _device(
    experts: Experts,
    dtype: jnp.dtype,
    ways: dict[str, int],
    x: jax.Array,
    logits: jax.Array,
    real: jax.Array,
    *weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """A device's tokens through the experts: (what they add to x, the experts of each token [..., k]).

    Args:
        ways: Sizes of the mesh axes larger than 1.
        weights: This device's part of the fp32 parameters.
    """
    k, D = experts.experts_per_token, x.shape[-1]
    logits_NE = logits.reshape(-1, experts.num_experts)
    x_ND, real_N1 = x.reshape(-1, D), real.reshape(-1, 1)
    # Padding chooses no expert: E is none's number.
    ids_Nk = jax.lax.top_k(jax.lax.stop_gradient(logits_NE), k)[1]
    ids_Nk = jnp.where(real_N1, ids_Nk, experts.num_experts)
    chosen_NkE = jax.nn.one_hot(ids_Nk, experts.num_experts, dtype=jnp.bool_)
    weights_Nk = jnp.where(chosen_NkE, jax.nn.softmax(logits_NE)[:, None], 0).sum(-1)
    if experts.normalize:
        weights_Nk /= jnp.where(real_N1, weights_Nk.sum(-1, keepdims=True), 1)
    order_M, inverse_M = _sorted(ids_Nk.reshape(-1))
    whole: Weights = tuple(  # type: ignore[assignment]
        _gathered(leaf, dim, dtype, "fsdp" in ways) for leaf, dim in zip(weights, (1, 1, 2), strict=True)
    )
    x_MD: jax.Array = _permuted(x_ND, order_M, inverse_M, k)  # type: ignore[assignment]
    counts_E = chosen_NkE.sum((0, 1), dtype=jnp.int32)
    if "expert" in ways:
        y_MD: jax.Array = _exchanged(x_MD, counts_E, whole, ways["expert"], k, tuple(ways))  # type: ignore[assignment]
    else:
        y_MD = _apply(x_MD, counts_E, whole)
    y_MD = _permuted(y_MD, inverse_M, order_M, 1)  # type: ignore[assignment]
    y_ND = jnp.sum(weights_Nk[..., None] * y_MD.reshape(-1, k, D).astype(weights_Nk.dtype), axis=1)
    if "tensor" in ways:  # each of its devices has a part of every expert's width
        y_ND = jax.lax.psum(y_ND, "tensor")
    return y_ND.astype(dtype).reshape(x.shape), ids_Nk.reshape(*x.shape[:-1], k)


def _sorted(ids_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order that sorts ids, equal ones as they are, and its inverse."""
    order_M = jnp.argsort(ids_M, stable=True)
    return order_M, jnp.argsort(order_M)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _permuted(x_ND: jax.Array, order_M: jax.Array, inverse_M: jax.Array, copies: int) -> jax.Array:
    """`copies` of each row after one another, [M, D], in another order. The gradient is a gather, not a scatter."""
    return x_ND[order_M // copies]


def _permuted_forward(x_ND, order_M, inverse_M, copies):
    return x_ND[order_M // copies], inverse_M


def _permuted_backward(copies, inverse_M, dy_MD):
    if copies == 1:
        return dy_MD[inverse_M], None, None
    wide = jnp.promote_types(dy_MD.dtype, jnp.float32)
    dx_NkD = dy_MD[inverse_M].reshape(-1, copies, dy_MD.shape[-1])
    return dx_NkD.astype(wide).sum(1).astype(dy_MD.dtype), None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(shard: jax.Array, dim: int, dtype: jnp.dtype, split: bool) -> jax.Array:
    """The parameter in `dtype`, whole along `dim`, which `fsdp` splits. The gradient is reduced in fp32."""
    shard = shard.astype(dtype)
    return jax.lax.all_gather(shard, "fsdp", axis=dim, tiled=True) if split else shard


def _gathered_forward(shard, dim, dtype, split):
    return _gathered(shard, dim, dtype, split), jnp.zeros((), shard.dtype)


def _gathered_backward(dim, dtype, split, like, dw):
    dw = dw.astype(like.dtype)
    return (jax.lax.psum_scatter(dw, "fsdp", scatter_dimension=dim, tiled=True) if split else dw,)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _apply(x_MD: jax.Array, counts_E: jax.Array, weights: Weights) -> jax.Array:
    """Runs each expert on its rows: the first counts_E[0] rows are expert 0's, and so on. Rows after them get 0."""
    gate_EDF, up_EDF, down_EFD = weights
    # What grouped products give rows of no group is not defined.
    is_some_M1 = jnp.arange(x_MD.shape[0])[:, None] < counts_E.sum()
    x_MD = jnp.where(is_some_M1, x_MD, 0)
    gate_MF, up_MF = (checkpoint_name(jax.lax.ragged_dot(x_MD, w, counts_E), SAVED) for w in (gate_EDF, up_EDF))
    y_MD = checkpoint_name(jax.lax.ragged_dot(jax.nn.silu(gate_MF) * up_MF, down_EFD, counts_E), SAVED)
    return jnp.where(is_some_M1, y_MD, 0)


# ---- Between the devices of `expert`


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _exchanged(
    x_MD: jax.Array, counts: jax.Array, weights: Weights, P: int, k: int, names: tuple[str, ...]
) -> jax.Array:
    """`_apply` with the experts of all P devices of `expert`, in as many exchanges as the fullest device needs.

    The backward pass sends the rows again and recomputes their experts, so it keeps nothing of an exchange.

    Args:
        x_MD: Rows sorted by expert.
        counts: This device's rows for each expert of all P devices, [P * E].
        weights: This device's experts.
        names: The mesh axes, whose devices all make the same number of exchanges.
    """
    return _exchanged_forward(x_MD, counts, weights, P, k, names)[0]


def _exchanged_forward(x_MD, counts, weights, P, k, names):
    exchange = _Exchange(x_MD.shape[0], counts, P, k, names)

    def one(turn: jax.Array, y_MD: jax.Array) -> jax.Array:
        return exchange.back(turn, exchange.apply(turn, exchange.there(turn, x_MD), weights), y_MD)

    y_MD = jax.lax.fori_loop(0, exchange.turns, one, jnp.zeros_like(x_MD))
    return y_MD, (x_MD, counts, weights)


def _exchanged_backward(P, k, names, saved, dy_MD):
    x_MD, counts, weights = saved
    exchange = _Exchange(x_MD.shape[0], counts, P, k, names)

    def one(turn: jax.Array, sums: Any) -> Any:
        dx_MD, dweights = sums
        _, pull = jax.vjp(functools.partial(exchange.apply, turn), exchange.there(turn, x_MD), weights)
        dx_RD, more = pull(exchange.there(turn, dy_MD))
        return exchange.back(turn, dx_RD, dx_MD), jax.tree.map(lambda a, b: a + b.astype(a.dtype), dweights, more)

    wide = jnp.promote_types(x_MD.dtype, jnp.float32)
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, wide), weights)
    dx_MD, dweights = jax.lax.fori_loop(0, exchange.turns, one, (jnp.zeros_like(x_MD), zeros))
    return dx_MD, None, jax.tree.map(lambda dw, w: dw.astype(w.dtype), dweights, weights)


_exchanged.defvjp(_exchanged_forward, _exchanged_backward)


class _Exchange:
    """Where this device's choices go, and which ones it gets. R = P * C rows arrive in one turn."""

    def __init__(self, M: int, counts: jax.Array, P: int, k: int, names: tuple[str, ...]):
        counts_PE = counts.reshape(P, -1)
        E = counts_PE.shape[1]
        self.counts_P = counts_PE.sum(1)
        ends_P = jnp.cumsum(self.counts_P)
        self.starts_P = ends_P - self.counts_P
        row_M = jnp.arange(M)
        self.device_M = (row_M[:, None] >= ends_P[None]).sum(1, dtype=jnp.int32)  # P for padding
        self.offset_M = row_M - self.starts_P[jnp.minimum(self.device_M, P - 1)]
        # A token chooses an expert once.
        self.C = min(math.ceil(SLACK * M / P), M // k * min(k, E))
        self.turns = jax.lax.pmax(-(-self.counts_P.max() // self.C), names)
        self.ends_PE = jnp.cumsum(_all_to_all(counts_PE), axis=1)  # of what arrives from each device

    def there(self, turn: jax.Array, rows_MD: jax.Array) -> jax.Array:
        """Sends rows to their experts, [R, D]; 0 where there are fewer than C."""
        offset_1C = turn * self.C + jnp.arange(self.C)[None]
        row_PC = jnp.minimum(self.starts_P[:, None] + offset_1C, rows_MD.shape[0] - 1)
        is_some_PC = offset_1C < self.counts_P[:, None]
        rows_PCD = _all_to_all(jnp.where(is_some_PC[..., None], rows_MD[row_PC], 0))
        return rows_PCD.reshape(-1, rows_MD.shape[-1])

    def apply(self, turn: jax.Array, x_RD: jax.Array, weights: Weights) -> jax.Array:
        """Runs this device's experts on the rows that arrived."""
        offset_1C1 = turn * self.C + jnp.arange(self.C)[None, :, None]
        ids_PC = (offset_1C1 >= self.ends_PE[:, None]).sum(-1, dtype=jnp.int32)
        order_R, inverse_R = _sorted(ids_PC.reshape(-1))
        counts_E = jax.nn.one_hot(ids_PC, self.ends_PE.shape[1], dtype=jnp.int32).sum((0, 1))
        y_RD = _apply(_permuted(x_RD, order_R, inverse_R, 1), counts_E, weights)
        return _permuted(y_RD, inverse_R, order_R, 1)

    def back(self, turn: jax.Array, rows_RD: jax.Array, others_MD: jax.Array) -> jax.Array:
        """Returns rows to where they came from, and puts them among those of other turns."""
        rows_RD = _all_to_all(rows_RD.reshape(-1, self.C, rows_RD.shape[-1])).reshape(rows_RD.shape)
        place_M = self.offset_M - turn * self.C
        is_now_M = (self.device_M < len(self.counts_P)) & (place_M >= 0) & (place_M < self.C)
        index_M = jnp.clip(self.device_M * self.C + place_M, 0, len(rows_RD) - 1)
        return jnp.where(is_now_M[:, None], rows_RD[index_M], others_MD)


def _all_to_all(x_P: jax.Array) -> jax.Array:
    """Element i goes to device i of `expert`; the result's element i comes from it."""
    return jax.lax.all_to_all(x_P, "expert", split_axis=0, concat_axis=0, tiled=True)
