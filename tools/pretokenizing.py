"""What `tools.pretokenize` does, once its command line is understood."""

import contextlib
import os
from collections.abc import Mapping

from tqdm import tqdm

from jaxtrain.checkpoint import checkpoints
from jaxtrain.config import Config
from jaxtrain.data import pipeline
from jaxtrain.data.stores import token_store, token_store_writer
from jaxtrain.data.stores.token_store_writer import Job
from jaxtrain.interfaces import Json, Source, Tokenizer
from jaxtrain.tokenizers.training import TrainTokenizer
from jaxtrain.trainer import open_data


def write(config: Config, workdir: str, output: str, worker: int, workers: int) -> None:
    """This worker's part of the stores of all sources. Raises UserError, TransientError, CorruptError."""
    begun = {name: token_store_writer.planned(os.path.join(output, name)) for name in config.data.sources}
    known = {name: manifest.source for name, manifest in begun.items() if manifest is not None}
    sources = pipeline.resolve(config.data, identities(config, workdir, known))
    tokenizer = tokenizer_of(config, workdir, sources)
    for name, source in sources.items():
        folder = os.path.join(output, name)
        bound = config.data.sources[name].max_samples
        if worker and bound is not None and not source.random_access:
            print(
                f"Source {name}: worker 0 does it alone, as only reading tells which files hold the first {bound:,} "
                "documents.",
                flush=True,
            )
        job = Job(name, folder, config.data.sources[name], source, 60 * config.data.retry_minutes)
        with tqdm(desc=f"Pretokenizing {name}", unit=" documents", unit_scale=True, disable=None) as bar:
            total = 0

            def progress(documents: int, tokens: int, bar: tqdm = bar) -> None:
                nonlocal total
                total += tokens
                bar.set_postfix_str(f"{total / 1e6:,.1f}M tokens", refresh=False)
                bar.update(documents)

            complete = token_store_writer.write(job, tokenizer, worker, workers, progress)
        if complete:
            print(f"Source {name}: {_described(folder)} Read it by data.mode=pretokenized or auto.", flush=True)
        else:
            print(f"Source {name}: this worker's files are done, others' are not yet.", flush=True)


def verify(config: Config, output: str) -> None:
    """Raises UserError for a store that is not whole."""
    for name in config.data.sources:
        token_store.verify(os.path.join(output, name))
        print(
            f"Source {name}: {_described(os.path.join(output, name))} All bytes are as they were written.", flush=True
        )


def _described(folder: str) -> str:
    files = token_store.load(folder).files
    rows, tokens, size = (sum(getattr(file, field) for file in files) for field in ("rows", "tokens", "size"))
    return f"{rows:,} documents, {tokens:,} tokens, {size / 1e9:.3f} GB in {folder}."


def identities(config: Config, workdir: str, begun: Mapping[str, Json]) -> dict[str, Json]:
    """What the sources are known to be: in the run's checkpoint, or else where a worker has begun."""
    found: dict[str, Json] = {name: {"source": source} for name, source in begun.items()}
    if checkpoints.is_checkpoint(workdir):
        found |= open_data.known_sources(config, checkpoints.load_data(workdir)) or {}
    return found


def tokenizer_of(config: Config, workdir: str, sources: dict[str, Source]) -> Tokenizer:
    """The config's tokenizer, trained on these sources if it is the config's own and not yet made."""
    plan = config.plan()
    with contextlib.ExitStack() as reading:
        readers = []
        if isinstance(config.tokenizer, TrainTokenizer) and config.tokenizer.needs_training(workdir):
            readers = config.data.build(sources, seed=config.seed)
            for reader in readers:
                reading.callback(reader.close)
        return open_data.tokenizer_for_tool(config, workdir, readers, plan)
