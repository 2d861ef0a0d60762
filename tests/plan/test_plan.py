"""The plan: against a slow walk over the steps, and error messages for impossible plans."""

import dataclasses
import json
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.errors import UserError
from jaxtrain.plan import Plan, Stage, build_plan
from jaxtrain.plan.schedules import WSD, Constant, Cosine


def plan_of(*stages: Stage, **changes) -> Plan:
    settings = {
        "source_names": ("web", "math", "code"),
        "num_lanes": 4,
        "seed": 0,
        "total_tokens": None,
        "steps": None,
        "epochs": None,
        "learning_rate": 1e-3,
        "schedule": Constant().build(),
    }
    return build_plan(stages, **(settings | changes))


def last_step(plan: Plan) -> int:
    assert plan.last_step is not None
    return plan.last_step


def one(**changes) -> Stage:
    return Stage(**({"seq_len": 8, "batch_size": 4, "weights": {"web": 1.0}} | changes))


MIX = {"web": 0.7, "math": 0.25, "code": 0.05}


def walk(stages: list[Stage], total: int | None, steps: int | None):
    """The design as a loop: (step, stage, tokens before, tokens after, rows before) until the run ends."""
    step, tokens, rows, bound = 0, 0, 0, 0
    for number, stage in enumerate(stages, 1):
        assert stage.batch_size
        bound = math.inf if stage.tokens is None else bound + stage.tokens
        end = min(bound, math.inf if total is None else total)
        while tokens < end and (steps is None or step < steps):
            step += 1
            after = tokens + stage.batch_size * stage.seq_len
            after = after if total is None else min(after, total)
            yield step, number, tokens, after, rows
            tokens, rows = after, rows + stage.batch_size


@st.composite
def runs(draw):
    stages = [
        one(seq_len=draw(st.integers(1, 9)), batch_size=4 * draw(st.integers(1, 5)), tokens=draw(st.integers(1, 400)))
        for _ in range(draw(st.integers(1, 5)))
    ]
    total = sum(stage.tokens or 0 for stage in stages)
    steps = draw(st.none() | st.integers(1, 60))
    if draw(st.booleans()):
        stages[-1].tokens = None
        if steps is not None and draw(st.booleans()):
            return stages, None, None, steps
        return stages, total, total, steps
    return stages, draw(st.sampled_from([None, total])), total, steps


def unreached(stages: list[Stage], total: int | None) -> int | None:
    """The first stage without a step, by the walk, for any `steps`."""
    total = total or sum(stage.tokens or 1000 for stage in stages)
    with_steps = {stage for _, stage, *_ in walk(stages, total, None)}
    return next((number for number in range(1, len(stages) + 1) if number not in with_steps), None)


@settings(deadline=None, max_examples=300)
@given(runs())
def test_follows_the_walk(run):
    stages, given_total, total, steps = run
    swallowed = unreached(stages, total)
    if swallowed is not None:
        with pytest.raises(UserError, match=rf"^stage {swallowed} \(main\): its [0-9,]+ tokens are never reached: "):
            plan_of(*stages, total_tokens=given_total, steps=steps)
        return
    plan = plan_of(*stages, total_tokens=given_total, steps=steps)
    walked = list(walk(stages, total, steps))
    for step, stage, before, after, rows in walked:
        now = plan.at(step)
        assert (now.step, now.stage, now.tokens_before, now.tokens_after) == (step, stage, before, after)
        assert (now.rows_before, now.masked_from) == (rows, after - before)
        assert (now.seq_len, now.batch_size) == (stages[stage - 1].seq_len, stages[stage - 1].batch_size)
    assert (plan.last_step, plan.total_tokens) == (walked[-1][0], walked[-1][3])
    assert steps is not None or plan.total_tokens == total
    assert plan.horizon == (total or plan.total_tokens)
    assert [stage.last_token for stage in plan.stages][-1] == plan.total_tokens
    for stage, following in zip(plan.stages, plan.stages[1:], strict=False):
        assert (following.first_step - 1, following.first_token) == (stage.last_step, stage.last_token)
    with pytest.raises(UserError, match=f"past the end of the run, step {plan.last_step}"):
        plan.at(last_step(plan) + 1)
    assert plan.table().count("\n") == len(stages) + 1


