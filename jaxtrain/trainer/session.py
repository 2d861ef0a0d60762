"""Builds everything a run consists of, from a config and a work directory."""

import dataclasses
import functools
import logging
import math
import os
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtrain import cli, hf
from jaxtrain.checkpoint import restore
from jaxtrain.checkpoint.checkpointer import Checkpointer
from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.config import Config
from jaxtrain.cost import clusters, memory
from jaxtrain.data import ledger, pipeline
from jaxtrain.data.feed import Feed, local_lanes
from jaxtrain.data.io.disk_cache import DiskCache
from jaxtrain.data.packing import Spans
from jaxtrain.data.pipeline import StepBatch
from jaxtrain.distill import teacher
from jaxtrain.distill.teacher import bytes_per_device
from jaxtrain.distributed.sharding import AutoMesh, MeshConfig, replicated
from jaxtrain.errors import UserError
from jaxtrain.interfaces import AttentionModel, ClippableModel, EightBitModel, Json, LossFn
from jaxtrain.losses.cached import Aligned, Layout
from jaxtrain.metrics.monitor import Monitor
from jaxtrain.model.generate import continuation
from jaxtrain.optim import base as optim
from jaxtrain.plan import Plan, StepPlan
from jaxtrain.tokenizers.training import TrainTokenizer
from jaxtrain.trainer import compatibility, compiler_options, meshes, open_data, scheduled, state, tuning, variants
from jaxtrain.trainer.evaluate import Evaluator
from jaxtrain.trainer.generation import generate
from jaxtrain.trainer.programs import Choice, StagePrograms
from jaxtrain.trainer.spikes import THRESHOLD, SpikeRule, SpikeWatch
from jaxtrain.trainer.step import Distilled, StepComponents, Teaching
from jaxtrain.trainer.tasks import TaskEvaluator

_SAMPLE_TOKENS = 64

logger = logging.getLogger("jaxtrain")


def compiler_effort(platform: str) -> None:
    """Lowers XLA's optimization effort on GPUs: the default, close to O3, takes minutes (docs/benchmarks.md)."""
    if platform == "gpu":
        jax.config.update("jax_optimization_level", "O1")


def configure_runtime(config: Config, workdir: Workdir) -> None:
    """Sets up JAX's persistent compilation cache: in the work directory, unless the environment names a folder."""
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_compilation_cache_dir", chosen or os.fspath(workdir.cache / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    if jax.default_backend() != "gpu":
        # The path of GPU autotuning results is part of every cache key: moving the work directory would miss all.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    compiler_effort(jax.default_backend())
    logger.info(
        "%d process(es), %d %s device(s)", jax.process_count(), jax.device_count(), jax.devices()[0].device_kind
    )


