"""From a config and a work directory to everything that a loop needs."""

import dataclasses
import logging
import os
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain import hf
from jaxtrain.checkpoint import checkpoints
from jaxtrain.checkpoint.checkpoints import Checkpointer
from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.config import Config
from jaxtrain.cost import memory
from jaxtrain.data import ledger, pipeline, skips
from jaxtrain.data.feed import DeviceBatch, Feed, local_lanes
from jaxtrain.data.io.disk_cache import DiskCache
from jaxtrain.data.lanes import Pools
from jaxtrain.data.source_reader import SourceReader
from jaxtrain.distill import teacher
from jaxtrain.interfaces import AttentionModel, Json, Source, Tokenizer
from jaxtrain.losses.cached import Layout
from jaxtrain.metrics.monitor import Monitor
from jaxtrain.model.generate import continuation, generate
from jaxtrain.plan import Plan, StepPlan
from jaxtrain.trainer import compatibility, open_data, state
from jaxtrain.trainer.evaluate import Evaluator
from jaxtrain.trainer.programs import StagePrograms
from jaxtrain.trainer.step import Distilled, StepComponents, Teaching

_SAMPLE_TOKENS = 64

logger = logging.getLogger("jaxtrain")


def compiler_effort(platform: str) -> None:
    """XLA's default of O3-like effort costs minutes on scanned models on GPUs (docs/benchmarks.md)."""
    if platform == "gpu":
        jax.config.update("jax_optimization_level", "O1")


def configure_runtime(config: Config, workdir: Workdir) -> None:
    """Settings of JAX that outlive a compile: the persistent cache is in the work directory, if JAX's own environment
    variable does not say where."""
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_compilation_cache_dir", chosen or os.fspath(workdir.cache / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    if jax.default_backend() != "gpu":
        # The folder of GPUs' autotuning results is part of every key: a work directory that moves would miss them all.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    compiler_effort(jax.default_backend())
    logger.info(
        "%d process(es), %d %s device(s)", jax.process_count(), jax.device_count(), jax.devices()[0].device_kind
    )


@dataclasses.dataclass
class Session:
    """Everything that a run is made of. start_step: the restored step, 0 for a new run. cache: None if no source has
    one. scratch: a local folder for what need not last. saved_teacher: what the checkpoint says of its teacher.
    """

    config: Config
    plan: Plan
    tokenizer: Tokenizer
    dealers: list[SourceReader]
    parts: StepComponents
    stages: StagePrograms
    checkpointer: Checkpointer
    identities: Json
    threads: Pools
    prefetch: int
    resolved: dict[str, Source]
    modes: dict[str, str]
    cache: DiskCache | None
    scratch: str
    start_step: int
    start_tokens: int
    is_complete: bool
    lane_states: dict[int, np.ndarray]
    stage_ends: ledger.StageEnds
    skips: skips.Skips
    frozen: teacher.Frozen | None
    cached: teacher.Cached | None
    saved_teacher: Json | None

    def __post_init__(self) -> None:
        self.evaluator: Evaluator | None = None
        self._feed: Feed | None = None
        self._teacher: Any = None

    @property
    def feed(self) -> Feed:
        if self._feed is None:
            data, mesh = self.config.data, self.parts.mesh
            lanes = local_lanes(mesh, data.num_lanes)
            rows = data.rows(self.tokenizer, self.config.epochs)
            if self.cached is not None:
                rows = dataclasses.replace(rows, records=self.cached.records(), width=self.cached.layout.width)
            batches = pipeline.host_batches(
                self.dealers,
                self.plan,
                rows,
                lanes,
                self.threads,
                after=self.start_step,
                states=self.lane_states,
                prefetch=self.prefetch,
            )
            self._feed = Feed(batches, mesh, lanes, data.num_lanes, ahead=1)
        return self._feed

    def gather(self, batch: DeviceBatch) -> np.ndarray:
        """Where all lanes of the run stand after a batch: int64 [V, S, F]. All processes call it."""
        return ledger.gather(batch.states, self.config.data.num_lanes)

    def train_state(self, monitor: Monitor) -> state.State:
        """Restored, or fresh; reading and compiling go on meanwhile. UserError if a stage to come does not fit."""
        first = self.plan.at(self.start_step + 1).stage
        self.stages.begin(first)
        self.feed.begin()
        parts, config = self.parts, self.config
        self._load_teacher(monitor)
        if self.start_step:
            with monitor.span("checkpoint"):
                wanted = state.abstract(parts.model, parts.optimizer, parts.mesh)
                restored = self.checkpointer.restore(self.start_step, wanted)
            monitor.message(f"Resumed from step {self.start_step:,} ({self.start_tokens:,} tokens).")
        elif config.init_from:
            restored = state.create_from(_params_from(config, parts), parts.model, parts.optimizer, parts.mesh)
            monitor.message(f"Starting with the parameters of {config.init_from}.")
        else:
            restored = state.create(parts.model, parts.optimizer, parts.mesh, config.seed)
        if config.eval.is_on:
            self.evaluator = Evaluator(
                config.eval,
                config.data,
                self.plan,
                self.resolved,
                self.tokenizer,
                parts,
                self.threads,
                config.seed,
                self.skips,
                self.scratch,
            )
        with monitor.span("compile"):
            self.stages.settle(first)
        return restored

    def _load_teacher(self, monitor: Monitor) -> None:
        """Raises UserError if it is not the one that the checkpoint was trained with."""
        if self.frozen is not None:
            self._teacher = self.frozen.load()
            self.identities["teacher"] = self.frozen.identity(self._teacher)
            monitor.message(f"Distilling from {self.frozen.config.model}.")
        elif self.cached is not None:
            self._teacher = ()
            self.identities["teacher"] = self.cached.identity
            monitor.message(f"Distilling from {self.cached.summary}.")
        if self.start_step:
            compatibility.check_teacher(self.saved_teacher, self.identities["teacher"], self.start_step)

    def teaching(self, at: StepPlan) -> tuple[Teaching, ...]:
        """What a step takes besides its usual arguments: nothing without a teacher."""
        if self.parts.distilled is None:
            return ()
        return ((self._teacher, np.float32(at.ce_weight), np.float32(at.kd_weight)),)


