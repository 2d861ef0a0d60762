"""Optimizers whose directions optax computes: Lion, Adan, Adafactor, Signum.

Each is a dataclass and one optax transformation. Learning rate, weight decay and masks are base.DecoupledConfig's; the
state is sharded, saved and restored by paths and shapes (base.state_axes).
"""

import dataclasses

import optax

from jaxtrain.errors import UserError
from jaxtrain.interfaces import Axes, Mesh, Optimizer
from jaxtrain.optim import base


@dataclasses.dataclass(kw_only=True)
class Lion(base.DecoupledConfig):
    """The sign of interpolated momentum (Chen et al. 2023, arXiv 2302.06675, algorithm 2). One array per parameter.

    Its learning rates are 3 to 10 times lower than AdamW's, and its weight decay is higher by the same factor (section
    5).

    Attributes:
        betas: Decay rates of the interpolation and of the momentum. Other fields: see DecoupledConfig.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)

    def check(self) -> None:
        super().check()
        base.check_decay_rates("betas", self.betas, "(0.9, 0.99)")

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_lion(*self.betas)


@dataclasses.dataclass(kw_only=True)
class Signum(base.DecoupledConfig):
    """The sign of the momentum (Bernstein et al. 2018, arXiv 1802.04434, algorithm 2). One array per parameter.

    With weight decay it is Tiger (Su 2023). Rates: as Lion's.

    Attributes:
        momentum: Decay rate of the momentum. Other fields: see DecoupledConfig.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 1.0
    momentum: float = 0.95

    def check(self) -> None:
        super().check()
        base.check_decay_rates("momentum", (self.momentum,), "0.95")

    def direction(self) -> optax.GradientTransformation:
        return optax.chain(optax.ema(self.momentum, debias=False), optax.scale_by_sign())


@dataclasses.dataclass(kw_only=True)
class Adan(base.DecoupledConfig):
    """Adaptive Nesterov momentum (Xie et al. 2022, arXiv 2208.06677, algorithm 1). Four arrays per parameter.

    The decay is decoupled, which is the paper's proximal step to first order in learning_rate * weight_decay.

    Attributes:
        betas: Decay rates of the gradient, its difference, and the second moment.
        epsilon: Added to the root of the second moment. Other fields: see DecoupledConfig.
    """

    weight_decay: float = 0.02
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99)
    epsilon: float = 1e-8

    def check(self) -> None:
        super().check()
        base.check_decay_rates("betas", self.betas, "(0.98, 0.92, 0.99)")
        base.check_epsilon(self.epsilon)

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_adan(*self.betas, eps=self.epsilon)


@dataclasses.dataclass(kw_only=True)
class Adafactor(base.DecoupledConfig):
    """Second moments as row and column sums (Shazeer and Stern 2018, arXiv 1804.04235). Little state per matrix.

    Stacked layers are one array here: the root mean squares in clipping and scale are those of all layers together.

    Attributes:
        decay_rate: The second moment at step t decays by 1 - t^-decay_rate (section 7.2).
        clipping_threshold: Maximum root mean square of a parameter's direction; None for no clipping.
        relative: Whether a direction is multiplied by the root mean square of its parameter, at least 1e-3: the
            learning rate is then relative, 1e-2 as a rule (section 8).
        momentum: Decay rate of a momentum, which takes an array per parameter; None for none.
        min_dim_size_to_factor: Only parameters with two dimensions of this size have factored moments. Other fields:
            see DecoupledConfig.
    """

    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    decay_rate: float = 0.8
    clipping_threshold: float | None = 1.0
    relative: bool = True
    momentum: float | None = None
    min_dim_size_to_factor: int = 128

    def check(self) -> None:
        super().check()
        base.check_decay_rates("decay_rate", (self.decay_rate,), "0.8")
        if self.momentum is not None:
            base.check_decay_rates("momentum", (self.momentum,), "0.9, or none")
        if self.clipping_threshold is not None and self.clipping_threshold <= 0:
            raise UserError(f"clipping_threshold={self.clipping_threshold}: give a value above 0, or none.")
        if self.min_dim_size_to_factor < 2:
            raise UserError(f"min_dim_size_to_factor={self.min_dim_size_to_factor}: give 2 or more.")

    def build_scaled(self, axes: Axes, mesh: Mesh | None, width_ratio: float) -> Optimizer:
        if width_ratio != 1:
            raise UserError("width_transfer='mup' has no rule for Adafactor: choose AdamW, Muon, Lion, Signum or Adan.")
        return super().build_scaled(axes, mesh, width_ratio)

    def direction(self) -> optax.GradientTransformation:
        steps = [optax.scale_by_factored_rms(True, self.decay_rate, 0, self.min_dim_size_to_factor)]
        if self.clipping_threshold is not None:
            steps.append(optax.clip_by_block_rms(self.clipping_threshold))
        if self.relative:
            steps.append(optax.scale_by_param_block_rms())
        if self.momentum is not None:
            steps.append(optax.ema(self.momentum, debias=False))
        return optax.chain(*steps)
