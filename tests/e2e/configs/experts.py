"""configs/tiny.py with experts in its second layer. One micro-batch, since the load balance is a micro-batch's."""

import dataclasses

from jaxtrain.config import Config
from jaxtrain.model.experts import Experts
from jaxtrain.model.llama import LlamaConfig
from tests.e2e.configs import tiny


def get_config(arg: str) -> Config:
    config = tiny.get_config(arg)
    assert isinstance(config.model, LlamaConfig)
    experts = Experts(num_experts=4, experts_per_token=2, intermediate_size=32)
    model = dataclasses.replace(config.model, layers="1 global : 1 global experts", experts=experts)
    return dataclasses.replace(config, model=model, micro_batch_tokens=None)
