"""What a plan needs of tokenizer and teacher where nothing may be asked: for tools that run without the network."""

import pathlib
from typing import Any

from jax.sharding import Mesh

from jaxtrain.config import Config
from jaxtrain.distill import teacher
from jaxtrain.errors import TransientError, UserError
from jaxtrain.losses.cached import Layout
from jaxtrain.losses.divergences import TopK


def vocabulary(config: Config, given: int | None) -> tuple[int, str]:
    """(ids, where that is from): what is given, what the config says, or what files on this machine say.

    Raises UserError where none of them tells.
    """
    if given is not None:
        if given < 1:
            raise UserError(f"--vocab_size={given}: give the number of the tokenizer's ids")
        return given, "--vocab_size"
    chosen: Any = config.tokenizer
    declared = getattr(chosen, "vocab_size", None)
    if declared is not None:
        return declared, "config.tokenizer.vocab_size"
    try:
        return chosen.build("").vocab_size, "the tokenizer's files"
    except (UserError, TransientError, OSError) as error:  # the Hub's client raises an OSError where it is offline
        raise UserError(
            f"the size of the vocabulary is not known ({str(error).splitlines()[0]}), and this asks no network: give "
            "--vocab_size=N, the number of the tokenizer's ids"
        ) from error


def outlined_teacher(config: Config, vocab_size: int, mesh: Mesh) -> teacher.Frozen | None:
    """The config's teacher by its own config.json or checkpoint; None without one, or if a cache takes its place.

    Raises UserError.
    """
    if config.teacher is None or config.teacher.cache is not None:
        return None
    try:
        return config.teacher.outline(vocab_size, mesh)
    except (UserError, TransientError) as error:
        if config.teacher.is_checkpoint or pathlib.Path(config.teacher.model).is_dir():
            raise
        raise UserError(
            f"teacher.model={config.teacher.model}: its config.json is not on this machine, and this asks no network. "
            "Put that file into a folder, and give --config.teacher.model=FOLDER"
        ) from error


def outlined_layout(config: Config, vocab_size: int) -> Layout | None:
    """The records of the teacher's cache that the config wants, which need not be written yet; None without one."""
    if config.teacher is None or config.teacher.cache is None:
        return None
    return layout_of(config, vocab_size)


def layout_of(config: Config, vocab_size: int) -> Layout:
    """Of a cache for this config: what tools.cache_teacher writes by default, or TopK's own k."""
    divergence = config.distillation.divergence
    k = divergence.k if isinstance(divergence, TopK) else TopK().k
    return Layout(vocab_size, min(k, vocab_size), (config.distillation.temperature,))
