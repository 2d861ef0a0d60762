"""Commands typed by habit, and the answer to each: it trains, or the message says how that is written here.

In one process, up to the config and its plan. What needs a run is in tests/e2e/test_typed.py.
"""

import shlex
from collections.abc import Callable
from typing import Any

import pytest

from jaxtrain import cli
from jaxtrain.errors import UserError
from jaxtrain.main import COMMAND
from tools import train_tokenizer
from tools.inspect_stream import __main__ as inspect_stream

ONE = "--config=configs/1b.py"
WEB = "--config.data.sources.fineweb_edu"

# Command → what holds for its config.
WORKS: list[tuple[str, Callable[[Any], Any]]] = [
    (f"{ONE} --config.optimizer.schedule=Constant", lambda c: c.optimizer.schedule.warmup_fraction == 0.01),
    (f"{ONE} --config.optimizer.schedule=wsd --config.optimizer.schedule.decay_fraction=0.2", lambda c: c.plan()),
    (f"{ONE} --config.optimizer.schedule=Linear", lambda c: c.plan().at(19_000).learning_rate < 1e-4),
    (f"{ONE} --config.optimizer=Muon", lambda c: c.optimizer.momentum == 0.95 and c.optimizer.learning_rate == 3e-4),
    (f"{ONE} --config.optimizer=muon --config.optimizer.momentum=0.9", lambda c: c.optimizer.momentum == 0.9),
    (f"{ONE} --config.optimizer=Lion --config.optimizer.betas=0.8,0.9", lambda c: c.optimizer.betas == (0.8, 0.9)),
    (f"{ONE} --config.optimizer=ScheduleFreeAdamW", lambda c: c.optimizer.weight_decay == 0.1),
    (f"{ONE} --config.optimizer=adafactor --config.optimizer.momentum=0.9", lambda c: c.optimizer.relative),
    (f"{ONE} --config.tokenizer=TrainTokenizer", lambda c: c.tokenizer.vocab_size == 49_152),
    (f"{ONE} --config.tokenizer=TrainTokenizer --config.tokenizer.kind=bpe", lambda c: c.tokenizer.kind == "bpe"),
    (
        f"{ONE} --config.data.sources.code=TextFiles --config.stages[0].weights.code=0.1 "
        "--config.stages[0].weights.fineweb_edu=0.9",
        lambda c: c.data.sources["code"].document == "file",
    ),
    (f"{ONE} {WEB}=TextFiles {WEB}.patterns=README.md", lambda c: c.data.sources["fineweb_edu"].patterns),
    (f"{ONE} {WEB}.name=wikitext-103 {WEB}.config_name=none", lambda c: c.plan()),
    (f"{ONE} {WEB}.name=json {WEB}.data_files='a-{{00..09}}.jsonl'", lambda c: c.plan()),
    (f"{ONE} {WEB}.transforms[0]=MinLength {WEB}.transforms[0].characters=200", lambda c: c.plan()),
    (f"{ONE} {WEB}.max_samples=10000 --config.total_tokens=none --config.epochs=1", lambda c: c.plan()),
    (f"{ONE} {WEB}.max_samples=10000", lambda c: c.data.shuffle_window is None),
    (f"{ONE} --config.steps=10 --config.steps=20", lambda c: c.plan().last_step == 20),
    (f"{ONE} --config.total_tokens=1_000_000_000", lambda c: c.plan().total_tokens == 10**9),
    (f"{ONE} --config.total_tokens=1e9", lambda c: c.plan().total_tokens == 10**9),
    (f"{ONE} --config.stages.0.seq_len=1024", lambda c: c.plan().stages[0].batch_size == 1024),
    (f"{ONE} --config.teacher.model=HuggingFaceTB/SmolLM2-1.7B", lambda c: c.teacher is not None),
    (f"{ONE} --config.distillation.divergence=JSD", lambda c: c.plan()),
    (f"{ONE} --config.monitor.trackers=wandb", lambda c: c.monitor.trackers == ("wandb",)),
    (f"{ONE} --workdir runs/mine --config.seed=1", lambda c: c.seed == 1),
    ("--config configs/1b.py", lambda c: c.plan()),
    ("--config=configs/270m_curriculum.py --config.scale_to=2e9", lambda c: c.plan().total_tokens == 2 * 10**9),
    ("--config=configs/80m.py:data/part-{000..005}.jsonl.gz", lambda c: c.data.sources["shards"].name == "json"),
    ("--config=configs/80m.py:data/*.parquet", lambda c: c.data.sources["shards"].name == "parquet"),
    ("--config=configs/80m.py:s3://b/s-{0..9}.tar.bz2", lambda c: c.data.sources["shards"].urls),
    ("--config=configs/pretrain.py:small", lambda c: c.plan()),
]
# Command → parts of the answer, all with exit code 2.
ANSWERED = [
    (f"{ONE} --stream", "datasets are streamed by default"),
    (f"{ONE} --streaming=true", "datasets are streamed by default"),
    (f"{ONE} --dataset=HuggingFaceFW/fineweb", "--config.data.sources.NAME.name=ORG/DATASET"),
    (f"{ONE} --max-samples=10000", "--config.data.sources.NAME.max_samples=N"),
    (f"{ONE} --max_samples 10000", "--config.data.sources.NAME.max_samples=N"),
    (f"{ONE} --experiment=mine", "--workdir=DIR"),
    (f"{ONE} --output_dir=out", "--workdir=DIR"),
    (f"{ONE} --resume", "the same command again"),
    (f"{ONE} --batch-size=32", "--config.stages[0].batch_size=ROWS"),
    (f"{ONE} --lr=3e-4", "--config.optimizer.learning_rate=3e-4"),
    (f"{ONE} --epochs=3", "--config.epochs=N"),
    (f"{ONE} --max_steps=100", "--config.steps=N"),
    (f"{ONE} --bf16", "--config.model.dtype=float32 or bfloat16 (mixed precision"),
    (f"{ONE} --wandb", "--config.monitor.trackers=wandb"),
    (f"{ONE} --optimizer.learning_rate=1e-3", "--config.optimizer.learning_rate=VALUE"),
    (f"{ONE} --dry-run", "Did you mean --dry_run?"),
    (f"{ONE} config.steps=5", "did you mean --config.steps=5?"),
    (f"{ONE} steps=5", "did you mean --config.steps=5?"),
    (f"{ONE} --config.steps 5", "an override is written --config.FIELD=VALUE"),
    (f"{ONE} --config.gradient_accumulation=4", "--config.micro_batch_tokens=N"),
    (f"{ONE} --config.gradient_accumulation_steps=4", "--config.micro_batch_tokens=N"),
    (f"{ONE} --config.warmup_steps=100", "--config.optimizer.schedule.warmup_tokens?"),
    (f"{ONE} --config.learning_rate=1e-3", "--config.optimizer.learning_rate?"),
    (f"{ONE} --config.optimizer=Loin", "choose AdamW or Muon or Lion or Signum or Adan or Adafactor"),
    (f"{ONE} --config.optimizer=SOAP", "optax has no SOAP or Shampoo"),
    (f"{ONE} --config.optimizer=Sophia", "its Sophia needs second derivatives of the loss"),
    (f"{ONE} --config.optimizer=adam", "Here that is --config.optimizer=AdamW."),
    (f"{ONE} --config.optimizer=Lion --config.optimizer.betas=0.9,1.0", "config.optimizer.betas=(0.9, 1.0)"),
    (f"{ONE} --config.optimizer.schedule=cosine_with_restarts", "choose Constant or Cosine or Linear or WSD"),
    (f"{ONE} --config.optimizer.schedule=WSD", "for example decay_fraction=0.2"),
    (f"{ONE} --config.data.sources.code=HuggingFace", "needs --config.data.sources.code.name=text too"),
    (f"{ONE} --config.data.sources.code=TextFiles", "give each one's share"),
    (f"{ONE} --config.total_tokens=none", "max_samples MUST be specified for streaming datasets!"),
    (f"{ONE} {WEB}.data_files=d/a.jsonl {WEB}.data_files=d/b.jsonl", "quote the value if the shell expanded"),
    (f"{ONE} README.md pyproject.toml", "quote a pattern"),
    ("--config=configs/80m.py:s-0.tar --config=configs/80m.py:s-1.tar", "quote the value if the shell expanded"),
    ("--config=configs/270m.py", "configs/270m_curriculum.py"),
    ("--config=configs/pretrain.py:1B", "configs/1b.py"),
    ("--config=configs/270m_curriculum.py --config.total_tokens=2e9", "scale_to=2000000000"),
    ("--config=1b.py", "there is no file 1b.py"),
    ("", "--config=FILE is missing"),
    (f"{ONE} --config.data.sources.web=WebDataset --config.data.sources.web.urls=a.jsonl", "are not tar archives"),
    # nanochat
    (f"{ONE} --device_batch_size=32", "--config.micro_batch_tokens=N"),
    (f"{ONE} --total_batch_size=524288", "--config.stages[0].tokens_per_batch=N"),
    (f"{ONE} --depth=20", "--config=configs/pretrain.py:small"),
    (f"{ONE} --num_iterations=1000", "--config.steps=N"),
    # MaxText
    ("src/maxtext/configs/base.yml run_name=mine", "a config is a Python file"),
    (f"{ONE} run_name=mine", "Here that is --workdir=DIR"),
    (f"{ONE} per_device_batch_size=4", "--config.stages[0].batch_size=ROWS"),
    (f"{ONE} ici_fsdp_parallelism=8", "--config.mesh.fsdp=N"),
    (f"{ONE} --config.model.base_emb_dim=256", "Here that is --config.model.hidden_size=N"),
    # torchtitan
    (f"{ONE} --training.seq_len=2048", "--config.stages[0].seq_len=N"),
    (f"{ONE} --parallelism.tensor_parallel_degree=4", "--config.mesh.tensor=N"),
    (f"{ONE} --activation_checkpoint.mode=full", "--config.model.remat=full"),
    (f"{ONE} --training.compile", "every step is compiled"),
    (f"{ONE} --job.config_file=a.toml", "--config=configs/1b.py"),
    # llm-foundry
    ("train.yaml", "--config=FILE.py"),
    (f"{ONE} max_duration=100ba", "--config.steps=N"),
    (f"{ONE} optimizer.lr=1e-4", "--config.optimizer.learning_rate=3e-4"),
    # transformers
    (f"{ONE} --weight_decay=0.1", "--config.optimizer.weight_decay=0.1"),
    (f"{ONE} --deepspeed=z3.json", "--config.mesh.fsdp=N"),
    (f"{ONE} --push_to_hub", "python -m tools.export_hf"),
    # litgpt
    (f"{ONE} --train.max_tokens=1000", "--config.total_tokens=N"),
    (f"{ONE} --initial_checkpoint_dir=x", "--config.init_from=ORG/MODEL"),
    (f"{ONE} --num_nodes=2", "launch/slurm.sbatch"),
    # axolotl
    (f"{ONE} --base_model=ORG/MODEL", "--config.init_from=ORG/MODEL"),
    (f"{ONE} --num_epochs=3", "--config.epochs=N"),
    (f"{ONE} --val_set_size=0.01", "--config.data.holdout=0.01"),
    (f"{ONE} --sample_packing=true", "documents are always packed"),
    (f"{ONE} --config.save_every=100", "--config.checkpoint.every_steps=N"),
    (f"{ONE} --config.fp8=true", "--config.precision=fp8"),
]


@pytest.fixture(autouse=True)
def repository_root(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)


def test_the_table_is_long_enough():
    assert len(WORKS) + len(ANSWERED) >= 60


@pytest.mark.parametrize(("command", "holds"), WORKS)
def test_it_works(command: str, holds: Callable[[Any], Any]):
    assert holds(cli.parse_flags(COMMAND, shlex.split(command)).load_config())


@pytest.mark.parametrize(("command", "answer"), ANSWERED)
def test_it_is_answered(command: str, answer: str):
    with pytest.raises(UserError) as caught:
        cli.parse_flags(COMMAND, shlex.split(command)).load_config()
    assert answer in str(caught.value)


@pytest.mark.parametrize("command", [inspect_stream.COMMAND, train_tokenizer.COMMAND])
def test_tools_answer_too(command: cli.Command):
    with pytest.raises(UserError, match="Here that is --config"):
        cli.parse_flags(command, [ONE, "--lr=1"])
