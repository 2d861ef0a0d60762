"""The whole run as a pure function: step → stage, shapes, learning rate, source of every row, token counts.

A plan depends only on the config, never on the hardware. It is built once and has no state. Steps count from 1. Tokens
are batch size × sequence length, as Python integers. Never imports JAX.
"""

from jaxtrain.plan.build import CROSS_ENTROPY_ALONE, build_plan
from jaxtrain.plan.plan import Plan, StagePlan, StepPlan
from jaxtrain.plan.stages import Stage
