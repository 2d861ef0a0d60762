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
