"""Writes and verifies the teacher caches of a config's sources."""

import dataclasses
import os
import shutil
from typing import Any

from tqdm import tqdm

from jaxtrain.config import Config
from jaxtrain.cost import memory
from jaxtrain.data.stores import teacher_store
from jaxtrain.data.stores.teacher_store import TeacherManifest
from jaxtrain.data.stores.writer import Job, TeacherWriter
from jaxtrain.distill.scorer import Scorer
from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Model, Params
from jaxtrain.losses.cached import Layout
from jaxtrain.tokenizers.spelling import Speller
from jaxtrain.trainer import open_data

# Documents per part of a file. A kill loses at most one part: 70 MB for documents of 1,000 tokens with k = 64.
PART_ROWS = 256
# Required free space over the estimate, which is based on the first documents: later ones may be longer.
_MARGIN = 1.5


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings from the command line.

    Attributes:
        context: Tokens per row; None for the default.
        stride: Tokens between windows of a long document; None for the default.
        batch_tokens: Maximum tokens per device in a batch.
        own_tokenizer: Use the teacher's own tokenizer even if it agrees with the run's.
    """

    k: int
    temperatures: tuple[float, ...]
    context: int | None
    stride: int | None
    batch_tokens: int
    own_tokenizer: bool

    def sizes(self, config: Config, longest: int) -> tuple[int, int]:
        """Returns (context, stride). `longest` is the teacher's max_seq_len."""
        context = self.context or min(max(stage.seq_len for stage in config.plan().stages), longest)
        if context > longest:
            raise UserError(f"--context={context}: the teacher sees {longest} tokens at most")
        stride = self.stride or max(context // 2, 1)
        if stride > context:
            raise UserError(f"--stride={stride}: windows of {context} tokens would skip some; give that or less")
        return context, stride


def write(config: Config, workdir: str, output: str, settings: Settings, worker: int, workers: int) -> None:
    """Writes this worker's share of all sources. Raises UserError, TransientError or CorruptError."""
    assert config.teacher is not None
    sources, tokenizer = open_data.for_writing(config, workdir, TeacherManifest, output)
    vocabulary = spellers = None
    other = config.teacher.other_tokenizer(tokenizer)
    if other is not None or settings.own_tokenizer:
        run = Speller(tokenizer, "the run's")
        tokenizer = config.teacher.own_tokenizer()
        spellers = Speller(tokenizer, "the teacher's"), run
        vocabulary = [spelling.decode("latin-1") for spelling in spellers[0].tokenizer.spellings]
        print("Caching by the teacher's own tokenizer, for runs with any.", flush=True)
        if other is not None:
            print(f"The run has another:\n{other}", flush=True)
    config.data.row_spec(tokenizer, None)  # raises if add_bos is set but the tokenizer has no such token
    if settings.k > tokenizer.vocab_size:
        raise UserError(f"--k={settings.k}: the vocabulary has {tokenizer.vocab_size} tokens; give that or fewer")
    mesh = config.mesh.build()
    frozen = config.teacher.build(tokenizer, mesh)
    context, stride = settings.sizes(config, frozen.model.config.max_seq_len)
    layout = Layout(tokenizer.vocab_size, settings.k, settings.temperatures)
    print(f"Reading the teacher {config.teacher.model}...", flush=True)
    params = frozen.load()
    identity = frozen.identity(params)
    writers: dict[str, TeacherWriter] = {}
    for name, source in sources.items():
        manifest = TeacherManifest.of(
            source,
            config.data.sources[name],
            tokenizer,
            add_bos=config.data.add_bos,
            teacher=identity,
            layout=layout,
            context=context,
            stride=stride,
            part_rows=PART_ROWS,
            vocabulary=vocabulary,
        )
        folder, retry = os.path.join(output, name), 60 * config.data.retry_minutes
        job = Job(name, folder, config.data.sources[name], source, tokenizer, retry)
        writers[name] = TeacherWriter(job, manifest, worker, workers, spellers)
    documents = _check_space(writers, output)
    limit = memory.limit(mesh, config.memory_gb)
    scorer = make_scorer(frozen.model, params, layout, context, stride, settings.batch_tokens, limit)
    for name, writer in writers.items():
        if writer.complete or _write_source(name, writer, scorer, documents[name], workers):
            print(f"Source {name}: {_summary(writer.job.folder)}", flush=True)
        else:
            print(f"Source {name}: this worker is done with its documents; other workers are not.", flush=True)
    print(
        f"Train from it with --config.teacher.cache={output} --config.distillation.divergence.k={layout.k} (k only if "
        "the config distills with TopK or ULD).",
        flush=True,
    )


def make_scorer(
    model: Model, params: Params, layout: Layout, context: int, stride: int, batch_tokens: int, limit: int | None
) -> Scorer:
    """Builds the scorer with the largest batches of at most `batch_tokens` and `limit` bytes per device.

    Raises:
        UserError: even one row per device does not fit.
    """
    assert model.mesh is not None
    devices = sharding.batch_ways(model.mesh.shape)
    most = max(batch_tokens // context, 1)
    scorers: dict[int, Scorer] = {}

    def compile(count: int) -> Any:
        scorers[count] = Scorer(model, params, layout, context, stride, -(-most // count) * devices)
        return scorers[count].compile()

    try:
        count, _ = memory.fit([1 << power for power in range((most - 1).bit_length() + 1)], compile, limit)
    except memory.NothingFitsError as error:
        assert limit is not None
        raise UserError(
            f"the teacher does not fit: with one row of {context:,} tokens at a time a device needs {error.needs}, and "
            f"may use {limit / 1e9:.3g} GB. Use more devices (mesh.fsdp), a shorter --context or a smaller teacher."
        ) from None
    return scorers[count]


def _write_source(name: str, writer: TeacherWriter, scorer: Scorer, documents: int | None, workers: int) -> bool:
    """Writes this worker's share of a source. Returns whether the source is complete."""
    mine = None if documents is None else documents // workers
    with tqdm(total=mine, desc=f"Caching {name}", unit=" documents", unit_scale=True, disable=None) as bar:
        total = 0

        def progress(documents: int, tokens: int) -> None:
            nonlocal total
            total += tokens
            bar.set_postfix_str(f"{total / 1e6:,.1f}M tokens", refresh=False)
            bar.update(documents)

        return writer.write(scorer, progress)


def _check_space(writers: dict[str, TeacherWriter], output: str) -> dict[str, int | None]:
    """Returns the remaining documents of each source; None if they are known only by reading it.

    Raises:
        UserError: the free disk space is less than `_MARGIN` times their estimated size.
    """
    left: dict[str, int | None] = {}
    needed = 0.0
    for name, writer in writers.items():
        if writer.complete:
            left[name] = 0
            continue
        sampled, tokens, documents = writer.sample()
        done, _, written = writer.done()
        left[name] = None if documents is None else max(documents - done, 0)
        if documents is None or not sampled:
            print(f"Source {name}: the number of documents is known only after reading it.", flush=True)
            continue
        mean = tokens / sampled
        parts = max(min(len(writer.job.source.files), documents), -(-documents // PART_ROWS))
        width = writer.manifest.token_bytes
        size = teacher_store.size_of(round(mean * documents), documents, parts, width)
        needed += max(size - written, 0)
        if writer.manifest.by_text:
            found = writer.alignment
            print(
                f"Source {name}: {found.aligned / max(found.positions, 1):.1%} of the run's tokens end where one of "
                f"the teacher's does, and learn from it; {found.unfollowed:,} of {found.documents:,} documents have "
                "none, since a tokenizer changes their text.",
                flush=True,
            )
        print(
            f"Source {name}: {documents:,} documents of about {mean:,.0f} tokens (estimated from the first "
            f"{sampled:,}), {width} bytes each: about {size / 1e9:.3g} GB, {written / 1e9:.3g} of them written",
            flush=True,
        )
    free = shutil.disk_usage(output).free
    if free < _MARGIN * needed:
        raise UserError(
            f"--output={output}: the cache needs about {needed / 1e9:.3g} GB more, and {free / 1e9:.3g} GB are free "
            f"there, less than {_MARGIN} times as much. Use another disk, fewer documents (--max_samples) or fewer "
            "tokens (--k); or remove teacher.cache: the teacher then runs during training, and nothing is stored."
        )
    return left


def verify(config: Config, output: str) -> None:
    """Verifies the checksums of every cache. Raises UserError if one is incomplete or damaged."""
    for name in config.data.sources:
        folder = os.path.join(output, name)
        TeacherManifest.verify(folder)
        print(f"Source {name}: {_summary(folder)} All bytes match their checksums.", flush=True)


def _summary(folder: str) -> str:
    made = TeacherManifest.load(folder)
    rows, tokens, size = map(made.total, ("rows", "tokens", "size"))
    temperatures = ", ".join(f"{heat:g}" for heat in made.layout.temperatures)
    return (
        f"{rows:,} documents, {tokens:,} tokens, {size / 1e9:.3f} GB in {folder}: the {made.layout.k} most "
        f"likely tokens by {made.teacher['found']}, for temperatures {temperatures}."
    )
