"""One epoch of one source, to its last document: only the data ends the run."""

from jaxtrain.config import Config
from jaxtrain.plan import Stage
from jaxtrain.plan.schedules import Constant
from tests.e2e.configs import tiny


def get_config(arg: str) -> Config:
    config = tiny.get_config(arg)
    config.data.sources = {"wiki": config.data.sources["wiki"]}
    config.data.holdout = 0.0
    config.eval.every_steps = None
    config.stages = (Stage(seq_len=16, batch_size=8),)
    config.total_tokens, config.epochs = None, 1
    config.optimizer.schedule = Constant()
    config.log_every = 7
    return config
