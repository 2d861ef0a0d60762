"""A mixture of experts in minutes on a laptop's CPU, without a network: quickstart.py, but in every other layer a token
uses 2 of 8 experts.

Look at `expert_load_max`, `expert_load_min` and `router_entropy` in metrics.jsonl.
"""

import dataclasses

from configs import quickstart
from jaxtrain.config import Config
from jaxtrain.model.experts import Experts
from jaxtrain.model.llama import LlamaConfig


def get_config(arg: str = "") -> Config:
    config = quickstart.get_config(arg)
    assert isinstance(config.model, LlamaConfig)
    model = dataclasses.replace(
        config.model,
        layers="1 global : 1 global experts",
        experts=Experts(num_experts=8, experts_per_token=2, intermediate_size=256),
    )
    return dataclasses.replace(config, model=model)
