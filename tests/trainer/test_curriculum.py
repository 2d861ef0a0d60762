"""The ten-stage configs: the table as specified, shares at every step, functions of tokens, and mistakes."""

import itertools
import pathlib

import numpy as np
import pytest

from jaxtrain import cli
from jaxtrain.config import Config
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.errors import UserError
from jaxtrain.plan import Plan
from tests.plan.test_plan import CURRICULUM, last_step

CONFIGS = {"configs/270m_curriculum.py": 10**6, "configs/curriculum_smoke.py": 500}  # tokens of the table's million


@pytest.fixture(autouse=True)
def repository_root(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)


def load(path: str, *flags: str) -> Config:
    config = cli.load(path, [f"--config.{flag}" for flag in flags])
    assert isinstance(config, Config)
    return config


@pytest.fixture(scope="module")
def full(request) -> Config:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        return load("configs/270m_curriculum.py")


@pytest.mark.parametrize("path", CONFIGS)
def test_stages_are_the_table(path):
    config, million = load(path), CONFIGS[path]
    for stage, (name, seq_len, millions, shares) in zip(config.stages, CURRICULUM, strict=True):
        assert (stage.name, stage.seq_len, stage.tokens) == (name, seq_len, millions * million)
        assert stage.weights == {
            source: share / 100 for source, share in zip(("web", "math", "code"), shares, strict=True)
        }
        assert stage.overlap == 0.5
        assert stage.batch_size is not None
        assert stage.batch_size % 8 == stage.batch_size % config.data.num_lanes == 0
    plan = config.plan()
    assert config.total_tokens == plan.total_tokens == plan.at(last_step(plan)).tokens_after == 1000 * million
    # Every stage is long enough for its batches: at least eight of them.
    assert all(stage.batches_before(last_step(plan) + 1) >= 8 for stage in plan.stages)


def test_270m(full):
    model = full.model.build(49_152, None)
    assert model.num_params == 270_576_640
    names = {name: source.name for name, source in full.data.sources.items() if isinstance(source, HuggingFace)}
    assert names == {
        "web": "HuggingFaceFW/fineweb-edu",
        "math": "Yxanul/cc-math-finest",
        "code": "Yxanul/python-finest-pretrain",
    }
    # At most 0.7% of a stage's tokens go to the batch before it.
    for before, stage in itertools.pairwise(full.stages):
        assert before.batch_size * before.seq_len < 0.007 * stage.tokens


@pytest.mark.parametrize("path", CONFIGS)
def test_shares_are_within_one_row_at_every_step(path):
    plan = load(path).plan()
    for stage in plan.stages:
        assert stage.last_step is not None
        batches = stage.last_step - stage.first_step + 1
        weights = np.array([float(weight) for weight in stage.weights.values()])
        rows = np.array([stage.mix.counts_after(batch) for batch in range(batches + 1)])
        shares = np.arange(batches + 1)[:, None] * stage.batch_size * weights
        assert np.abs(rows - shares).max() < 1
        # At the stage's end by the plan's counts: in the last stage, where the last batch is cut.
        given = plan.source_tokens_before(stage.last_step + 1) - plan.source_tokens_before(stage.first_step)
        tokens = plan.at(stage.last_step).tokens_after - stage.first_token
        given = given[[plan.source_names.index(name) for name in stage.weights]]
        assert given.sum() == tokens
        assert (np.abs(given - weights * tokens) < stage.seq_len).all()


def halved(plan_of: Config) -> Plan:
    flags = [f"stages[{i}].batch_size={(stage.batch_size or 0) // 2}" for i, stage in enumerate(plan_of.stages)]
    return load("configs/270m_curriculum.py", "data.num_lanes=16", *flags).plan()


