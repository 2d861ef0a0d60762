"""Distillation in minutes on a CPU, without a network.

First train the teacher, a small Llama on Python's standard library. Then distill a smaller student from it and, for
comparison, train the same student alone:

    python -m jaxtrain.main --config=configs/distill_smoke.py:teacher
    python -m jaxtrain.main --config=configs/distill_smoke.py
    python -m jaxtrain.main --config=configs/distill_smoke.py:alone

The same from a cache of the teacher's outputs for 200 documents, about 300 MB in the work directory:

    python -m tools.cache_teacher --config=configs/distill_smoke.py:cached
    python -m jaxtrain.main --config=configs/distill_smoke.py:cached

A student with a tokenizer of its own, from a cache by the teacher's, and for comparison the same student alone:

    python -m tools.cache_teacher --config=configs/distill_smoke.py:other
    python -m jaxtrain.main --config=configs/distill_smoke.py:other
    python -m jaxtrain.main --config=configs/distill_smoke.py:other_alone

Repeat a command to resume where it stopped. All commands read the teacher's tokenizer, and some its parameters, from
runs/distill_smoke-teacher, so start them in the same folder as the first.
"""

from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.config import Config, EvalConfig
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.distill.teacher import Teacher
from jaxtrain.errors import UserError
from jaxtrain.losses.distillation import Distillation
from jaxtrain.losses.divergences import ForwardKL, TopK
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.optim.muon import Muon
from jaxtrain.plan import Stage
from jaxtrain.plan.schedules import Cosine
from jaxtrain.tokenizers.sentencepiece import SentencePiece
from jaxtrain.tokenizers.training import TrainTokenizer

TEACHER = "runs/distill_smoke-teacher"
STUDENT = (48, 128, 2, 2, 120)
# Hidden size, MLP size, layers, heads, steps.
SIZES = {"teacher": (128, 352, 3, 4, 240)} | dict.fromkeys(("", "alone", "cached", "other", "other_alone"), STUDENT)


def get_config(arg: str = "") -> Config:
    if arg not in SIZES:
        raise UserError(f"configs/distill_smoke.py:{arg}: give {', '.join(filter(None, SIZES))}, or nothing")
    hidden, mlp, layers, heads, steps = SIZES[arg]
    cached, other = arg in ("cached", "other"), arg.startswith("other")
    # CPUs have no bfloat16 units.
    teacher = Teacher(model=TEACHER, dtype="float32", cache=f"runs/distill_smoke-{arg}/teacher" if cached else None)
    tokenizer = SentencePiece(path=f"{TEACHER}/tokenizer/tokenizer.model")
    if arg == "teacher":
        tokenizer = TrainTokenizer(kind="sentencepiece", vocab_size=2048, max_samples=300, sample_mb=2.0)
    elif other:
        tokenizer = TrainTokenizer(kind="bpe", vocab_size=1024, max_samples=100)
    ce_weight = 0.5 if other else 0.2  # a teacher with another tokenizer is silent at some positions
    return Config(
        model=LlamaConfig(
            hidden_size=hidden,
            intermediate_size=mlp,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads,
            max_seq_len=128,
            tie_embeddings=True,
            dtype="float32",
            remat="none",
        ),
        tokenizer=tokenizer,
        teacher=None if arg in ("teacher", "alone", "other_alone") else teacher,
        distillation=Distillation(
            divergence=TopK() if cached else ForwardKL(), ce_weight=ce_weight, kd_weight=1 - ce_weight
        ),
        data=DataConfig(
            sources={"python": TextFiles(max_samples=200 if cached or other else None)}, num_lanes=8, holdout=0.03
        ),
        stages=(Stage(seq_len=128, batch_size=16),),
        steps=steps,
        optimizer=Muon(learning_rate=5e-3, schedule=Cosine(warmup_fraction=0.05)),
        checkpoint=CheckpointConfig(every_steps=50),
        eval=EvalConfig(every_steps=120, tokens=16_384),
        log_every=10,
    )
