"""A config's step without the network: for tools that only plan or compile."""

import pathlib
from typing import Any

from jax.sharding import Mesh

from jaxtrain.config import Config
from jaxtrain.errors import TransientError, UserError
from jaxtrain.losses.cached import Layout
from jaxtrain.losses.divergences import TopK
from jaxtrain.trainer.session import make_components
from jaxtrain.trainer.step import StepComponents


def vocabulary(config: Config, given: int | None) -> tuple[int, str]:
    """(size of the vocabulary, where that is from): `given`, else the config, else the tokenizer's local files.

    Raises:
        UserError: if none of them gives it.
    """
    if given is not None:
        if given < 1:
            raise UserError(f"--vocab_size={given}: give 1 or more, the size of the tokenizer's vocabulary")
        return given, "--vocab_size"
    chosen: Any = config.tokenizer
    declared = getattr(chosen, "vocab_size", None)
    if declared is not None:
        return declared, "config.tokenizer.vocab_size"
    try:
        return chosen.build("").vocab_size, "the tokenizer's files"
    except (UserError, TransientError, OSError) as error:  # offline, the Hub's client raises an OSError
        raise UserError(
            f"the size of the vocabulary is not known ({str(error).splitlines()[0]}), and this command does not use "
            "the network: give --vocab_size=N"
        ) from error


def components(config: Config, vocab_size: int, mesh: Mesh, limit: int | None) -> StepComponents:
    """What the config's steps are made of, with a teacher known by its local config.json or checkpoint.

    Args:
        limit: the most bytes that a step may take on a device; None for no limit.

    Raises:
        UserError: for a mesh that does not fit the model, or a teacher whose config is not on this machine.
    """
    frozen, layout, teacher = None, None, config.teacher
    if teacher is not None and teacher.cache is not None:
        layout = teacher_layout(config, vocab_size)
    elif teacher is not None:
        try:
            frozen = teacher.outline(vocab_size, mesh)
        except (UserError, TransientError) as error:
            if teacher.is_checkpoint or pathlib.Path(teacher.model).is_dir():
                raise
            raise UserError(
                f"teacher.model={teacher.model}: its config.json is not on this machine, and this command does not use "
                "the network. Put that file into a folder, and give --config.teacher.model=FOLDER"
            ) from error
    return make_components(config, vocab_size, config.plan(), mesh, frozen, limit, layout)


def teacher_layout(config: Config, vocab_size: int) -> Layout:
    """The records of a teacher's cache for this config: tools.cache_teacher's defaults, or TopK's own k."""
    divergence = config.distillation.divergence
    k = divergence.k if isinstance(divergence, TopK) else TopK().k
    return Layout(vocab_size, min(k, vocab_size), (config.distillation.temperature,))
