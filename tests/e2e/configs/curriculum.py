"""The ten stages of configs/curriculum_smoke.py in about 27 steps, from the loopback Hub.

No stage is a whole number of batches or of checkpoint intervals. The argument is the path of the tokenizer's model, as
in tiny.py.
"""

import dataclasses

from configs import _curriculum
from jaxtrain.config import Config, EvalConfig
from tests.e2e.configs import tiny


def get_config(arg: str) -> Config:
    config = tiny.get_config(arg)
    config.data.sources = dict(zip(_curriculum.SOURCES, config.data.sources.values(), strict=True))
    config.stages = _curriculum.stages((8,) * 10, tokens_per_million=12)
    for stage, seq_len in zip(config.stages, (8, 16, 24, 32, 40, 48, 56, 64, 96, 128), strict=True):
        stage.seq_len = seq_len
    config.model = dataclasses.replace(config.model, max_seq_len=128)
    config.total_tokens = 12_000
    config.optimizer.schedule = _curriculum.schedule()
    config.checkpoint.every_steps = 3
    config.eval = EvalConfig(every_tokens=3000, tokens=1024, seq_len=32, batch_size=8)
    return config
