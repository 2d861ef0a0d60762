"""The root of the config tree, and the rules that span its parts. Nothing below the loop sees the whole config."""

import dataclasses
import difflib
import itertools
import pathlib

from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.data import benchmarks
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.distill.teacher import Teacher
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.errors import UserError
from jaxtrain.interfaces import LossConfig, ModelConfig, OptimizerConfig, TokenizerConfig
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.losses.distillation import Distillation
from jaxtrain.metrics.monitor import MonitorConfig
from jaxtrain.optim.adamw import AdamW
from jaxtrain.plan import CROSS_ENTROPY_ALONE, Plan, Stage, StepPlan, build_plan

ON_SPIKE = ("log", "skip_update", "rewind")


def reaches_multiple(at: StepPlan, tokens: int) -> bool:
    """Whether a step reaches a multiple of `tokens` trained tokens."""
    return at.tokens_after // tokens > at.tokens_before // tokens


@dataclasses.dataclass(kw_only=True)
class EvalConfig:
    """Evaluation on the documents that `data.holdout` keeps out of training.

    Attributes:
        every_steps: Evaluate every N steps, and at the end.
        every_tokens: Evaluate every N trained tokens, after the step that reaches them, and at the end, independent of
            batch sizes. Give one of the two; without either there is no evaluation.
        tokens: Held-out tokens to evaluate on. To find them, about tokens / data.holdout tokens of the stream are read.
        seq_len: Tokens of a row; None for the last stage's.
        batch_size: Rows of a batch, a multiple of data.num_lanes; None for the last stage's.
        weights: The share of each source; None for the last stage's.
        source_tokens: Also evaluate on so many held-out tokens of each source alone, always the same, if there are
            several; 0 for none. None for `tokens` divided equally.
        packing: How rows are packed; None for the last stage's way. Runs that differ in it are compared with one.
        tasks: Benchmarks of multiple choice, at each evaluation: hellaswag, arc_easy, arc_challenge, piqa, winogrande,
            openbookqa, boolq, sciq, lambada_openai, lambada_standard, or FILE.py:NAME (data/benchmarks.py). Read from
            the Hub once and kept in the work directory. They need no held-out documents.
        task_limit: Only the first N questions of each task; None for all.
    """

    every_steps: int | None = None
    every_tokens: int | None = None
    tokens: int = 262_144
    seq_len: int | None = None
    batch_size: int | None = None
    weights: dict[str, float] | None = None
    source_tokens: int | None = None
    packing: str | None = None
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None

    def check(self) -> None:
        for name in ("every_steps", "every_tokens", "tokens", "seq_len", "batch_size", "task_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: give 1 or more")
        if self.source_tokens is not None and self.source_tokens < 0:
            raise UserError(f"source_tokens={self.source_tokens}: give 0 (no evaluation by source) or more")
        if self.every_steps is not None and self.every_tokens is not None:
            raise UserError(
                f"every_steps={self.every_steps} and every_tokens={self.every_tokens}: give one of them and set the "
                "other to none"
            )
        titles = [benchmarks.title(name) for name in self.tasks if benchmarks.find(name)]
        if len(set(titles)) < len(titles):
            raise UserError(f"tasks={self.tasks}: two have the same name")
        if self.tasks and not self.is_on:
            raise UserError(f"tasks={self.tasks}: set every_steps or every_tokens too")

    @property
    def is_on(self) -> bool:
        return self.every_steps is not None or self.every_tokens is not None

    def due(self, at: StepPlan) -> bool:
        """Whether an evaluation follows this step: a function of the plan alone, so a resume changes nothing."""
        if self.every_tokens is not None:
            return reaches_multiple(at, self.every_tokens)
        return self.every_steps is not None and at.step % self.every_steps == 0

    def plans(self, train: Plan, num_lanes: int) -> dict[str, Plan]:
        """The rows of an evaluation: `plan` under "", and a plan for each source if there are several."""
        mix, names = {"": self.plan(train, num_lanes)}, train.source_names
        tokens = self.tokens // len(names) if self.source_tokens is None else self.source_tokens
        if len(names) == 1 or not tokens:
            return mix
        return mix | {name: self._plan(train, num_lanes, (name,), None, tokens) for name in names}

    def plan(self, train: Plan, num_lanes: int) -> Plan:
        """The rows of an evaluation of the mix, as a separate plan. Raises UserError."""
        weights = self.weights or {name: float(weight) for name, weight in train.stages[-1].weights.items()}
        return self._plan(train, num_lanes, train.source_names, weights, self.tokens)

    def _plan(
        self, train: Plan, num_lanes: int, names: tuple[str, ...], weights: dict[str, float] | None, tokens: int
    ) -> Plan:
        last = train.stages[-1]
        stage = Stage(
            name="evaluation",
            seq_len=self.seq_len or last.seq_len,
            batch_size=self.batch_size or last.batch_size,
            weights=weights,
            packing=self.packing or last.packing,
        )
        return build_plan(
            (stage,),
            source_names=names,
            num_lanes=num_lanes,
            seed=0,
            total_tokens=tokens,
            steps=None,
            epochs=None,
            learning_rate=0.0,
            schedule=lambda tokens, total: 0.0,
        )


