"""Learning-rate schedules: functions of tokens, so that a change of batch size does not distort them.

`build()` returns `schedule(tokens, total) -> factor`, the fraction (0 to 1) of the peak rate after `tokens` of the
run's `total` tokens. The plan evaluates it at the midpoint of each step, which is the step's mean on a linear ramp. A
warmup or decay therefore has the same effect for any batch size, and the rates of the first and the last step are above
0.
"""

import dataclasses
import math

from jaxtrain.errors import UserError
from jaxtrain.interfaces import Schedule


@dataclasses.dataclass(kw_only=True)
class WarmUp:
    """The linear warmup from 0 to the peak that all schedules share. With neither field set there is no warmup.

    Attributes:
        warmup_tokens: Length in tokens.
        warmup_fraction: Length as a fraction of the run's tokens, in [0, 1). Needs a run with a known end.
    """

    warmup_tokens: int | None = None
    warmup_fraction: float | None = None

    def check(self) -> None:
        """Raises UserError if a value is out of range or both lengths are set."""
        _check_length("warmup", self.warmup_tokens, self.warmup_fraction)

    def build(self) -> Schedule:
        """Returns schedule(tokens, total) → factor, 0 to 1. It raises UserError for a total that it cannot fit."""

        def schedule(tokens: int, total: int | None) -> float:
            warmup = _length("warmup", self.warmup_tokens, self.warmup_fraction, total)
            factor = self._after_warmup(tokens, warmup, total)  # first, so that a bad total fails at step 1
            return tokens / warmup if tokens < warmup else factor

        return schedule

    def _after_warmup(self, tokens: int, warmup: float, total: int | None) -> float:
        """The factor after the warmup of `warmup` tokens. Also called during it."""
        raise NotImplementedError

    def _end(self, total: int | None) -> int:
        if total is None:
            raise UserError(
                f"the schedule {type(self).__name__} needs to know where the run ends: set total_tokens or steps, "
                "or choose the schedule Constant"
            )
        return total


@dataclasses.dataclass(kw_only=True)
class Constant(WarmUp):
    """The peak rate until the end, and the only schedule for a run without a known end. Fields: see WarmUp."""

    def _after_warmup(self, tokens: int, warmup: float, total: int | None) -> float:
        return 1.0


@dataclasses.dataclass(kw_only=True)
class Decay(WarmUp):
    """A decay from the end of the warmup to the end of the run, of the shape that a subclass gives.

    Attributes:
        final_fraction: Final rate as a fraction of the peak, 0 to 1. Other fields: see WarmUp.
    """

    final_fraction: float

    def check(self) -> None:
        """Raises UserError if a value is out of range."""
        super().check()
        _check_share("final_fraction", self.final_fraction)

    def _after_warmup(self, tokens: int, warmup: float, total: int | None) -> float:
        end = self._end(total)
        if warmup >= end:
            raise UserError(
                f"the warmup of {warmup:,.0f} tokens fills the run's {end:,}; shorten warmup_tokens, or give "
                "a share of the run, for example warmup_fraction=0.01"
            )
        return self._at(min(max((tokens - warmup) / (end - warmup), 0.0), 1.0))

    def _at(self, progress: float) -> float:
        """The factor at a progress of the decay, 0 to 1."""
        raise NotImplementedError


@dataclasses.dataclass(kw_only=True)
class Cosine(Decay):
    """Half a cosine from the peak to the end (Loshchilov & Hutter 2017, SGDR, equation 5, without restarts)."""

    final_fraction: float = 0.1

    def _at(self, progress: float) -> float:
        return self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * progress)) / 2


@dataclasses.dataclass(kw_only=True)
class Linear(Decay):
    """A straight line from the peak to the end, by default to 0 (Bergsma et al. 2025, "Straight to Zero")."""

    final_fraction: float = 0.0

    def _at(self, progress: float) -> float:
        return 1 - (1 - self.final_fraction) * progress


@dataclasses.dataclass(kw_only=True)
class WSD(WarmUp):
    """Warmup-stable-decay: the peak rate, then a decay at the end (Hu et al. 2024, MiniCPM, section 4).

    Attributes:
        decay_tokens: Length of the decay in tokens.
        decay_fraction: Length of the decay as a fraction of the run's tokens. Exactly one of the two must be set.
        shape: "linear", or "sqrt" for 1 - sqrt(progress of the decay) (Hägele et al. 2024, "Scaling laws and
            compute-optimal training beyond fixed training durations", section 3, where it is the better of the two).
        final_fraction: Final rate as a fraction of the peak, 0 to 1. Other fields: see WarmUp.
    """

    decay_tokens: int | None = None
    decay_fraction: float | None = None
    shape: str = "sqrt"
    final_fraction: float = 0.0

    def check(self) -> None:
        """Raises UserError if a value is out of range or the decay has no length."""
        super().check()
        _check_length("decay", self.decay_tokens, self.decay_fraction)
        if self.decay_tokens is None and self.decay_fraction is None:
            raise UserError("decay_fraction=none and decay_tokens=none: WSD needs one, for example decay_fraction=0.2")
        if self.shape not in ("linear", "sqrt"):
            raise UserError(f'shape={self.shape!r} of the decay is neither "linear" nor "sqrt"')
        _check_share("final_fraction", self.final_fraction)

    def _after_warmup(self, tokens: int, warmup: float, total: int | None) -> float:
        end = self._end(total)
        decay = _length("decay", self.decay_tokens, self.decay_fraction, total)
        if warmup + decay > end:
            raise UserError(
                f"a warmup of {warmup:,.0f} tokens and a decay of {decay:,.0f} do not fit into the run's {end:,}; "
                "shorten them, or give them as warmup_fraction and decay_fraction"
            )
        if tokens <= end - decay:
            return 1.0
        part = min((tokens - (end - decay)) / decay, 1.0)  # an estimated end may come too early
        return 1 - (1 - self.final_fraction) * (math.sqrt(part) if self.shape == "sqrt" else part)


def _length(what: str, tokens: int | None, fraction: float | None, total: int | None) -> float:
    """Tokens of the warmup or the decay; 0 if neither length is set."""
    if fraction is None:
        return 0 if tokens is None else tokens
    if total is None:
        raise UserError(
            f"{what}_fraction={fraction} is a share of a run whose end is not known: "
            f"give {what}_tokens instead, or set total_tokens or steps"
        )
    return fraction * total


def _check_length(what: str, tokens: int | None, fraction: float | None) -> None:
    if tokens is not None and fraction is not None:
        raise UserError(f"{what}_tokens={tokens} and {what}_fraction={fraction} contradict each other; set one to none")
    if tokens is not None and tokens < 0:
        raise UserError(f"{what}_tokens={tokens} is negative; give 0 or more")
    if fraction is not None and not 0 <= fraction < 1:
        raise UserError(f"{what}_fraction={fraction} is a share of the run's tokens: give 0 or more, below 1")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name}={value} is a share of the peak rate: give 0 to 1")
