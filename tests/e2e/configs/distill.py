"""configs/tiny.py with a smaller student and a teacher, set by `--config.teacher.model=`.

Three stages, a changing mix, accumulation, document masks. The divergence fades in and the cross-entropy fades out.
"""

import dataclasses

from jaxtrain.config import Config
from jaxtrain.losses.distillation import Distillation
from jaxtrain.losses.divergences import TopK
from jaxtrain.plan.schedules import Constant, Linear
from tests.e2e.configs import tiny


def get_config(arg: str) -> Config:
    config = tiny.get_config(arg)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, hidden_size=16, intermediate_size=32, num_heads=2, num_kv_heads=1),
        distillation=Distillation(
            divergence=TopK(k=20),
            temperature=1.5,
            ce_schedule=Linear(final_fraction=0.2),
            kd_schedule=Constant(warmup_fraction=0.3),
        ),
    )
