import dataclasses

import pytest

from jaxtrain import cli
from jaxtrain.trainer import compatibility


@pytest.fixture(scope="module")
def finished():
    """(config, data of its last checkpoint), without the sources' records."""
    config = cli.load("configs/quickstart.py")
    return config, {"config": cli.to_json(config), "plan": config.plan().record(), "data_ended": False}


def test_a_run_is_complete_whatever_became_of_its_files(finished):
    config, saved = finished
    plan = config.plan()
    assert plan.last_step
    assert compatibility.is_complete(saved, config, plan, plan.last_step)
    logged = dataclasses.replace(config, log_every=config.log_every + 1)
    assert compatibility.is_complete(saved, logged, plan, plan.last_step)
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
