"""Writes and verifies the token stores of a config's sources."""

import os

from tqdm import tqdm

from jaxtrain.config import Config
from jaxtrain.data.stores.token_store import TokenManifest
from jaxtrain.data.stores.writer import Job, write_tokens
from jaxtrain.trainer import open_data


def write(config: Config, workdir: str, output: str, worker: int, workers: int) -> None:
    """Writes this worker's share of all sources. Raises UserError, TransientError or CorruptError."""
    sources, tokenizer = open_data.for_writing(config, workdir, TokenManifest, output)
    for name, source in sources.items():
        folder = os.path.join(output, name)
        bound = config.data.sources[name].max_samples
        if worker and bound is not None and not source.random_access:
            print(
                f"Source {name}: worker 0 works alone: which files hold the first {bound:,} documents is known only "
                "after reading them.",
                flush=True,
            )
        job = Job(name, folder, config.data.sources[name], source, tokenizer, 60 * config.data.retry_minutes)
        with tqdm(desc=f"Pretokenizing {name}", unit=" documents", unit_scale=True, disable=None) as bar:
            total = 0

            def progress(documents: int, tokens: int, bar: tqdm = bar) -> None:
                nonlocal total
                total += tokens
                bar.set_postfix_str(f"{total / 1e6:,.1f}M tokens", refresh=False)
                bar.update(documents)

            complete = write_tokens(job, worker, workers, progress)
        if complete:
            print(f"Source {name}: {_summary(folder)} Read it with data.mode=pretokenized or auto.", flush=True)
        else:
            print(f"Source {name}: this worker is done with its files; other workers are not.", flush=True)


def verify(config: Config, output: str) -> None:
    """Verifies the checksums of every store. Raises UserError if one is incomplete or damaged."""
    for name in config.data.sources:
        folder = os.path.join(output, name)
        TokenManifest.verify(folder)
        print(f"Source {name}: {_summary(folder)} All bytes match their checksums.", flush=True)


def _summary(folder: str) -> str:
    rows, tokens, size = map(TokenManifest.load(folder).total, ("rows", "tokens", "size"))
    return f"{rows:,} documents, {tokens:,} tokens, {size / 1e9:.3f} GB in {folder}."
