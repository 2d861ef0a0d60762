"""One stage on tar shards, through a disk cache. The argument is "TOKENIZER|PATTERN|GB of the cache"."""

from jaxtrain.config import Config
from jaxtrain.data.sources.webdataset import WebDataset
from jaxtrain.plan import Stage
from jaxtrain.plan.schedules import Constant
from tests.e2e.configs import tiny


def get_config(arg: str) -> Config:
    model, pattern, limit = arg.split("|")
    config = tiny.get_config(model)
    config.data.sources = {"shards": WebDataset(urls=(pattern,))}
    config.data.max_disk_gb = float(limit)
    config.data.holdout = 0.0
    config.eval.every_steps = None
    config.stages = (Stage(seq_len=32, batch_size=8),)
    config.total_tokens = 24 * 8 * 32
    config.optimizer.schedule = Constant()
    return config