@dataclasses.dataclass(kw_only=True)
class Config:
    """A run.

    Attributes:
        model: Any interfaces.ModelConfig, such as LlamaConfig.
        tokenizer, data, mesh, checkpoint, eval, monitor: See their classes. AutoMesh: the trainer chooses the mesh.
        stages: Consecutive parts of the run, each with its sequence length, batch size and mix; often just one.
        optimizer: Any interfaces.OptimizerConfig, such as AdamW or Muon.
        loss: Any interfaces.LossConfig.
        teacher: A frozen model to distill from; None for none.
        distillation: How to distill; used only with a teacher.
        total_tokens: Exact length of the run in tokens; None if the stages, `steps` or `epochs` end it.
        scale_to: Tokens of the whole run; those of every stage are scaled in proportion. None for no scaling.
        steps: Maximum number of steps. The schedule stays that of total_tokens, if given.
        epochs: Maximum number of times each source is read; None for no limit.
        seed: Seed of parameters, shuffle and mix.
        clip_norm: Maximum global norm of the gradient (Pascanu et al. 2013); None for no clipping.
        micro_batch_tokens: Maximum tokens per device in a micro-batch. Gradients of micro-batches add up to that of
            the whole batch. None: the trainer chooses (trainer/tuning.py).
        memory_gb: Maximum memory (10^9 bytes) of a step on a device. None for what the devices report, less a
            reserve; no limit if they report none (CPU).
        max_skipped_steps: Stop (exit code 1) after this many skipped updates in a row.
        spike_threshold: A step whose loss or gradient norm is this many standard deviations above the median of the
            steps before it is a spike, which is logged with its documents and the loss of each. None: the host compares
            alone, with 10; it costs no step anything, and documents have no losses.
        spike_window: How many steps before it, of the same stage, are compared.
        on_spike: "log"; "skip_update" also keeps parameters and optimizer as they were; "rewind" returns to the newest
            checkpoint and goes on without the documents that stand out, or all of the step's if none does.
        max_rewinds: Later spikes of a run that "rewind" has returned so often are only logged.
        log_every: Log every N steps.
        init_from: A work directory or checkpoint of jaxtrain, or a Hugging Face model (folder or id), whose parameters
            a new run starts with; "" for random ones.
        deterministic: Use only deterministic operations on GPUs, so that equal runs give equal parameters if they have
            the same results of autotuning, which the work directory's cache keeps.
        precision: "bf16", or "fp8": the products with the layers' weights, forward and backward, are of 8-bit values
            (model/fp8.py). "bf16" means model.dtype. May change at a resume.
        compiler_options: Options of XLA by name, for the train step and the evaluation, added to those of
            trainer/compiler_options.py or in their place: --config.compiler_options.xla_NAME=VALUE.
        sample_prompts: Texts to continue at the end of the run.
        sample_every_tokens: Also continue them every N trained tokens, after the step that reaches them; None for the
            end only.
    """

    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    stages: tuple[Stage, ...]
    optimizer: OptimizerConfig = dataclasses.field(default_factory=AdamW)
    loss: LossConfig = dataclasses.field(default_factory=CrossEntropy)
    teacher: Teacher | None = None
    distillation: Distillation = dataclasses.field(default_factory=Distillation)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)
    total_tokens: int | None = None
    scale_to: int | None = None
    steps: int | None = None
    epochs: int | None = None
    seed: int = 0
    clip_norm: float | None = 1.0
    micro_batch_tokens: int | None = None
    memory_gb: float | None = None
    max_skipped_steps: int = 10
    spike_threshold: float | None = None
    spike_window: int = 128
    on_spike: str = "log"
    max_rewinds: int = 3
    log_every: int = 10
    init_from: str = ""
    deterministic: bool = False
    precision: str = "bf16"
    compiler_options: dict[str, int | float | bool | str] = dataclasses.field(default_factory=dict)
    sample_prompts: tuple[str, ...] = ()
    sample_every_tokens: int | None = None

    def check(self) -> None:
        for name in (
            "scale_to",
            "epochs",
            "max_skipped_steps",
            "spike_window",
            "max_rewinds",
            "log_every",
            "micro_batch_tokens",
            "sample_every_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: give 1 or more")
        for name, most in (("total_tokens", 2**62), ("steps", 2**62), ("seed", 2**32 - 1)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise UserError(f"{name}={value}: give 0 to {most:,}")
        if self.precision not in ("bf16", "fp8"):
            raise UserError(f"precision={self.precision!r} is not known: give 'bf16' or 'fp8'")
        if self.memory_gb is not None and not self.memory_gb > 0:
            raise UserError(f"memory_gb={self.memory_gb}: give a size above 0, or none for what the devices have")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError(f"clip_norm={self.clip_norm}: give a value above 0, or none for no clipping")
        if self.on_spike not in ON_SPIKE:
            near = difflib.get_close_matches(self.on_spike, ON_SPIKE) or ON_SPIKE
            raise UserError(f"on_spike={self.on_spike!r} is not known; did you mean {' or '.join(map(repr, near))}?")
        if self.spike_threshold is None and self.on_spike != "log":
            raise UserError(f"on_spike={self.on_spike!r} needs spike_threshold, for example 10")
        if self.spike_threshold is not None and not self.spike_threshold > 0:
            raise UserError(
                f"spike_threshold={self.spike_threshold}: give a number above 0, or none for the host alone"
            )
        watchdog = self.monitor.watchdog_minutes
        if watchdog is not None and watchdog <= self.data.retry_minutes:
            raise UserError(
                f"monitor.watchdog_minutes={watchdog:g} would stop the run before "
                f"data.retry_minutes={self.data.retry_minutes:g} ends an outage and reports its cause: set it "
                "higher, or to none"
            )
        if "" in self.sample_prompts:
            raise UserError(f"sample_prompts={self.sample_prompts}: one is empty; give texts to continue")
        if self.sample_every_tokens is not None and not self.sample_prompts:
            raise UserError(
                f"sample_every_tokens={self.sample_every_tokens:,} needs texts to continue: set sample_prompts, for "
                "example to 'Once upon a time'"
            )
        self._check_bound()
        _check_path("init_from", self.init_from)
        if self.teacher is not None:
            _check_path("teacher.model", self.teacher.model)
        plan = self.plan()
        for stage in plan.stages:
            if stage.seq_len > self.model.max_seq_len:
                raise UserError(
                    f"stage {stage.index} ({stage.name}): seq_len={stage.seq_len} is longer than "
                    f"model.max_seq_len={self.model.max_seq_len}; shorten the rows or raise it"
                )
            if self.micro_batch_tokens is not None and self.micro_batch_tokens < stage.seq_len:
                raise UserError(
                    f"micro_batch_tokens={self.micro_batch_tokens}: a device processes whole rows, and a row of "
                    f"stage {stage.index} ({stage.name}) has {stage.seq_len} tokens; give that or more"
                )
        if self.eval.is_on:
            self._check_eval(plan)

    def _check_bound(self) -> None:
        """Unbounded sources need a bounded run. (The plan does not know the sources, so its message says less.)"""
        unbounded = [name for name, source in self.data.sources.items() if source.max_samples is None]
        bounds = {
            self.total_tokens,
            self.scale_to,
            self.steps,
            self.epochs,
            *(stage.tokens for stage in self.stages[-1:]),
        }
        if unbounded and self.stages and bounds == {None}:
            raise UserError(
                "max_samples MUST be specified for streaming datasets! Nothing bounds the run, and "
                f"{' and '.join(unbounded)} would be read forever. Set one of\n"
                f"  data.sources.{unbounded[0]}.max_samples (documents) and epochs=1: 1,000 to 10,000 for a quick "
                "test, 10,000 to 100,000 for development, 100,000 to 1M for a small run, 1M to 10M for a medium "
                "one, 10M to 100M for a large one, at about 1,000 tokens each;\n"
                "  total_tokens (for example 1000000000), steps, tokens of the last stage, or epochs.\n"
                'See "How to choose max_samples" in docs/data.md.'
            )

    def _check_eval(self, plan: Plan) -> None:
        if self.data.holdout == 0 and self.eval.tasks:
            return
        if self.data.holdout == 0:
            field = "every_steps" if self.eval.every_tokens is None else "every_tokens"
            raise UserError(
                f"eval.{field}={getattr(self.eval, field)} needs held-out documents: set data.holdout, for example to "
                f"0.01, or eval.{field}=none"
            )
        for name in self.eval.weights or {}:
            if name not in self.data.sources:
                near = difflib.get_close_matches(name, self.data.sources) or list(self.data.sources)
                raise UserError(f"eval.weights: there is no source {name!r}; did you mean {' or '.join(near)}?")
        self.eval.plan(plan, self.data.num_lanes)

    def plan(self, horizon: int | None = None) -> Plan:
        """The run as a pure function of the step. Raises UserError.

        Args:
            horizon: See `build_plan`.
        """
        stages, total_tokens = self._scaled()
        return build_plan(
            stages,
            source_names=tuple(self.data.sources),
            num_lanes=self.data.num_lanes,
            seed=self.seed,
            total_tokens=total_tokens,
            steps=self.steps,
            epochs=self.epochs,
            horizon=horizon,
            learning_rate=self.optimizer.learning_rate,
            schedule=self.optimizer.schedule.build(),
            loss_weights=CROSS_ENTROPY_ALONE if self.teacher is None else self.distillation.weights(),
        )

    def _scaled(self) -> tuple[tuple[Stage, ...], int | None]:
        """The stages and total_tokens, in proportion to `scale_to`."""
        if self.scale_to is None or not self.stages:
            return self.stages, self.total_tokens
        ends = list(itertools.accumulate(stage.tokens or 0 for stage in self.stages))
        # The target was for the stages as they are.
        total = self.total_tokens if self.stages[-1].tokens is None else ends[-1]
        if total is None:
            raise UserError(f"scale_to={self.scale_to:,} scales the stages' tokens: give those of the last stage too")
        bounds = [0, *(end * self.scale_to // total for end in ends)]
        scaled = tuple(
            stage if stage.tokens is None else dataclasses.replace(stage, tokens=end - start)
            for stage, (start, end) in zip(self.stages, itertools.pairwise(bounds), strict=True)
        )
        return scaled, self.scale_to


def _check_path(field: str, value: str) -> None:
    """Catches a mistyped folder, which would be looked up on the Hub until a timeout."""
    where = pathlib.Path(value).expanduser()
    if not value or "://" in value or where.exists():
        return
    is_path = value.startswith((".", "/", "~")) or value.count("/") > 1
    if is_path or (where.parent != pathlib.Path() and where.parent.is_dir()):
        beside = sorted(path.name for path in where.parent.iterdir()) if where.parent.is_dir() else []
        near = difflib.get_close_matches(where.name, beside)
        hint = f" Did you mean {' or '.join(str(where.parent / name) for name in near)}?" if near else ""
        raise UserError(
            f"{field}={value}: there is no such folder.{hint} Give a work directory, a checkpoint, a Hugging Face "
            "model's folder, or its id on the Hub."
        )
