"""Shared by `270m_curriculum.py` and `curriculum_smoke.py`: ten stages of growing rows and shares of math and code."""

from collections.abc import Sequence

from jaxtrain.plan import Stage
from jaxtrain.plan.schedules import WSD

# name, seq_len, millions of tokens, percent of web, math and code
TABLE = (
    ("Basic Patterns", 8, 10, (95, 5, 0)),
    ("Sentences", 16, 20, (95, 5, 0)),
    ("Paragraphs", 32, 30, (90, 8, 2)),
    ("Extended Context", 64, 40, (85, 10, 5)),
    ("Reasoning Development", 128, 75, (80, 12, 8)),
    ("Complex Patterns", 256, 100, (75, 15, 10)),
    ("Integration", 512, 125, (70, 18, 12)),
    ("Deep Understanding", 768, 150, (65, 20, 15)),
    ("Expert Reasoning", 1536, 200, (60, 22, 18)),
    ("Final Polish", 2048, 250, (55, 25, 20)),
)
SOURCES = ("web", "math", "code")


def stages(batch_sizes: Sequence[int], tokens_per_million: int) -> tuple[Stage, ...]:
    """The stages of the table.

    Args:
        batch_sizes: rows per batch, one for each stage.
        tokens_per_million: number of tokens to train for each million in the table.
    """
    return tuple(
        Stage(
            name=name,
            seq_len=seq_len,
            tokens=millions * tokens_per_million,
            weights={source: share / 100 for source, share in zip(SOURCES, shares, strict=True)},
            batch_size=batch_size,
            overlap=0.5,
        )
        for (name, seq_len, millions, shares), batch_size in zip(TABLE, batch_sizes, strict=True)
    )


def schedule() -> WSD:
    """Warmup in stage 1, then constant so that every stage trains at the peak rate; decay within stage 10."""
    return WSD(warmup_fraction=0.01, decay_fraction=0.2)