def open_session(config: Config, workdir: Workdir, checkpointer: Checkpointer, fetch: bool = True) -> Session:
    """Resolve everything, and find where to go on. Raises UserError for what cannot go together.

    fetch: whether sources of mode "download" are fetched now; without, they are read as streams.
    """
    plan = config.plan()
    start = checkpointer.latest_step() or 0
    saved = checkpointer.restore_data(start) if start else None
    mesh = config.mesh.build()
    scratch = os.fspath(workdir.cache)
    cache = config.data.cache(os.path.join(scratch, "data"))
    given_up = open_data.skipped(workdir.path, saved)
    tokenizer, opened = open_data.open_all(config, workdir, saved, cache, fetch)
    resolved = {name: one.source for name, one in opened.items()}
    stored = all(one.mode == "pretokenized" for one in opened.values())
    if not any(one.mode == "download" or pipeline.wants_cache(one.source) for one in opened.values()):
        cache = None
    if cache is not None:
        _prepare(cache)
    dealers = open_data.build(config, resolved, given_up, scratch)
    frozen, cached = _teacher(config, resolved, tokenizer, mesh)
    limit = memory.limit(mesh, config.memory_gb)
    parts = make_parts(config, tokenizer.vocab_size, plan, mesh, frozen, limit, cached and cached.layout)
    identities = compatibility.identities(config, dealers, tokenizer, plan)
    lane_states: dict[int, np.ndarray] = {}
    stage_ends = ledger.StageEnds(plan)
    if saved is not None:
        for line in compatibility.check(saved, identities, plan, start):
            logger.info("Changed since the checkpoint: %s", line)
        lane_states = ledger.from_json(saved["lanes"], plan.source_names, config.data.num_lanes)
        given = ledger.by_source(np.stack(list(lane_states.values())), plan.source_names)
        # Checkpoints of the first versions have no ends of stages.
        stage_ends.restore(saved.get("stage_ends", []), start, given)
    _report(parts, plan, dealers)
    return Session(
        config=config,
        plan=plan,
        tokenizer=tokenizer,
        dealers=dealers,
        parts=parts,
        stages=StagePrograms(parts, plan, config.micro_batch_tokens, limit),
        checkpointer=checkpointer,
        identities=identities,
        threads=pipeline.pools(config.data, stored),
        prefetch=config.data.threads(stored)[1],
        resolved=resolved,
        modes={name: one.mode for name, one in opened.items()},
        cache=cache,
        scratch=scratch,
        start_step=start,
        start_tokens=0 if saved is None else saved["tokens"],
        is_complete=saved is not None and (start == plan.last_step or saved["data_ended"]),
        lane_states=lane_states,
        stage_ends=stage_ends,
        skips=given_up,
        frozen=frozen,
        cached=cached,
        saved_teacher=None if saved is None else saved.get("teacher"),  # older checkpoints do not say
    )


