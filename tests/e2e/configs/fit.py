"""The smallest run with every feature, two of its stages packed by best fit and one between them cut."""

from jaxtrain.config import Config
from tests.e2e.configs import tiny


def get_config(arg: str) -> Config:
    config = tiny.get_config(arg)
    config.stages[0].packing = config.stages[2].packing = "fit"
    return config
