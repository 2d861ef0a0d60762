"""One stage on the loopback Hub's `spikes/web`, some of whose documents are poison; spikes are found soon.

The argument is the path of the tokenizer's model, as in tiny.py.
"""

import dataclasses

from jaxtrain.config import Config
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.plan import Stage
from jaxtrain.plan.schedules import Constant
from tests.e2e.configs import tiny


def get_config(arg: str) -> Config:
    config = tiny.get_config(arg)
    config.data.sources = {"web": HuggingFace(name="spikes/web")}
    config.data.holdout = 0.0
    config.eval.every_steps = None
    config.stages = (Stage(seq_len=32, batch_size=16),)
    config.total_tokens = 32 * 16 * 60
    config.optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-2, schedule=Constant())
    config.micro_batch_tokens = None
    config.spike_threshold, config.spike_window = 20.0, 16
    return config
