"""Rules that span several components of a config."""

import pytest

from jaxtrain import cli
from jaxtrain.errors import UserError

ENDLESS = ["--config.steps=none", "--config.optimizer.schedule.warmup_fraction=0"]


@pytest.fixture(autouse=True)
def repository_root(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)


def test_a_source_without_an_end_needs_a_bound():
    with pytest.raises(UserError) as refused:
        cli.load("configs/quickstart.py", ENDLESS)
    said = str(refused.value)
    assert "max_samples MUST be specified for streaming datasets!" in said
    for part in ("python would be read forever", "data.sources.python.max_samples", "1,000 to 10,000", "10M to 100M"):
        assert part in said
    for bound in ("total_tokens", "steps", "epochs", 'How to choose max_samples" in docs/data.md'):
        assert bound in said


@pytest.mark.parametrize("bound", ["total_tokens=100000", "stages[0].tokens=100000"])
def test_any_bound_will_do(bound):
    cli.load("configs/quickstart.py", [*ENDLESS, f"--config.{bound}"])
    cli.load("configs/quickstart.py", [])  # steps


def test_max_samples_bound_a_source_but_say_not_how_often_it_is_read():
    bounded = [*ENDLESS, "--config.data.sources.python.max_samples=100"]
    with pytest.raises(UserError, match=r"nothing bounds the run: .* 1 ends it after each source's max_samples"):
        cli.load("configs/quickstart.py", bounded)


def test_the_watchdog_leaves_an_outage_its_time():
    with pytest.raises(
        UserError, match=r"monitor.watchdog_minutes=90 would stop the run before data.retry_minutes=120"
    ):
        cli.load("configs/quickstart.py", ["--config.data.retry_minutes=120"])
    cli.load("configs/quickstart.py", ["--config.data.retry_minutes=120", "--config.monitor.watchdog_minutes=none"])


def test_a_teacher_can_be_given_to_any_config():
    plain = cli.load("configs/quickstart.py", [])
    assert (plain.plan().at(1).ce_weight, plain.plan().at(1).kd_weight) == (1, 0)
    flags = ["--config.teacher.model=someone/model", "--config.distillation.kd_weight=0.8"]
    at = cli.load("configs/quickstart.py", flags).plan().at(1)
    assert (at.ce_weight, at.kd_weight) == (0.5, 0.8)
    with pytest.raises(UserError, match=r"teacher\.model=\./quickstart: there is no such folder"):
        cli.load("configs/quickstart.py", ["--config.teacher.model=./quickstart"])
    with pytest.raises(UserError, match=r"teacher.*model=''"):
        cli.load("configs/quickstart.py", ["--config.teacher.dtype=float32"])


@pytest.mark.parametrize(
    "spec", ["distill.py", "distill_smoke.py", "distill_smoke.py:teacher", "distill_smoke.py:alone"]
)
def test_distillation_configs(spec):
    config = cli.load(f"configs/{spec}", [])
    assert (config.teacher is None) == (":" in spec)
    assert config.plan().last_step


@pytest.mark.parametrize(
    ("spec", "total", "active"), [("moe_smoke.py", 4.1e6, 1.6e6), ("qwen3_moe_small.py", 6.45e9, 0.97e9)]
)
def test_configs_with_experts(spec, total, active):
    config = cli.load(f"configs/{spec}", [])
    model = config.model.build(config.tokenizer.vocab_size, None)
    assert model.num_params == pytest.approx(total, rel=0.02)
    assert model.num_active_params == pytest.approx(active, rel=0.02)
    assert config.plan().last_step


def test_one_field_scales_all_stages():
    base, half = (cli.load("configs/curriculum_smoke.py", flags) for flags in ([], ["--config.scale_to=250_000"]))
    (whole, scaled) = (config.plan() for config in (base, half))
    assert (whole.total_tokens, scaled.total_tokens, scaled.horizon) == (500_000, 250_000, 250_000)
    ends = [stage.last_token for stage in scaled.stages]
    for before, after, batch in zip(whole.stages, ends, scaled.stages, strict=True):
        assert abs(before.last_token / 2 - after) <= batch.batch_size * batch.seq_len
    # A last stage that takes the rest is scaled with total_tokens.
    rest = ["--config.stages[9].tokens=none", "--config.scale_to=250_000"]
    assert [stage.last_token for stage in cli.load("configs/curriculum_smoke.py", rest).plan().stages] == ends
    with pytest.raises(UserError, match="give those of the last stage too"):
        cli.load("configs/curriculum_smoke.py", [*rest, "--config.total_tokens=none"])


def test_an_evaluation_has_rows_for_each_source():
    config = cli.load("configs/curriculum_smoke.py", ["--config.eval.source_tokens=4000"])
    plans = config.eval.plans(config.plan(), config.data.num_lanes)
    assert {name: plan.source_names for name, plan in plans.items()} == {
        "": ("web", "math", "code"),
        **{name: (name,) for name in ("web", "math", "code")},
    }
    assert [plan.total_tokens for plan in plans.values()] == [16_384, 4000, 4000, 4000]
    assert len({(plan.stages[0].batch_size, plan.stages[0].seq_len) for plan in plans.values()}) == 1  # one program
    config.eval.source_tokens = None
    assert config.eval.plans(config.plan(), config.data.num_lanes)["web"].total_tokens == 16_384 // 3
    config.eval.source_tokens = 0
    assert list(config.eval.plans(config.plan(), config.data.num_lanes)) == [""]
    one = cli.load("configs/quickstart.py")
    assert list(one.eval.plans(one.plan(), one.data.num_lanes)) == [""]


def test_an_evaluation_packs_rows_as_the_last_stage_unless_told():
    config = cli.load("configs/curriculum_smoke.py", ["--config.stages[9].packing=fit", "--config.stages[9].overlap=0"])
    assert config.eval.plan(config.plan(), config.data.num_lanes).stages[0].packing == "fit"
    config.eval.packing = "concat"
    assert config.eval.plan(config.plan(), config.data.num_lanes).stages[0].packing == "concat"
