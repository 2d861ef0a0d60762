import dataclasses
import logging

import pytest

from jaxtrain import cli
from jaxtrain.trainer import compatibility, session


@pytest.fixture(scope="module")
def finished():
    """(config, data of its last checkpoint), without the sources' records."""
    config = cli.load("configs/quickstart.py")
    return config, {"config": cli.to_json(config), "plan": config.plan().record(), "data_ended": False, "programs": []}


def test_a_run_is_complete_whatever_became_of_its_files(finished):
    config, saved = finished
    plan = config.plan()
    assert plan.last_step
    assert compatibility.is_complete(saved, config, plan, plan.last_step)
    logged = dataclasses.replace(config, log_every=config.log_every + 1)
    assert compatibility.is_complete(saved, logged, plan, plan.last_step)
    engine = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, engine="tokenizers"))
    assert compatibility.is_complete(saved, engine, plan, plan.last_step)
    assert not compatibility.is_complete(saved, config, plan, plan.last_step - 1)
    assert compatibility.is_complete({**saved, "data_ended": True}, config, plan, plan.last_step - 1)


@pytest.mark.parametrize("change", [{"seed": 7}, {"data": {}}, {"tokenizer": {}}])
def test_another_config_is_looked_at_in_full(finished, change):
    config, saved = finished
    plan = config.plan()
    if "data" in change:
        sources = dict.fromkeys(["other"], next(iter(config.data.sources.values())))
        change = {"data": dataclasses.replace(config.data, sources=sources)}
    elif "tokenizer" in change:
        change = {"tokenizer": dataclasses.replace(config.tokenizer, vocab_size=512)}
    other = dataclasses.replace(config, **change)
    assert not compatibility.is_complete(saved, other, plan, plan.last_step)


def test_a_window_that_is_left_open_is_the_checkpoints(finished):
    config, saved = finished
    assert config.data.shuffle_window is None
    assert compatibility.settled(config, None) is compatibility.settled(config, saved) is config
    old = {**saved["config"], "data": {**saved["config"]["data"], "shuffle_window": 512}}  # version 0.1 set it always
    assert compatibility.settled(config, {**saved, "config": old}).data.shuffle_window == 512
    own = dataclasses.replace(config, data=dataclasses.replace(config.data, shuffle_window=9))
    assert compatibility.settled(own, {**saved, "config": old}) is own


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--config=configs/1b.py", "--config.steps=40"], "--config.total_tokens=none fits"),
        (["--config=configs/270m_curriculum.py", "--config.steps=20"], "--config.scale_to=2621440 fits"),
        (["--config=configs/1b.py", "--config.steps=1000"], None),
        (["--config=configs/1b.py", "--config.steps=40", "--config.total_tokens=none"], None),
        (["--config=configs/1b.py"], None),
    ],
)
def test_a_run_that_ends_within_its_warmup_is_warned_of(flags, advice, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jaxtrain"), "propagate", True)
    config = cli.load(flags[0].removeprefix("--config="), flags[1:])
    session._warn_of_warmup(config, config.plan())
    assert bool(caplog.messages) == (advice is not None)
    if advice is not None:
        assert advice in caplog.text
        assert "ends the run within the warmup: the learning rate reaches only" in caplog.text