def test_sources():
    """The tokens of every source add up, over stages, to the batches' content, including the final mask."""
    plan = plan_of(
        one(tokens=500, weights=MIX),
        one(tokens=100, seq_len=16, weights={"code": 0.5, "web": 0.5}),
        one(tokens=390, seq_len=2, batch_size=12, weights={"math": 1.0}),
        one(tokens=None, batch_size=16, seq_len=32, weights=MIX),
        total_tokens=8000,
    )
    tokens = np.zeros(3, np.int64)
    for step in range(1, last_step(plan) + 1):
        assert plan.source_tokens_before(step).tolist() == tokens.tolist()
        now, sources = plan.at(step), plan.sources_of(step)
        assert sources.shape == (now.batch_size,)
        assert now.tokens_before == tokens.sum()
        for row, source in enumerate(sources):
            tokens[source] += min(max(now.masked_from - row * now.seq_len, 0), now.seq_len)
        if now.stage == 3:
            assert set(sources.tolist()) == {1}
    assert plan.source_tokens_before(last_step(plan) + 1).tolist() == tokens.tolist()
    assert tokens.sum() == 8000
    assert plan.at(last_step(plan)).masked_from < 16 * 32


def test_neither_order_nor_unused_sources_change_a_mix():
    plan = plan_of(one(tokens=4000, weights=MIX))
    other = plan_of(
        one(tokens=4000, weights={"code": 0.05, "new": 0.0, "math": 0.25, "web": 0.7}),
        source_names=("new", "math", "code", "web"),
    )
    for step in (1, 2, 50, 125):
        names = [plan.source_names[source] for source in plan.sources_of(step)]
        assert names == [other.source_names[source] for source in other.sources_of(step)]


def test_a_cut_last_batch_is_as_good_a_mix():
    """If the last batch is masked, shares hold for the counted part, to a row, and rows are still permuted."""
    for tokens in range(8 * 400 - 397 * 8 + 5, 8 * 400, 97):
        plan = plan_of(one(tokens=8000 + tokens, batch_size=400, weights=MIX))
        last = plan.at(last_step(plan))
        assert last.masked_from == (8000 + tokens) % 3200
        given = plan.source_tokens_before(last.step + 1)
        assert given.sum() == last.tokens_after
        for source, name in enumerate(plan.source_names):
            assert abs(given[source] - last.tokens_after * MIX[name]) < 8
        sources = plan.sources_of(last.step)
        assert not sources.flags.writeable
        assert sorted(sources[:200].tolist()) != sources[:200].tolist()


def test_seed_moves_rows():
    plan, other = (plan_of(one(tokens=64_000, batch_size=400, weights=MIX), seed=seed) for seed in (0, 1))
    assert (plan.sources_of(3) != other.sources_of(3)).any()
    assert (plan.source_tokens_before(4) == other.source_tokens_before(4)).all()


