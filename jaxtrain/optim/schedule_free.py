"""AdamW whose parameters are an average of its iterates, instead of a decaying learning rate."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.interfaces import Axes, Mesh, Params, ScheduleConfig
from jaxtrain.optim import base
from jaxtrain.optim.adamw import AdamW
from jaxtrain.plan.schedules import Constant


@dataclasses.dataclass(kw_only=True)
class ScheduleFreeAdamW(AdamW):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682, algorithm 1). Two arrays per parameter.

    The parameters are the average x. Evaluation, samples and exports use them as they are, at any step. Gradients are
    taken at y = x + (1 - betas[0]) (z - x), which a step computes; z, in the state, is what Adam moves. (optax's
    `schedule_free` keeps y and z and divides by betas[0] for x: the same numbers with other rounding.)

    Attributes:
        schedule: Only a warmup; a decay is what the average replaces.
        betas: The share of the average in y, and the decay rate of the second moment. Other fields: see AdamW.
    """

    learning_rate: float = 1e-3
    schedule: ScheduleConfig = dataclasses.field(default_factory=lambda: Constant(warmup_fraction=0.05))
    betas: tuple[float, float] = (0.9, 0.99)

    def build_scaled(self, axes: Axes, mesh: Mesh | None, width_ratio: float) -> "ScheduleFree":
        decays, scales = base.decay_mask(axes, self.decay_embeddings), base.rate_scales(axes, 1 / width_ratio)
        return ScheduleFree(self, decays, scales)


class ScheduleFreeState(NamedTuple):
    """The state: Adam's iterates and second moments, and what weighs the average.

    Attributes:
        z: Adam's iterates, as the parameters.
        rms: optax's state of the second moments.
        weight: The sum of all steps' weights, fp32 scalar.
        max_rate: The largest learning rate so far, whose square is a step's weight, fp32 scalar.
    """

    z: Any
    rms: Any
    weight: jax.Array
    max_rate: jax.Array


class ScheduleFree:
    """Implements interfaces.AveragingOptimizer."""

    def __init__(self, config: ScheduleFreeAdamW, decays: Any, scales: Any):
        self._config, self._decays, self._scales = config, decays, scales
        # Adam without its first moment, for which the average stands.
        self._rms = optax.scale_by_rms(config.betas[1], config.epsilon, eps_in_sqrt=False, bias_correction=True)

    def init(self, params: Params) -> ScheduleFreeState:
        # Copies: parameters and state are donated separately.
        z = jax.tree.map(jnp.copy, params)
        return ScheduleFreeState(z, self._rms.init(params), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def gradient_at(self, params: Params, state: ScheduleFreeState) -> Params:
        return jax.tree.map(lambda x, z: (x + (1 - self._config.betas[0]) * (z - x)).astype(x.dtype), params, state.z)

    def update(
        self, grads: Params, state: ScheduleFreeState, params: Params, learning_rate: jax.Array
    ) -> tuple[Params, ScheduleFreeState]:
        updates, rms = self._rms.update(grads, state.rms)
        y = self.gradient_at(params, state)
        decay = self._config.weight_decay
        z = base.apply(state.z, updates, learning_rate, decay, self._decays, self._scales, decayed=y)
        max_rate = jnp.maximum(state.max_rate, learning_rate)
        weight = state.weight + max_rate**2
        share = jnp.where(weight > 0, max_rate**2 / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny), 0)
        x = jax.tree.map(lambda x, z: (x + share * (z - x)).astype(x.dtype), params, z)
        return x, ScheduleFreeState(z, rms, weight, max_rate)
