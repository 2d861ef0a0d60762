"""`bench step --distill`: a distillation step against the student's step and the teacher's forward pass, in turns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.interfaces import Json
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.losses.distillation import Distillation
from jaxtrain.model.llama import LlamaConfig
from tools.bench.common import Spent, cpus, in_turns, median, progress, short, walls
from tools.bench.jax_step import JaxStep, Size, memory

# For memory: SmolLM2's and four times that. Below 32,768, chunk arrays grow with the vocabulary (see Distillation).
VOCABULARIES = (49_152, 196_608)


def compare(size: Size, teacher_times: int, rounds: int) -> Json:
    """Measures the three times and the memory at two vocabulary sizes.

    Args:
        size: The student and its batch.
        teacher_times: Factor of the teacher's width, layers and heads over the student's.
        rounds: Number of measurements.

    Returns:
        The times, `over_both` (distillation step over the sum of the others), and the memory.
    """
    teacher = _teacher(size.model, teacher_times)
    student, distilled = JaxStep(size), JaxStep(size, teacher=teacher)
    forward = _forward(distilled, size)
    runs = {"distilled": distilled.run, "student": student.run, "teacher_forward": forward}
    for name, run in runs.items():
        run()
        progress(f"{name}: ready")
    spent = in_turns(runs, rounds)
    found: Json = {
        name: {"seconds": median(walls(one)), "cpu_seconds": median(cpus(one))} for name, one in spent.items()
    }
    found["over_both"] = {kind: _over_both(spent, kind) for kind in ("wall", "cpu")}
    assert distilled.teacher is not None
    found["parameters"] = {"student": student.model.num_params, "teacher": distilled.teacher.num_params}
    found["loss_memory"] = [_loss_memory(size, teacher.hidden_size, vocab_size) for vocab_size in VOCABULARIES]
    found["step_memory"] = {"student": student.memory(), "distilled": distilled.memory()}
    return found


def _teacher(student: LlamaConfig, times: int) -> LlamaConfig:
    wider = {
        name: times * getattr(student, name)
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
    }
    return dataclasses.replace(student, remat="none", **wider)


def _forward(step: JaxStep, size: Size) -> Any:
    """Compiles the teacher's forward pass: hidden states, and log-probabilities of the targets in the same chunks."""
    model, ((params, *_),) = step.teacher, step.teaching
    assert model is not None
    loss = CrossEntropy().build(size.vocab_size, model.mesh)

    @jax.jit
    def forward(params: Any, batch: Any) -> jax.Array:
        x_BTD = model.hidden(params, batch["tokens"], batch["segment_ids"], batch["positions"]).x
        return loss(x_BTD, model.head(params), batch["targets"], batch["loss_mask"])["loss"]

    return lambda: jax.block_until_ready(forward(params, step.batch))


def _over_both(spent: dict[str, list[Spent]], kind: str) -> Json:
    """Returns median and minimum over the rounds. (Other load can only add time.)"""
    rounds = zip(spent["distilled"], spent["student"], spent["teacher_forward"], strict=True)
    ratios = [getattr(a, kind) / (getattr(b, kind) + getattr(c, kind)) for a, b, c in rounds]
    least = {name: min(getattr(one, kind) for one in all_rounds) for name, all_rounds in spent.items()}
    return {
        "median": median(ratios),
        "of_the_fastest": short(least["distilled"] / (least["student"] + least["teacher_forward"])),
    }


def _loss_memory(size: Size, teacher_size: int, vocab_size: int) -> Json:
    """Returns MB of temporaries of the loss and its gradient, and of the heads (with the student's fp32 gradient)."""
    width, dtype = size.model.hidden_size, jnp.dtype(size.model.dtype)
    rows = (size.batch_size, size.seq_len)
    loss = Distillation().build(vocab_size, None, CrossEntropy())
    shapes = [((*rows, width), dtype), ((width, vocab_size), jnp.float32), ((*rows, teacher_size), dtype)]
    shapes += [((teacher_size, vocab_size), dtype), (rows, jnp.int32), (rows, jnp.bool_)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    weights = [jax.ShapeDtypeStruct((), jnp.float32)] * 2
    function = jax.value_and_grad(lambda *arrays: loss(*arrays)["loss"], (0, 1))
    compiled = jax.jit(function).lower(*arguments, *weights).compile()
    heads = vocab_size * (width * (4 + 4) + teacher_size * dtype.itemsize)
    return {"vocab_size": vocab_size, "temporaries_mb": memory(compiled)["temporaries_mb"], "heads_mb": heads / 1e6}
