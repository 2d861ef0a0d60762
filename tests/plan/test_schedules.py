"""Schedules: against their papers' formulas, and functions of tokens only."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.errors import UserError
from jaxtrain.plan.schedules import WSD, Constant, Cosine, Linear

TOTAL = 1_000_000
SCHEDULES = {
    "constant": Constant(warmup_tokens=10_000),
    "cosine": Cosine(warmup_tokens=10_000),
    "linear": Linear(warmup_fraction=0.01),
    "wsd": WSD(warmup_tokens=10_000, decay_fraction=0.2),
    "wsd linear": WSD(warmup_tokens=10_000, decay_tokens=200_000, shape="linear", final_fraction=0.05),
}


def sampled(schedule, points):
    return [schedule(tokens, TOTAL) for tokens in points]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up(name):
    config = SCHEDULES[name]
    config.check()
    assert sampled(config.build(), [1, 2500, 5000, 10_000]) == pytest.approx([1e-4, 0.25, 0.5, 1.0], abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@given(points=st.lists(st.integers(1, TOTAL), min_size=2, max_size=2).map(sorted))
def test_bounded_and_falling_after_the_warm_up(name, points):
    before, after = sampled(SCHEDULES[name].build(), points)
    assert 0 <= before <= 1
    assert 0 <= after <= 1
    assert points[0] < 10_000 or after <= before
    assert after > 0 or points[1] == TOTAL


def test_cosine():
    schedule = Cosine(warmup_fraction=0.2, final_fraction=0.1).build()
    points = [200_000, 400_000, 600_000, 800_000, 1_000_000]
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * quarter / 4)) for quarter in range(5)]
    assert sampled(schedule, points) == pytest.approx(expected, abs=1e-12)
    assert Cosine(final_fraction=0.1).build()(0, TOTAL) == 1.0


def test_linear():
    schedule = Linear(warmup_tokens=200_000, final_fraction=0.2).build()
    assert sampled(schedule, [200_000, 600_000, 1_000_000]) == pytest.approx([1.0, 0.6, 0.2])


def test_wsd():
    schedule = WSD(warmup_tokens=1000, decay_fraction=0.2).build()
    points = [1000, 800_000, 850_000, 900_000, 1_000_000]
    assert sampled(schedule, points) == pytest.approx([1.0, 1.0, 0.5, 1 - math.sqrt(0.5), 0.0])
    schedule = WSD(decay_tokens=100_000, shape="linear", final_fraction=0.1).build()
    assert sampled(schedule, [0, 900_000, 950_000, 1_000_000]) == pytest.approx([1.0, 1.0, 0.55, 0.1])


def test_horizon():
    assert Constant(warmup_tokens=100).build()(50, None) == 0.5
    assert Constant().build()(50, None) == 1.0
    for config in (Cosine(), Linear(), WSD(decay_tokens=5), Cosine(warmup_tokens=10)):
        with pytest.raises(UserError, match="needs to know where the run ends: set total_tokens or steps, or choose"):
            config.build()(1, None)
    with pytest.raises(UserError, match=r"warmup_fraction=0.1 is a share .* give warmup_tokens instead"):
        Constant(warmup_fraction=0.1).build()(1, None)
    # While WSD is stable, the same tokens give the same rate for any horizon: a run can be extended.
    wsd = WSD(warmup_tokens=1000, decay_tokens=10_000).build()
    assert wsd(500, TOTAL) == wsd(500, 2 * TOTAL)
    assert wsd(900_000, TOTAL) == wsd(900_000, 2 * TOTAL)


@pytest.mark.parametrize("batch", [500, 1000, 5000])  # each divides the warmup
@pytest.mark.parametrize("name", ["linear", "wsd linear"])
def test_batch_size_does_not_bend_it(name, batch):
    """The middle of a step is the mean over its tokens: the sum over a run is the same for every batch size."""
    schedule = SCHEDULES[name].build()
    total = sum(schedule(tokens + batch // 2, TOTAL) * batch for tokens in range(0, TOTAL, batch))
    fine = sum(schedule(tokens + 50, TOTAL) * 100 for tokens in range(0, TOTAL, 100))
    assert total == pytest.approx(fine, rel=1e-5)


def test_parts_that_do_not_fit():
    for config in (Cosine(warmup_tokens=TOTAL), Linear(warmup_tokens=2 * TOTAL)):
        with pytest.raises(UserError, match=r"warmup of [12],000,000 tokens fills the run's 1,000,000; shorten"):
            config.build()(1, TOTAL)
    with pytest.raises(UserError, match=r"warmup of 900,000 tokens and a decay of 200,000 do not fit"):
        WSD(warmup_tokens=900_000, decay_fraction=0.2).build()(1, TOTAL)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Constant(warmup_tokens=5, warmup_fraction=0.1), "contradict each other; set one to none"),
        (Cosine(warmup_tokens=-5), "warmup_tokens=-5 is negative"),
        (Linear(warmup_fraction=1.0), "warmup_fraction=1.0 is a share"),
        (Cosine(final_fraction=1.5), "final_fraction=1.5 is a share of the peak rate"),
        (Linear(final_fraction=-0.1), "final_fraction=-0.1"),
        (WSD(), "WSD needs one, for example decay_fraction=0.2"),
        (WSD(decay_fraction=0.2, decay_tokens=5), "decay_tokens=5 and decay_fraction=0.2 contradict"),
        (WSD(decay_fraction=0.2, shape="exponential"), "shape='exponential' of the decay is neither"),
        (WSD(decay_fraction=0.2, final_fraction=2), "final_fraction=2"),
    ],
)
def test_check(config, said):
    with pytest.raises(UserError, match=said):
        config.check()
