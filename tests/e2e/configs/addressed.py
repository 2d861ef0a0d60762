"""One source behind the address in the environment variable ADDRESS."""

import os

from jaxtrain.config import Config
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.plan import Stage
from tests.e2e.configs import tiny


def get_config(arg: str) -> Config:
    config = tiny.get_config(arg)
    config.data.sources = {"web": HuggingFace(name="parquet", data_files=(os.environ["ADDRESS"],), fetch_rows=16)}
    config.data.retry_minutes = 0.03
    config.eval.every_steps = None
    config.stages = (Stage(seq_len=16, batch_size=8),)
    config.total_tokens = 16 * 8 * 40
    return config