CURRICULUM = (  # name, seq_len, millions of tokens, percent of web, math, code
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


def curriculum() -> Plan:
    stages = [
        Stage(
            name=name,
            seq_len=seq_len,
            tokens=millions * 10**6,
            weights={source: share / 100 for source, share in zip(("web", "math", "code"), shares, strict=True)},
            tokens_per_batch=2**19,
            overlap=0.5,
        )
        for name, seq_len, millions, shares in CURRICULUM
    ]
    schedule = WSD(warmup_fraction=0.01, decay_fraction=0.2).build()
    return plan_of(*stages, num_lanes=64, total_tokens=10**9, schedule=schedule, learning_rate=6e-4)


def test_ten_stage_curriculum():
    plan = curriculum()
    assert [stage.batch_size for stage in plan.stages] == [65536, 32768, 16384, 8192, 4096, 2048, 1024, 640, 320, 256]
    bound = 0
    for stage, (name, seq_len, millions, _) in zip(plan.stages, CURRICULUM, strict=True):
        bound += millions * 10**6
        assert (stage.name, stage.seq_len, stage.stride) == (name, seq_len, seq_len // 2)
        assert stage.last_token in range(bound, bound + 2**19)  # reached, by the last of its steps
    assert plan.total_tokens == plan.stages[-1].last_token == 10**9
    assert plan.source_tokens_before(last_step(plan) + 1).sum() == 10**9
    # Shares of the whole: within a batch's row at the end of each stage.
    for source in range(3):
        expected = sum(millions * 10**4 * shares[source] for _, _, millions, shares in CURRICULUM)
        assert abs(plan.source_tokens_before(last_step(plan) + 1)[source] - expected) < 10 * 2**19
    assert (plan.sources_of(1) != plan.source_names.index("code")).all()
    assert 0 < plan.at(1).learning_rate < plan.at(10).learning_rate < plan.at(500).learning_rate == 6e-4
    assert 0 < plan.at(last_step(plan)).learning_rate < 2e-5
    lines = plan.table().splitlines()
    assert " ".join(lines[1].split()) == (
        "1/10 Basic Patterns 1 to 20 8 65,536 0 to 10,485,760 1.57e-05 to 0.0006 concat 4 math 0.05, web 0.95"
    )
    # By hand: 763 steps of 524,288 tokens to 400M, 306 of 491,520 to 550M, 407 to 750M, 476 of 524,288 to 1B.
    assert lines[-1] == "1,952 steps, 1,000,000,000 tokens; 477,696 of the last batch's 524,288 tokens count."


def test_stages_that_the_batch_before_swallows():
    said = (
        r"stage 2 \(gone\): its 20 tokens are never reached: stage 1 \(main\) ends with a whole batch of 4 rows of 8 "
        r"tokens, which overshoots by 22; give stage 2 more than 22 tokens, or stage 1 smaller batches, or "
    )
    with pytest.raises(UserError, match=said):
        plan_of(one(tokens=10), one(name="gone", tokens=20, seq_len=2), one(tokens=70))
    # That many tokens are not enough; one more is.
    with pytest.raises(UserError, match="more than 22 tokens"):
        plan_of(one(tokens=10), one(name="gone", tokens=22, seq_len=2), one(tokens=70))
    plan = plan_of(one(tokens=10), one(tokens=23, seq_len=2), one(tokens=70))
    assert [(stage.first_step, stage.last_step) for stage in plan.stages] == [(1, 1), (2, 2), (3, 4)]
    # The first stage's overshoot may even pass the run's end, and the last stage may be the rest of the run.
    with pytest.raises(UserError, match=r"stage 2 \(main\): its 5 tokens .* overshoots by 22"):
        plan_of(one(tokens=10), one(tokens=5), one(tokens=5))
    with pytest.raises(UserError, match=r"stage 2 \(main\): its 7 tokens are never reached: stage 1"):
        plan_of(one(tokens=10), one(), total_tokens=17)
    # `steps` does not excuse it; but a stage after the run's end by `steps` is only not reached yet.
    with pytest.raises(UserError, match=r"stage 2 .* never reached"):
        plan_of(one(tokens=10), one(tokens=20, seq_len=2), one(tokens=70), steps=1)
    plan = plan_of(one(tokens=64), one(tokens=20, seq_len=2), steps=2)
    assert plan.table().splitlines()[2].split()[2] == "none"


def test_unbounded():
    plan = plan_of(one(tokens=100), one(), epochs=1)
    assert (plan.last_step, plan.total_tokens, plan.horizon) == (None, None, None)
    assert plan.stages[-1].last_step is None
    far = plan.at(10**15)
    assert (far.stage, far.tokens_after, far.masked_from) == (2, 32 * 10**15, 32)
    assert plan.table().endswith("The run ends with its data: no total_tokens, no steps.")
    rising = Cosine(warmup_fraction=0.5, final_fraction=0.0).build()
    unknown = plan_of(one(), epochs=1, schedule=rising)  # its sources are not counted yet
    assert math.isnan(unknown.at(1).learning_rate)
    assert "horizon" not in unknown.record()
    known = plan_of(one(), epochs=1, schedule=rising, horizon=3200)
    assert (known.last_step, known.horizon, known.record()["horizon"]) == (None, 3200, 3200)
    whole = plan_of(one(), total_tokens=3200, schedule=rising)
    assert known.at(70).learning_rate == whole.at(70).learning_rate
    assert known.at(1000).learning_rate == 0.0
    assert known.table().endswith("no steps. Schedules assume about 3,200 tokens.")
    with pytest.raises(UserError, match="fills the run's 32"):
        plan_of(one(), epochs=1, schedule=Cosine(warmup_tokens=40).build(), horizon=32)
    with pytest.raises(UserError, match=r"nothing bounds the run: set total_tokens .* steps, .*epochs"):
        plan_of(one())


def test_steps_end_a_run_but_do_not_bend_its_schedule():
    schedule = Cosine(warmup_tokens=100).build()
    whole = plan_of(one(), total_tokens=3200, schedule=schedule)
    half = plan_of(one(), total_tokens=3200, steps=50, schedule=schedule)
    assert (half.last_step, half.total_tokens, half.horizon) == (50, 1600, 3200)
    assert half.at(50) == whole.at(50)
    assert half.differences(whole.record(), 50) == whole.differences(half.record(), 50) == []
    assert half.table().endswith("50 steps, 1,600 tokens; the learning rate's schedule is that of 3,200 tokens.")
    alone = plan_of(one(), steps=50, schedule=schedule)
    assert (alone.last_step, alone.total_tokens, alone.horizon) == (50, 1600, 1600)
    assert alone.at(50).learning_rate < 1.01e-4 < whole.at(50).learning_rate


def test_loss_weights_are_those_of_the_middle():
    weights = (lambda tokens, total: 3 * tokens / total, lambda tokens, total: 1 - tokens / total)
    plan = plan_of(one(), total_tokens=320, loss_weights=weights)
    assert (plan.at(1).ce_weight, plan.at(1).kd_weight) == (3 * 16 / 320, 1 - 16 / 320)
    assert (plan.at(10).ce_weight, plan.at(10).kd_weight) == (3 * 304 / 320, 1 - 304 / 320)
    plain = plan_of(one(), total_tokens=320)
    assert (plain.at(1).ce_weight, plain.at(1).kd_weight) == (1, 0)


def test_learning_rate_is_that_of_the_middle():
    plan = plan_of(one(), total_tokens=320, schedule=lambda tokens, total: tokens / total, learning_rate=2.0)
    assert plan.at(1).learning_rate == 2 * 16 / 320
    assert plan.at(10).learning_rate == 2 * 304 / 320


def test_overlap_is_the_decimal_as_written():
    plan = plan_of(one(seq_len=100, overlap=0.29), steps=1)  # int(0.29 * 100) is 28
    assert (plan.at(1).overlap_tokens, plan.at(1).stride) == (29, 71)
    assert plan_of(one(seq_len=1, overlap=0.9), steps=1).at(1).stride == 1


def test_batch_size_from_tokens():
    for lanes, size in ((4, 40), (6, 24), (16, 32), (32, 32)):
        stage = one(batch_size=None, tokens_per_batch=8 * 47)
        assert plan_of(stage, num_lanes=lanes, steps=1).at(1).batch_size == size


def test_differences():
    def changed(step: int, second: dict | None = None, third: dict | None = None, **run) -> list[str]:
        stages = (one(tokens=320), one(name="long", tokens=640, seq_len=16, weights=MIX), one(weights=MIX))
        changes = ({}, second or {}, third or {})
        edited = [dataclasses.replace(stage, **change) for stage, change in zip(stages, changes, strict=True)]
        record = plan_of(*stages, total_tokens=3000).record()
        return plan_of(*edited, **({"total_tokens": 3000} | run)).differences(record, step)

    # Steps 1-10, 11-20, 21-84 (masked).
    assert changed(84) == []
    assert changed(10, {"seq_len": 32}, seed=5) == []
    assert changed(15, {"tokens": 6400, "name": "longer"}, total_tokens=9000) == []
    assert changed(83, total_tokens=9000) == changed(83, total_tokens=None, epochs=1) == []
    assert changed(11, {"seq_len": 32}) == ["stage 2 (long): seq_len was 16, is now 32"]
    assert changed(30, {"tokens": 6400}, total_tokens=9000) == ["stage 2 (long): last_step was 20, is now 110"]
    assert changed(15, {"tokens": 200}, total_tokens=9000) == ["stage 2 (long): last_step was 20, is now 14"]
    assert changed(14, {"tokens": 200}, total_tokens=9000) == []
    assert changed(11, {"weights": {"web": 0.5, "math": 0.5}}) == [
        "stage 2 (long): weights was code 0.05, math 0.25, web 0.7, is now math 0.5, web 0.5"
    ]
    assert changed(11, {"overlap": 0.5, "batch_size": 8}) == [
        "stage 2 (long): batch_size was 4, is now 8",
        "stage 2 (long): overlap_tokens was 0, is now 8",
    ]
    assert changed(11, {"packing": "fit"}) == ["stage 2 (long): packing was concat, is now fit"]
    assert changed(10, {"packing": "fit"}) == changed(20, None, {"packing": "fit"}) == []
    assert changed(11, seed=5) == ["seed was 0, is now 5: it decides the source of every row"]
    assert changed(50, total_tokens=1000) == ["step 50 is trained, but the plan now ends at step 22"]
    (line,) = changed(84, total_tokens=9000)
    assert line.startswith("step 84 ended at 3,000 trained tokens, and now ends at 3,008: ")
    (line,) = changed(83, total_tokens=2960)
    assert line.startswith("step 83 ended at 2,976 trained tokens, and now ends at 2,960: ")


def test_record_is_json():
    plan = curriculum()
    record = json.loads(json.dumps(plan.record()))
    assert plan.differences(record, 1952) == []
    for stage in record["stages"]:  # version 0.1 did not record it
        assert stage.pop("packing") == "concat"
    assert plan.differences(record, 1952) == []


@pytest.mark.parametrize(
    ("stages", "changes", "said"),
    [
        ((), {}, r"stages=\(\): a run needs at least one stage"),
        ((one(seq_len=0),), {}, r"stage 1 \(main\): seq_len=0: give 1 or more"),
        ((one(), one(tokens=-5)), {}, r"stage 2 \(main\): tokens=-5"),
        ((one(batch_size=None),), {}, "batch_size=None and tokens_per_batch=None: give one"),
        ((one(tokens_per_batch=64),), {}, "batch_size=4 and tokens_per_batch=64: give one"),
        ((one(overlap=1.0),), {}, "overlap=1.0 is a fraction of a row"),
        ((one(packing="fitt"),), {}, "packing='fitt' is not known; did you mean 'fit'?"),
        ((one(packing="fit", overlap=0.5),), {}, "overlap=0.5 with packing='fit': rows of whole documents do not"),
        ((one(weights={"web": 0.9}),), {}, r"stage 1 \(main\): weights {'web': 0.9} sum to 0.9; they must sum to 1"),
        ((one(weights={"weeb": 1.0}),), {}, "there is no source 'weeb' in data.sources; did you mean web?"),
        ((one(weights={"x": 1.0}),), {}, "did you mean web or math or code?"),
        ((one(weights=None),), {}, "weights=none with 3 sources: give each one's share, for example {'web': 0.333"),
        ((one(batch_size=100),), {"num_lanes": 64}, "batch_size=100 is not a multiple .*=64, .*; give 64 or 128"),
        ((one(batch_size=5),), {"num_lanes": 64}, "give 64$"),
        (
            (one(batch_size=None, tokens_per_batch=100),),
            {"num_lanes": 12},
            "less than 24 rows of 8 .* give 192 or more",
        ),
        ((one(name="a"), one(tokens=5)), {}, r"stage 1 \(a\): tokens=none, but only the last stage"),
        ((one(tokens=10), one(tokens=5)), {"total_tokens": 14}, "=14, but .* sum to 15: give scale_to=14 instead"),
        ((one(tokens=10), one(name="b")), {"total_tokens": 10}, r"stage 2 \(b\) cannot be reached: total_tokens=10, "),
        ((one(), one(seq_len=-8)), {}, r"stage 2 \(main\): seq_len=-8: give 1 or more"),
        ((one(tokens=0), one()), {}, r"stage 1 \(main\): tokens=0: give 1 or more"),
        ((one(tokens=32), one(batch_size=0)), {}, r"stage 2 \(main\): batch_size=0: give 1 or more"),
        ((one(overlap=-0.5),), {}, "overlap=-0.5 is a fraction of a row: give 0 or more, below 1"),
        ((one(overlap=math.nan),), {}, "overlap=nan is a fraction of a row"),
        ((one(weights={}),), {}, r"stage 1 \(main\): weights={} names no source: give each one's share"),
        ((one(tokens=32), one(weights={"web": 1.5, "math": -0.5})), {}, r"stage 2 .*: weight -0.5 of source 'math'"),
        ((one(weights={"web": 0.0}),), {}, r"stage 1 \(main\): weights {'web': 0.0} sum to 0; they must sum to 1"),
        ((one(),), {"total_tokens": 0}, "total_tokens=0: give 1 or more"),
        ((one(),), {"steps": 0}, "steps=0: give 1 or more"),
    ],
)
def test_wrong_plans(stages, changes, said):
    with pytest.raises(UserError, match=said):
        plan_of(*stages, **({"steps": 10} | changes))


def test_one_source_needs_no_weights():
    plan = plan_of(one(weights=None), source_names=("web",), steps=3)
    assert plan.stages[0].weights == {"web": Fraction(1)}
    assert plan.sources_of(3).tolist() == [0] * 4


def test_needs_no_jax():
    code = "import sys, jaxtrain.plan; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
