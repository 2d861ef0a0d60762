"""An optimizer in one file: Lion (Chen et al. 2023, arXiv:2302.06675) from optax.

`--config.optimizer=Lion` is built in; this file shows how one is added.

python -m jaxtrain.main --config=examples/lion.py
"""

import dataclasses

import jax
import optax

from configs import quickstart
from jaxtrain.config import Config
from jaxtrain.interfaces import Params
from jaxtrain.optim.base import OptaxConfig


@dataclasses.dataclass(kw_only=True)
class Lion(OptaxConfig):
    """Lion. Its rates are 3 to 10 times lower than AdamW's, and its weight decay is higher by the same factor.

    Attributes:
        betas: Decay rates of the interpolation and of the momentum.
        weight_decay: Of each step, as a multiple of the learning rate.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1.0

    def transformation(self, learning_rate: jax.Array, decays: Params) -> optax.GradientTransformation:
        return optax.lion(learning_rate, *self.betas, weight_decay=self.weight_decay, mask=decays)


def get_config(arg: str = "") -> Config:
    config = quickstart.get_config()
    return dataclasses.replace(config, optimizer=Lion(learning_rate=3e-4, schedule=config.optimizer.schedule))