def test_the_learning_rate_follows_tokens_not_steps(full):
    """Half the batch sizes, twice the steps: the same rate at the same token, and the same area under the curve."""
    plans = full.plan(), halved(full)
    assert last_step(plans[1]) == pytest.approx(2 * last_step(plans[0]), abs=10)
    areas = []
    for plan in plans:
        steps = [plan.at(step) for step in range(1, last_step(plan) + 1)]
        areas.append(sum(at.learning_rate * (at.tokens_after - at.tokens_before) for at in steps))
        peak = [at for at in steps if at.learning_rate == 6e-4]
        # Warmup is the first 10 million tokens, the decay the last 200.
        assert peak[0].tokens_before == pytest.approx(10_000_000, abs=262_144)
        assert peak[-1].tokens_after == pytest.approx(800_000_000, abs=262_144)
    assert areas[0] == pytest.approx(areas[1], rel=1e-5)


def test_evaluation_follows_tokens_not_steps(full):
    """One per 25 million tokens: at the step that reaches or passes them, wherever a run resumes."""
    for plan in (full.plan(), halved(full)):
        steps = [plan.at(step) for step in range(1, last_step(plan) + 1)]
        due = [at for at in steps if full.eval.due(at)]
        assert len(due) == 40
        for number, at in enumerate(due, 1):
            assert at.tokens_before < number * 25_000_000 <= at.tokens_after
        assert due[-1] == steps[-1]
    full_step = full.plan().at(100)
    often = load("configs/270m_curriculum.py", "eval.every_tokens=1000")
    assert often.eval.due(full_step)  # several multiples in one step are one evaluation
    by_steps = load("configs/270m_curriculum.py", "eval.every_tokens=none", "eval.every_steps=50").eval
    assert by_steps.due(full_step)
    assert not by_steps.due(full.plan().at(101))
    assert not load("configs/270m_curriculum.py", "eval.every_tokens=none").eval.is_on


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["stages[8].seq_len=4096"], "stage 9 (Expert Reasoning): seq_len=4096 is longer than model.max_seq_len=2048"),
        (
            ["stages[2].weights.math=0.5"],
            "stage 3 (Paragraphs): weights {'web': 0.9, 'math': 0.5, 'code': 0.02} sum to 1.42; they must",
        ),
        (
            ["stages[1].weights.maths=0.05"],
            "stage 2 (Sentences): weights: there is no source 'maths' in data.sources; did you mean math?",
        ),
        (["stages[3].tokens=0"], "stage 4 (Extended Context): tokens=0: give 1 or more"),
        (["stages[3].seq_len=-1"], "stage 4 (Extended Context): seq_len=-1: give 1 or more"),
        (
            ["stages[5].weights.web=-0.75"],
            "stage 6 (Complex Patterns): weight -0.75 of source 'web': a weight is 0, or",
        ),
        (["stages[0].batch_size=8"], "stage 1 (Basic Patterns): batch_size=8 is not a multiple of data.num_lanes=32"),
        (
            ["stages[4].overlap=1"],
            "stage 5 (Reasoning Development): overlap=1.0 is a fraction of a row: give 0 or more, below 1",
        ),
        (
            ["stages[3].tokens=41000000"],
            "=1,000,000,000, but the stages' tokens sum to 1,001,000,000: give scale_to=1000000000 instead",
        ),
        (
            ["total_tokens=none", "stages[2].tokens=15000", "stages[1].batch_size=8192"],
            "stage 3 (Paragraphs): its 15,000 tokens are never reached: stage 2 (Sentences) ends with a whole batch "
            "of 8,192 rows of 16 tokens, which overshoots by 15,488; give stage 3 more than 15,488 tokens",
        ),
        (["eval.every_steps=50"], "every_steps=50 and every_tokens=25000000: give one of them"),
        (["eval.every_tokens=0"], "every_tokens=0: give 1 or more"),
        (["data.holdout=0"], "eval.every_tokens=25000000 needs held-out documents: set data.holdout"),
        (["micro_batch_tokens=1024"], "a row of stage 9 (Expert Reasoning) has 1536 tokens"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_name_the_stage_and_the_fix(flags, words):
    with pytest.raises(UserError) as refused:
        load("configs/270m_curriculum.py", *flags)
    assert words in str(refused.value)


def test_all_configs_load():
    """The configs of the folder, with their checks and plans; `_*.py` files are shared code."""
    paths = sorted(path.as_posix() for path in pathlib.Path("configs").glob("[!_]*.py"))
    assert len(paths) >= 8
    for path in paths:
        assert load(path).plan().at(1).tokens_after > 0
