"""Train language models from Hugging Face streams: stop anywhere, resume anywhere, the same tokens bit for bit.

    config = jaxtrain.load_config("configs/1b.py", "--config.optimizer.learning_rate=2e-4")
    jaxtrain.train(config, "runs/1b")

    model = jaxtrain.restore("runs/1b")
    print(jaxtrain.generate(model, ["Once upon a time"])[0])

The data path serves other training loops too, as Grain datasets whose state is exact and small: `documents` streams one
source, `batches` gives a config's packed rows. See docs/python.md.

`import jaxtrain` is immediate: JAX and the data libraries are imported by the functions that need them.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

if typing.TYPE_CHECKING:
    import grain

    from jaxtrain.config import Config
    from jaxtrain.interfaces import SourceConfig
    from jaxtrain.trainer.restored import Restored

__all__ = ["batches", "documents", "generate", "load_config", "restore", "train"]


def load_config(path: str, *overrides: str) -> Config:
    """Loads the config of a Python file, applies overrides, and checks it.

    Args:
        path: "configs/1b.py", or "configs/pretrain.py:small", where "small" is passed to `get_config`.
        *overrides: as on the command line, such as "--config.optimizer.learning_rate=2e-4".

    Raises:
        UserError: What has to change, with the field's path and the fix.
    """
    from jaxtrain import cli

    return cli.load(path, overrides)


def train(config: Config, workdir: str) -> int:
    """Trains in a work directory, resuming if it has a checkpoint, as `python -m jaxtrain.main` does.

    Args:
        config: from `load_config`, or built in Python.
        workdir: a local folder or a gs:// or s3:// URL.

    Returns:
        0 when the run is complete; 75 when SIGTERM or SIGINT stopped it after a checkpoint: call it again to continue.

    Raises:
        UserError: The user must change something.
        TransientError: An outage outlasted `data.retry_minutes`.
    """
    from jaxtrain import cli
    from jaxtrain.trainer import loop

    cli.check(config)
    return loop.run(config, workdir, dry_run=False)


def restore(workdir: str, step: int | None = None) -> Restored:
    """Restores model, tokenizer and parameters of a checkpoint. The checkpoint itself describes them.

    Args:
        workdir: a work directory.
        step: which checkpoint; None for the newest.

    Returns:
        An object with `step`, `model`, `params` (fp32, sharded over all devices), `tokenizer` and `add_bos`.

    Raises:
        UserError: There is no such checkpoint, or it is damaged.
    """
    from jaxtrain.trainer import restored

    return restored.restore(workdir, step)


def generate(
    restored: Restored,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Continues each prompt, up to the end-of-document token.

    Args:
        restored: from `restore`.
        prompts: texts to continue.
        max_new_tokens: the most tokens to add.
        temperature: 0 takes the most likely token.
        top_k: sample among the k most likely tokens; None for all.
        top_p: sample among the most likely tokens that together reach this probability.
        seed: the same seed gives the same text.
    """
    from jaxtrain.model.generate import continuation
    from jaxtrain.model.generate import generate as generate_ids

    tokenizer, prompts_ids = restored.tokenizer, [restored.prompt_ids(prompt) for prompt in prompts]
    texts = generate_ids(
        restored.model,
        restored.params,
        prompts_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_id=tokenizer.eos_id,
    )
    return [continuation(tokenizer, *each) for each in zip(prompts_ids, texts, strict=True)]


def documents(
    source: SourceConfig,
    shard: int = 0,
    num_shards: int = 1,
    *,
    name: str = "documents",
    seed: int = 0,
    shuffle: bool = True,
    shuffle_window: int = 512,
    holdout: float = 0.0,
    held_out: bool = False,
    epochs: int | None = 1,
    retry_minutes: float = 60.0,
) -> grain.IterDataset:
    """The documents of one shard of a source, as a Grain dataset with exact, JSON-small state.

    In every epoch, the shards are disjoint and together cover the source. Which documents a shard yields, in which
    order, depends only on the arguments. Outages delay but do not change the stream.

    Args:
        source: such as `HuggingFace(name="HuggingFaceFW/fineweb-edu")`, `WebDataset(...)` or `TextFiles(...)`.
        shard: which shard, 0 to num_shards - 1; usually the process's index.
        num_shards: how many shards there are; usually the number of processes.
        name: keys the shuffle and the holdout, like a source's name in a config.
        seed: of the shuffle.
        shuffle: permute files (or row groups) each epoch, and rows within windows; False keeps the files' order.
        shuffle_window: rows that are permuted together.
        holdout: the fraction of documents that is held out, 0 to below 1.
        held_out: yield the held-out documents instead of the others.
        epochs: number of times the source is read; None for no limit.
        retry_minutes: how long an outage may last.

    Returns:
        A `grain.IterDataset` of {"text": str, "file": str, "row": int}. Its iterators' `get_state` and `set_state` take
        JSON; map, filter, batch, mix, prefetch and Grain's Orbax handler work with it.

    Raises:
        UserError: While iterating: the source does not exist, or a state belongs to other documents.
        TransientError: While iterating: an outage outlasted `retry_minutes`.
    """
    from jaxtrain.data.documents import DocumentDataset
    from jaxtrain.data.pipeline import DataConfig

    config = DataConfig(
        sources={name: source},
        num_lanes=num_shards,
        shuffle=shuffle,
        shuffle_window=shuffle_window,
        holdout=holdout,
        retry_minutes=retry_minutes,
    )
    return DocumentDataset(config, shard=shard, seed=seed, held_out=held_out, epochs=epochs)


def batches(
    config: Config, *, workdir: str | None = None, step: int = 0, shard: int = 0, num_shards: int = 1
) -> grain.IterDataset:
    """The packed batches that a config trains on, as a Grain dataset with exact state.

    The rows are those of `train`, bit for bit: shuffled, packed and mixed, through every stage of a curriculum.

    Args:
        config: from `load_config`, or built in Python. Model, optimizer and mesh do not matter here.
        workdir: the folder with the run's tokenizer, token stores, caches and checkpoints; required if the config
            trains its tokenizer.
        step: the last step already done: the first batch is that of `step` + 1. Reading begins at the work directory's
            newest checkpoint up to `step`; without one, all earlier batches are read and dropped.
        shard: the part of every batch's rows to yield, 0 to num_shards - 1.
        num_shards: number of parts; it must divide `data.num_lanes`. Part i has rows [i * B / n, (i + 1) * B / n).

    Returns:
        A `grain.IterDataset` of dicts of NumPy arrays [B / num_shards, T]: tokens, targets, segment_ids and positions
        (int32) and loss_mask (bool), to the end of the config's plan. Shapes change with the stage.

    Raises:
        UserError: The user must change something, or a state given to `set_state` belongs to other batches.
        TransientError: While iterating: an outage outlasted `data.retry_minutes`.
    """
    from jaxtrain.trainer.batches import BatchDataset

    return BatchDataset(config, workdir=workdir, step=step, shard=shard, num_shards=num_shards)