class Session:
    """Everything a run consists of.

    Attributes:
        config: the run's config.
        plan: maps a step to stage, shapes, learning rate and the source of each row.
        eval_plan: the plan of an evaluation; None without held-out documents or evaluation.
        readers: the sources cut into units, in the plan's order.
        components: the components of a step.
        programs: the compiled steps.
        limit: bytes that a step may use on a device; None for no limit.
        identities: what every checkpoint records about data and model (see `compatibility`).
        sources: the sources of documents, by name.
        modes: how each source is read, by name.
        forgotten: the documents that are left out.
        cache: the disk cache; None if no source uses it.
        scratch: a local folder for temporary files.
        kept_programs: the choices of programs that checkpoints record (see `tuning`).
        start_step: step of the restored checkpoint; 0 for a new run.
        start_tokens: tokens trained up to start_step.
        is_complete: whether nothing is left to train.
        stage_ends: each source's totals at the end of every stage so far.
        evaluators: of held-out documents and of tasks; empty before `train_state`, or if the config has no evaluation.
    """

    def __init__(self, config: Config, workdir: Workdir, checkpointer: Checkpointer, fetch: bool = True):
        """Opens the data, builds the model, and finds where to continue.

        Args:
            config: the run's config.
            workdir: the work directory.
            checkpointer: the work directory's checkpoints.
            fetch: whether sources of mode "download" are fetched now; otherwise they are streamed.

        Raises:
            UserError: settings conflict, or this config may not resume from the checkpoint.
        """
        self.plan = config.plan()
        evaluates = config.eval.is_on and config.data.holdout > 0
        self.eval_plan = config.eval.plan(self.plan, config.data.num_lanes) if evaluates else None
        self._checkpointer = checkpointer
        self.start_step = checkpointer.latest_step() or 0
        saved = checkpointer.restore_data(self.start_step) if self.start_step else None
        config = compatibility.settled(config, saved)
        self.limit = memory.limit(config.mesh.build(), config.memory_gb)
        self._cluster = clusters.of_devices(jax.devices())
        if config.mesh == AutoMesh():
            config = with_mesh(config, self.plan, self._cluster, self.limit)
        self.config, mesh = config, config.mesh.build()
        self._programs_path = workdir.programs
        # None: the run was begun by a version that chose nothing, and goes on as it was.
        self.kept_programs: list[Json] | None = [] if saved is None else saved.get("programs")

        # Training a tokenizer takes as long as compiling the first stage: do both at once, for the vocabulary it asks
        # for.
        asked, alone = config.tokenizer, jax.process_count() == 1 and config.teacher is None
        vocab_size = 0
        if alone and isinstance(asked, TrainTokenizer) and asked.needs_training(workdir.path):
            vocab_size = asked.vocab_size
            self._set_components(make_components(config, vocab_size, self.plan, mesh, None, self.limit))
            self.programs.begin(1)

        # The data: tokenizer, sources and their units.
        self.scratch = os.fspath(workdir.cache)
        self._tasks_folder = workdir.tasks
        cache = config.data.cache(os.path.join(self.scratch, "data"))
        self._skipped = open_data.skipped(workdir.path, saved)
        self.forgotten = open_data.forgotten(config, workdir.path, saved, is_run=fetch)
        self.tokenizer, opened = open_data.open_all(config, workdir, saved, cache, fetch)
        self.sources = {name: one.source for name, one in opened.items()}
        self.modes = {name: one.mode for name, one in opened.items()}
        stored = all(mode == "pretokenized" for mode in self.modes.values())
        self._threads, (_, self._prefetch) = pipeline.pools(config.data, stored), config.data.threads(stored)
        is_used = any(one.mode == "download" or pipeline.wants_cache(one.source) for one in opened.values())
        self.cache = cache if is_used else None
        if self.cache is not None:
            _clean_up(self.cache)
        self.readers = open_data.build(config, self.sources, self._skipped, self.forgotten.documents, self.scratch)
        for reader in self.readers:
            logger.info("Source %s", reader.summary)
        if math.isnan(self.plan.at(1).learning_rate):  # only `epochs` ends the run
            self.plan = config.plan(open_data.horizon(config, self.readers, self.tokenizer, self.plan, saved))
        _warn_of_warmup(config, self.plan)

        # The model and the components of its steps.
        self._frozen: teacher.Frozen | None = None
        self._cached: teacher.Cached | None = None
        self._teacher_params: Any = None
        if config.teacher is not None and config.teacher.cache is None:
            self._frozen = config.teacher.build(self.tokenizer, mesh)
        elif config.teacher is not None:
            self._cached = config.teacher.open_cache(config.data, self.sources, self.tokenizer)
        if vocab_size != self.tokenizer.vocab_size:
            stored = self._cached and (self._cached.layout, self._cached.aligned)
            size = self.tokenizer.vocab_size
            self._set_components(make_components(config, size, self.plan, mesh, self._frozen, self.limit, stored))
        self.evaluators: list[Evaluator | TaskEvaluator] = []

        # Where to continue.
        self.identities = compatibility.identities(config, self.readers, self.tokenizer, self.plan, self.forgotten)
        self.identities["programs"] = self.kept_programs
        self.start_tokens, self.is_complete, self._saved_teacher = 0, False, None
        self._lane_states: dict[int, np.ndarray] = {}
        self._saved_spikes = None if saved is None else saved.get("spikes")
        self.stage_ends = ledger.StageEnds(self.plan)
        if saved is not None:
            for line in compatibility.check(saved, self.identities, self.plan, self.start_step):
                logger.info("Changed since the checkpoint: %s", line)
            self.start_tokens = saved["tokens"]
            self.is_complete = self.start_step == self.plan.last_step or saved["data_ended"]
            self._lane_states = ledger.from_json(saved["lanes"], self.plan.source_names, config.data.num_lanes)
            totals = ledger.by_source(np.stack(list(self._lane_states.values())), self.plan.source_names)
            # The first versions recorded neither the ends of stages nor the teacher.
            self.stage_ends.restore(saved.get("stage_ends", []), self.start_step, totals)
            self._saved_teacher = saved.get("teacher")

    def _set_components(self, components: StepComponents) -> None:
        self.components = components
        _report(components, self.plan, self.eval_plan)
        choices = None
        if self.kept_programs is not None:
            choices = self._choose(components, self.kept_programs)
        self.programs = StagePrograms(
            components,
            self.plan,
            self.config.micro_batch_tokens,
            self.limit,
            self.eval_plan and self.eval_plan.stages[0],
            bytes_besides_params(components),
            choices=choices,
        )

    def _choose(self, components: StepComponents, saved: list[Json]) -> dict[tuple[int, int], Choice]:
        config, cluster = self.config, self._cluster
        mesh = components.mesh.shape
        target = variants.Target(config=config, components=components, mesh=mesh, cluster=cluster, limit=self.limit)
        measure = None
        if cluster is not None and self.limit is not None:
            compiler = scheduled.Compiler(config, cluster, components.model.vocab_size, components)
            measure = tuning.by_compiler(target, compiler)
        path, step = self._programs_path, self.start_step
        choices, self.kept_programs = tuning.resolve(target, self.plan, path, saved, step, measure)
        if cluster is not None:
            tuning.report(self.plan, choices)
        return choices

    @functools.cached_property
    def feed(self) -> Feed:
        """The run's batches as device arrays, starting at step start_step + 1."""
        data, mesh = self.config.data, self.components.mesh
        lanes = local_lanes(mesh, data.num_lanes)
        rows = data.row_spec(self.tokenizer, self.config.epochs)
        if self._cached is not None:
            rows = dataclasses.replace(rows, records=self._cached.records(), width=self._cached.layout.width)
        batches = pipeline.host_batches(
            self.readers,
            self.plan,
            rows,
            lanes,
            self._threads,
            after=self.start_step,
            states=self._lane_states,
            prefetch=self._prefetch,
        )
        return Feed(batches, mesh, lanes, data.num_lanes)

    def watch(self) -> SpikeWatch:
        """Follows the run's steps from its start on."""
        in_step = self.components.spikes is not None
        rule = self.components.spikes or SpikeRule(self.config.spike_window, THRESHOLD, skips=False)
        return SpikeWatch(self, rule, in_step, self._saved_spikes, self._lane_states)

    def addresses(self, step: int, states: Mapping[int, np.ndarray]) -> list[tuple[int, int, Spans]]:
        """(row of the batch, source, documents) of each row of a step on this host.

        Args:
            step: the step.
            states: the positions of this host's lanes before it.
        """
        data = self.config.data
        readers = data.build(
            self.sources,
            seed=self.config.seed,
            skipped=self._skipped,
            forgotten=self.forgotten.documents,
            scratch=self.scratch,
        )
        rows, lanes = (
            data.row_spec(self.tokenizer, self.config.epochs),
            local_lanes(self.components.mesh, data.num_lanes),
        )
        batches = iter(
            pipeline.host_dataset(readers, self.plan, rows, lanes, self._threads, after=step - 1, states=states)
        )
        assert isinstance(batches, pipeline.HostIterator)
        found, each = batches.addresses(), self.plan.at(step).batch_size // data.num_lanes
        batches.close()
        return [(lanes[at // each] * each + at % each, *row) for at, row in enumerate(found)]

    def close(self) -> None:
        """Stops reading."""
        if "feed" in vars(self):
            self.feed.close()

    def gather(self, batch: StepBatch) -> np.ndarray:
        """Gathers the positions of all lanes after a batch: int64 [V, S, F]. All processes must call it."""
        return ledger.gather(batch.states, self.config.data.num_lanes)

    def train_state(self, monitor: Monitor) -> state.State:
        """Restores or creates the train state, while data is read and programs compile in the background.

        Raises:
            UserError: a later stage or an evaluation does not fit in a device's memory, or the teacher has changed.
        """
        components, config = self.components, self.config
        first = self.plan.at(self.start_step + 1).stage
        self.programs.begin(first, self.start_step + 1)
        self.feed.begin()
        self._load_teacher()
        if self.start_step:
            with monitor.span("checkpoint"):
                wanted = state.abstract(components.model, components.optimizer, components.mesh)
                restored = self._checkpointer.restore(self.start_step, wanted)
            logger.info(f"Resumed from step {self.start_step:,} ({self.start_tokens:,} tokens).")
        elif config.init_from:
            wanted = state.abstract(components.model, components.optimizer, components.mesh)["params"]
            if restore.is_checkpoint(config.init_from):
                params = restore.restore_params(config.init_from, wanted)
            else:
                params = hf.load(config.init_from, components.model, jax.tree.map(lambda leaf: leaf.sharding, wanted))
            restored = state.create_from(params, components.model, components.optimizer, components.mesh)
            logger.info(f"Starting with the parameters of {config.init_from}.")
        else:
            restored = state.create(components.model, components.optimizer, components.mesh, config.seed)
        if self.eval_plan is not None:
            held_out = Evaluator(
                config.eval.plans(self.plan, config.data.num_lanes),
                config.data,
                self.sources,
                self.tokenizer,
                components.mesh,
                self._threads,
                config.seed,
                self._skipped,
                self.scratch,
                lambda documents: self.programs.evaluation(documents).executable,
            )
            self.evaluators.append(held_out)
        if config.eval.tasks:
            self.add_tasks()
        with monitor.span("compile"):
            self.programs.settle(first, self.start_step + 1)
        return restored

    def add_tasks(self) -> None:
        """Reads the questions of `eval.tasks`, which then belong to every evaluation. Raises as `TaskEvaluator`."""
        config = self.config
        tasks = TaskEvaluator(
            config.eval.tasks,
            config.eval.task_limit,
            self._tasks_folder,
            self.tokenizer,
            config.data.add_bos,
            self.components,
            (self.eval_plan or self.plan).stages[-1].batch_size,
            lambda documents: self.programs.tasks(documents).executable,
        )
        self.evaluators.append(tasks)
        self.programs.add_tasks(*tasks.shape)

    def _load_teacher(self) -> None:
        if self._frozen is not None:
            self._teacher_params = self._frozen.load()
            self.identities["teacher"] = self._frozen.identity(self._teacher_params)
            logger.info(f"Distilling from {self._frozen.config.model}.")
        elif self._cached is not None:
            tables = self._cached.aligned.tables if self._cached.aligned else ()
            self._teacher_params = jax.device_put(tables, replicated(self.components.mesh))
            self.identities["teacher"] = self._cached.identity
            logger.info(f"Distilling from {self._cached.summary}.")
        if self.start_step:
            compatibility.check_teacher(self._saved_teacher, self.identities["teacher"], self.start_step)

    def teaching(self, at: StepPlan) -> tuple[Teaching, ...]:
        """The step's extra argument if the run has a teacher; () otherwise."""
        if self.components.distilled is None:
            return ()
        return ((self._teacher_params, np.float32(at.ce_weight), np.float32(at.kd_weight)),)


def with_mesh(config: Config, plan: Plan, cluster: clusters.Cluster | None, limit: int | None) -> Config:
    """The config with the mesh that `mesh=auto` chooses: all `fsdp` on CPUs and unknown devices."""
    mesh, why = MeshConfig(), "no search on this hardware"
    if cluster is not None and limit is not None:
        mesh, why = meshes.choose(config, plan, cluster, limit)
    logger.info("mesh=auto: %s", why)
    return dataclasses.replace(config, mesh=mesh)


def _warn_of_warmup(config: Config, plan: Plan) -> None:
    """Warns if `steps` ends the run while the learning rate still rises."""
    if plan.last_step is None or plan.total_tokens == plan.horizon:
        return
    before, last = (plan.at(max(step, 1)).learning_rate for step in (plan.last_step - 1, plan.last_step))
    peak = config.optimizer.learning_rate
    if before < last < peak or (plan.last_step == 1 and last < peak / 2):
        fix = "total_tokens=none" if config.stages[-1].tokens is None else f"scale_to={plan.total_tokens}"
        logger.warning(
            "steps=%d ends the run within the warmup: the learning rate reaches only %.2g, since the schedule is that "
            "of %s tokens. --config.%s fits it to these steps.",
            plan.last_step,
            last,
            f"{plan.horizon:,}",
            fix,
        )


def make_components(
    config: Config,
    vocab_size: int,
    plan: Plan,
    mesh: jax.sharding.Mesh,
    frozen: teacher.Frozen | None,
    limit: int | None,
    stored: tuple[Layout, Aligned | None] | None = None,
) -> StepComponents:
    """Builds the components of the config's steps on a mesh.

    Args:
        config: the run's config.
        vocab_size: number of ids.
        plan: the run's plan.
        mesh: the device mesh.
        frozen: the teacher, if it runs during training.
        limit: bytes that a step may use on a device; None for no limit.
        stored: if the teacher is cached, layout of the records in each batch, and how they are used if it has its own
            tokenizer.
    """
    model = config.model.build(vocab_size, mesh)
    if config.precision == "fp8":
        if not isinstance(model, EightBitModel):
            raise UserError(f"precision='fp8' is not for a {type(model).__name__}, which has no `in_fp8`: use 'bf16'")
        model = model.in_fp8()
    optimizer = optim.built(config.optimizer, model, mesh)
    qk_clip = getattr(config.optimizer, "qk_clip", None)
    if qk_clip is not None:
        if not isinstance(model, ClippableModel):
            raise UserError(f"qk_clip is not for a {type(model).__name__}, which has no `clip_logits`: set it to none")
        model.watching_logits()  # refused here, if at all
    if frozen is not None:
        frozen.check_stages(plan)
        frozen.check_memory(state.abstract(model, optimizer, mesh), limit)

    def losses(chunk_tokens: int | None) -> tuple[LossFn, Distilled | None]:
        loss: Any = config.loss
        if chunk_tokens is not None:
            loss = dataclasses.replace(loss, chunk_tokens=chunk_tokens)
        if frozen is not None:
            divergence = config.distillation.build(model.vocab_size, mesh, loss)
            return loss.build(vocab_size, mesh), Distilled(frozen.model, frozen.abstract, divergence)
        if stored is not None:
            layout, aligned = stored
            divergence = config.distillation.build_cached(layout, mesh, loss, aligned)
            tables = tuple(
                jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=replicated(mesh))
                for table in (aligned.tables if aligned else ())
            )
            return loss.build(vocab_size, mesh), Distilled(None, tables, divergence, layout.width)
        return loss.build(vocab_size, mesh), None

    loss, distilled = losses(None)
    options = compiler_options.resolve(mesh, config.compiler_options)
    spikes = None
    if config.spike_threshold is not None:
        spikes = SpikeRule(config.spike_window, config.spike_threshold, config.on_spike == "skip_update")
    has_chunks = hasattr(config.loss, "chunk_tokens")
    losses_by_chunk = losses if has_chunks else None
    return StepComponents(
        model, loss, optimizer, mesh, config.clip_norm, distilled, options, losses_by_chunk, spikes, qk_clip
    )


def bytes_besides_params(components: StepComponents) -> int:
    """Bytes that training keeps on each device besides the model's parameters: optimizer state and teacher."""
    made = state.abstract(components.model, components.optimizer, components.mesh)
    distilled = () if components.distilled is None else components.distilled.abstract
    return bytes_per_device(made) - bytes_per_device(made["params"]) + bytes_per_device(distilled)


def _report(components: StepComponents, plan: Plan, eval_plan: Plan | None) -> None:
    model, mesh, distilled = components.model, components.mesh, components.distilled
    logger.info(
        "Model: %s parameters (%s without embeddings%s); mesh %s",
        f"{model.num_params:,}",
        f"{model.num_params_non_embedding:,}",
        f", {model.num_active_params:,} active" * (model.num_active_params < model.num_params_non_embedding),
        " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
    )
    # Processes must agree on each choice, so make it here: the compile thread then finds it made.
    teacher = None if distilled is None else distilled.teacher
    for stage in plan.stages:
        if isinstance(model, AttentionModel):
            choice = model.attention_choice(stage.batch_size, stage.seq_len)
            logger.info("Stage %d: attention %s (%s)", stage.index, choice.name, choice.reason)
        if isinstance(teacher, AttentionModel):
            teacher.attention_choice(stage.batch_size, stage.seq_len)
    if eval_plan is not None and isinstance(model, AttentionModel):
        for stage in eval_plan.stages:
            model.attention_choice(stage.batch_size, stage.seq_len)
    if teacher is not None:
        logger.info("Teacher: %s parameters", f"{teacher.num_params:,}")


def _clean_up(cache: DiskCache) -> None:
    """Removes leftovers of killed processes from the disk cache, and logs its maximum size."""
    cache.trim()
    used, free = cache.used_bytes(), shutil.disk_usage(cache.directory).free
    logger.info("Disk cache: at most %s in %s, %s used", cli.size(cache.limit), cache.directory, cli.size(used))
    if cache.limit - used > free:
        logger.warning("The disk of the cache has only %s free: lower data.max_disk_gb.", cli.size(free))


def sample(session: Session, params: Any) -> dict[str, str]:
    """Generates a continuation of each of the config's prompts, the same at any step. All processes must call it."""
    tokenizer, model = session.tokenizer, session.components.model
    ids, lengths = tokenizer.encode_batch(session.config.sample_prompts)
    context = model.config.max_seq_len
    prompts_ids = [piece.tolist()[1 - context :] for piece in np.split(ids, np.cumsum(lengths)[:-1])]
    texts = generate(
        model,
        params,
        prompts_ids,
        limit=session.limit,
        extra=bytes_besides_params(session.components),
        max_new_tokens=min(_SAMPLE_TOKENS, context - max(map(len, prompts_ids))),
        temperature=0.8,
        top_k=50,
        seed=session.config.seed,
        eos_id=tokenizer.eos_id,
    )
    found = zip(session.config.sample_prompts, prompts_ids, texts, strict=True)
    return {prompt: continuation(tokenizer, prompt_ids, new) for prompt, prompt_ids, new in found}
