"""Builds a config's step without network access, for tools that only plan or compile."""

import pathlib
from typing import Any

from jax.sharding import Mesh

from jaxtrain.config import Config
from jaxtrain.errors import TransientError, UserError
from jaxtrain.losses.cached import Layout
from jaxtrain.losses.divergences import ULD, TopK
from jaxtrain.trainer.session import make_components
from jaxtrain.trainer.step import StepComponents


def vocabulary(config: Config, vocab_size: int | None) -> tuple[int, str]:
    """Finds the vocabulary size: `vocab_size` if given, else from the config, else from the tokenizer's local files.

    Returns:
        (vocabulary size, description of where it is from).

    Raises:
        UserError: none of them determines it.
    """
    if vocab_size is not None:
        if vocab_size < 1:
            raise UserError(f"--vocab_size={vocab_size}: give 1 or more, the size of the tokenizer's vocabulary")
        return vocab_size, "--vocab_size"
    chosen: Any = config.tokenizer
    declared = getattr(chosen, "vocab_size", None)
    if declared is not None:
        return declared, "config.tokenizer.vocab_size"
    try:
        return chosen.build("").vocab_size, "the tokenizer's files"
    except (UserError, TransientError, OSError) as error:  # the Hub's client raises OSError when offline
        raise UserError(
            f"the size of the vocabulary is not known ({str(error).splitlines()[0]}), and this command does not use "
            "the network: give --vocab_size=N"
        ) from error


def components(config: Config, vocab_size: int, mesh: Mesh, limit: int | None) -> StepComponents:
    """Builds the components of the config's steps. A teacher is built from its local config.json or checkpoint.

    Args:
        config: the run's config.
        vocab_size: number of ids.
        mesh: the device mesh.
        limit: bytes that a step may use on a device; None for no limit.

    Raises:
        UserError: the mesh does not fit the model, or the teacher's config is not available locally.
    """
    frozen, stored, teacher = None, None, config.teacher
    if teacher is not None and teacher.cache is not None:
        stored = teacher_layout(config, vocab_size), None
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
    return make_components(config, vocab_size, config.plan(), mesh, frozen, limit, stored)


def teacher_layout(config: Config, vocab_size: int) -> Layout:
    """Record layout of a teacher cache for this config, if the teacher has the run's tokenizer: tools.cache_teacher's
    default k, or the divergence's."""
    divergence = config.distillation.divergence
    k = divergence.k if isinstance(divergence, TopK | ULD) else TopK().k
    return Layout(vocab_size, min(k, vocab_size), (config.distillation.temperature,))
