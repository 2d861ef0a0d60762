"""The config of a stage, and its resolution for given lanes and sources."""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from fractions import Fraction

from jaxtrain import cli
from jaxtrain.errors import UserError
from jaxtrain.plan import mixing

PACKINGS = ("concat", "fit")


@dataclasses.dataclass(kw_only=True)
class Stage:
    """A span of training tokens with one sequence length, batch size and mix.

    Attributes:
        name: A label for logs. It has no other effect.
        seq_len: Tokens per row.
        tokens: Length of the stage in trained tokens. None, allowed only in the last stage, means the rest of the run.
        weights: Each source's share of the tokens, by name, summing to 1. Omitted sources get none. Optional with a
            single source.
        batch_size: Rows per batch over all devices, a multiple of data.num_lanes. Set this or tokens_per_batch.
        tokens_per_batch: Sets the batch size to this // seq_len, rounded down to a multiple of both data.num_lanes and
            8.
        overlap: The fraction of a row, in [0, 1), that the next row of the same lane and source repeats.
        packing: "concat" joins documents and cuts them where a row ends. "fit" cuts only documents longer than a row,
            and pads the places that are left (data/fit_packing.py). Both count as tokens of the stage.
    """

    name: str = "main"
    seq_len: int
    tokens: int | None = None
    weights: dict[str, float] | None = None
    batch_size: int | None = None
    tokens_per_batch: int | None = None
    overlap: float = 0.0
    packing: str = dataclasses.field(default="concat", metadata={cli.BEFORE: "concat"})

    def check_alone(self) -> None:
        """Raises UserError for a value out of range, independent of the rest of the config.

        `build_plan` calls it and adds the stage's number to the message, so it is not named `check`, which the config
        tree calls itself.
        """
        for field in ("seq_len", "tokens", "batch_size", "tokens_per_batch"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"{field}={value}: give 1 or more")
        if (self.batch_size is None) == (self.tokens_per_batch is None):
            raise UserError(
                f"batch_size={self.batch_size} and tokens_per_batch={self.tokens_per_batch}: give one of them "
                "and set the other to none"
            )
        if not 0 <= self.overlap < 1:
            raise UserError(f"overlap={self.overlap} is a fraction of a row: give 0 or more, below 1")
        if self.packing not in PACKINGS:
            near = difflib.get_close_matches(self.packing, PACKINGS) or PACKINGS
            raise UserError(f"packing={self.packing!r} is not known; did you mean {' or '.join(map(repr, near))}?")
        if self.packing == "fit" and self.overlap:
            raise UserError(
                f"overlap={self.overlap} with packing='fit': rows of whole documents do not overlap; give 0"
            )
        if self.weights == {}:
            raise UserError("weights={} names no source: give each one's share, summing to 1")

    def rows(self, num_lanes: int) -> int:
        """Rows per batch. Raises UserError, with sizes that work, if they do not divide evenly among the lanes."""
        if self.batch_size is not None:
            if self.batch_size % num_lanes:
                lower = self.batch_size // num_lanes * num_lanes
                sizes = " or ".join(str(size) for size in (lower, lower + num_lanes) if size)
                raise UserError(
                    f"batch_size={self.batch_size} is not a multiple of data.num_lanes={num_lanes}, and every lane "
                    f"supplies the same number of rows; give {sizes}"
                )
            return self.batch_size
        assert self.tokens_per_batch is not None
        multiple = math.lcm(num_lanes, 8)
        rows = self.tokens_per_batch // self.seq_len // multiple * multiple
        if not rows:
            raise UserError(
                f"tokens_per_batch={self.tokens_per_batch} is less than {multiple} rows of {self.seq_len} tokens, "
                f"the minimum for data.num_lanes={num_lanes}; give {multiple * self.seq_len} or more, or a "
                f"batch_size that is a multiple of {num_lanes}"
            )
        return rows

    def overlap_tokens(self) -> int:
        """Tokens of a row that the next one repeats.

        Computed from the decimal as written: 0.29 * 100 is 28.999 in floats.
        """
        return math.floor(Fraction(str(self.overlap)) * self.seq_len)

    def shares(self, source_names: Sequence[str]) -> dict[str, Fraction]:
        """Positive weights by name, alphabetically, so neither the config's order nor unused sources change a mix.

        Raises:
            UserError: A source does not exist, weights are missing, or they do not sum to 1.
        """
        if self.weights is None:
            if len(source_names) != 1:
                example = ", ".join(f"{name!r}: {1 / len(source_names):.3g}" for name in source_names)
                raise UserError(
                    f"weights=none with {len(source_names)} sources: give each one's share, for example {{{example}}}"
                )
            return {source_names[0]: Fraction(1)}
        for name in self.weights:
            if name not in source_names:
                near = difflib.get_close_matches(name, source_names) or source_names
                raise UserError(
                    f"weights: there is no source {name!r} in data.sources; did you mean {' or '.join(near)}?"
                )
        exact = mixing.exact_weights(self.weights)
        return {name: exact[name] for name in sorted(exact) if exact[name]}