def _teacher(
    config: Config, resolved: dict[str, Source], tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> tuple[teacher.Frozen | None, teacher.Cached | None]:
    if config.teacher is None:
        return None, None
    if config.teacher.cache is None:
        return config.teacher.build(tokenizer, mesh), None
    return None, config.teacher.open_cache(config.data, resolved, tokenizer)


def make_parts(
    config: Config,
    vocab_size: int,
    plan: Plan,
    mesh: jax.sharding.Mesh,
    frozen: teacher.Frozen | None,
    limit: int | None,
    layout: Layout | None = None,
) -> StepComponents:
    """What the config's steps are made of, on this mesh. limit: bytes of a device that a step may take.

    layout: of the records that come with each batch, where the teacher is cached.
    """
    model = config.model.build(vocab_size, mesh)
    optimizer = config.optimizer.build(model.axes, mesh)
    loss = config.loss.build(vocab_size, mesh)
    distilled = None
    if frozen is not None:
        frozen.check_stages(plan)
        frozen.check_memory(state.abstract(model, optimizer, mesh), limit)
        divergence = config.distillation.build(model.vocab_size, mesh, config.loss)
        distilled = Distilled(frozen.model, frozen.abstract, divergence)
    elif layout is not None:
        divergence = config.distillation.build_cached(layout, mesh, config.loss)
        distilled = Distilled(None, (), divergence, layout.width)
    return StepComponents(model, loss, optimizer, mesh, config.clip_norm, distilled)


def _report(parts: StepComponents, plan: Plan, dealers: Sequence[SourceReader]) -> None:
    for dealer in dealers:
        logger.info("Source %s", dealer.summary)
    model, mesh = parts.model, parts.mesh
    shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    logger.info(
        "Model: %s parameters (%s without embeddings); mesh %s",
        f"{model.num_params:,}",
        f"{model.num_params_non_embedding:,}",
        shape,
    )
    if parts.distilled is not None and parts.distilled.teacher is not None:
        logger.info("Teacher: %s parameters", f"{parts.distilled.teacher.num_params:,}")
    if isinstance(model, AttentionModel):
        for stage in plan.stages:
            choice = model.attention_choice(stage.batch_size, stage.seq_len)
            logger.info("Stage %d: attention %s (%s)", stage.index, choice.name, choice.reason)


def _prepare(cache: DiskCache) -> None:
    """Clear up after killed processes, and say what the cache may grow to."""
    cache.trim()
    used, free = cache.used_bytes(), shutil.disk_usage(cache.directory).free
    logger.info("Disk cache: at most %.2f GB in %s, %.2f used", cache.limit / 1e9, cache.directory, used / 1e9)
    if cache.limit - used > free:
        logger.warning("The disk of the cache has only %.2f GB free: set data.max_disk_gb to less.", free / 1e9)


def _params_from(config: Config, parts: StepComponents) -> Any:
    """The parameters of `init_from`: a checkpoint of jaxtrain's, or a Hugging Face model."""
    where = config.init_from
    wanted = state.abstract(parts.model, parts.optimizer, parts.mesh)["params"]
    if checkpoints.is_checkpoint(where):
        return checkpoints.restore_params(where, wanted)
    return hf.load(where, parts.model, jax.tree.map(lambda leaf: leaf.sharding, wanted))


def sample(made: Session, params: Any, monitor: Monitor) -> None:
    """Continues the config's prompts. All processes call it."""
    prompts = made.config.sample_prompts
    ids, lengths = made.tokenizer.encode_batch(prompts)
    pieces = np.split(ids, np.cumsum(lengths)[:-1])
    texts = generate(
        made.parts.model,
        params,
        [piece.tolist() for piece in pieces],
        max_new_tokens=_SAMPLE_TOKENS,
        temperature=0.8,
        top_k=50,
        seed=made.config.seed,
        eos_id=made.tokenizer.eos_id,
    )
    for prompt, prompt_ids, new in zip(prompts, pieces, texts, strict=True):
        monitor.message(f"Sample: {prompt}{continuation(made.tokenizer, prompt_ids.tolist(), new)}")
