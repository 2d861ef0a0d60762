"""AdamW."""

import dataclasses

import optax

from jaxtrain.optim import base


@dataclasses.dataclass(kw_only=True)
class AdamW(base.DecoupledConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101). Its state is ScaleByAdamState.

    Attributes:
        betas: Decay rates of the two moments; 0.95 for the second as in GPT-3 (arXiv 2005.14165, appendix B) and Llama
            (arXiv 2302.13971, section 2.3), both with a weight decay of 0.1.
        epsilon: Added to the root of the second moment. Other fields: see DecoupledConfig.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8

    def check(self) -> None:
        super().check()
        base.check_decay_rates("betas", self.betas, "(0.9, 0.95)")
        base.check_epsilon(self.epsilon)

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(*self.betas, eps=self.epsilon)
