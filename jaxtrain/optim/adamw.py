"""AdamW."""

import dataclasses
from typing import Any

import jax
import optax

from jaxtrain.errors import UserError
from jaxtrain.interfaces import Axes, Mesh, Optimizer, Params, ScheduleConfig
from jaxtrain.optim import base
from jaxtrain.plan.schedules import Cosine


@dataclasses.dataclass(kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101; the form of PyTorch and optax).

    The learning rate multiplies the decay. Norms and biases never decay.

    Attributes:
        learning_rate: The peak rate, which `schedule` scales.
        schedule: A dataclass of plan/schedules.py.
        betas: Decay rates of the two moments; 0.95 for the second as in GPT-3 (arXiv 2005.14165, appendix B) and Llama
            (arXiv 2302.13971, section 2.3).
        epsilon: Added to the root of the second moment.
        weight_decay: Of each step, as a multiple of the learning rate; 0.1 in both.
        decay_embeddings: Whether the embedding decays. Off as in OLMo 2 (arXiv 2501.00656): a decayed embedding makes
            hidden states small, and so the gradients of the first layers large. A separate output head always decays.
    """

    learning_rate: float = 3e-4
    schedule: ScheduleConfig = dataclasses.field(default_factory=Cosine)
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = False

    def check(self) -> None:
        base.check_rate(self.learning_rate)
        if self.weight_decay < 0:
            raise UserError(f"weight_decay={self.weight_decay}: give 0 or more; 0.1 is usual.")
        if self.epsilon <= 0:
            raise UserError(f"epsilon={self.epsilon}: give a value above 0, or unused parameters divide by zero.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas={self.betas}: give two numbers from 0 to below 1, for example (0.9, 0.95).")

    def build(self, axes: Axes, mesh: Mesh | None = None) -> Optimizer:
        """The optimizer, whose state is optax's ScaleByAdamState (count, mu, nu)."""
        adam = optax.scale_by_adam(*self.betas, eps=self.epsilon)
        decays = base.decay_mask(axes, self.decay_embeddings)

        def update(grads: Params, state: Any, params: Params, learning_rate: jax.Array) -> tuple[Params, Any]:
            updates, state = adam.update(grads, state)
            return base.apply(params, updates, learning_rate, self.weight_decay, decays), state

        return base.Functions(adam.init, update)
