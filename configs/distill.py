"""A student with SmolLM2-360M's shape, distilled on the fly from SmolLM2-1.7B on FineWeb-Edu streamed from the Hub.

The teacher's bfloat16 parameters (3.4 GB) are on the devices beside the student's, sharded the same way. Its outputs
are not stored. `--config.teacher.model=` sets another model with the same vocabulary, or a folder.

`:cached` trains for several epochs on the teacher's cached outputs for the first million documents (260 GB):

    launch/local.sh 8 python -m tools.cache_teacher --config=configs/distill.py:cached --output=/data/teacher
    python -m jaxtrain.main --config=configs/distill.py:cached --config.teacher.cache=/data/teacher
"""

import dataclasses

from configs._base import pretrain
from jaxtrain.config import Config
from jaxtrain.distill.teacher import Teacher
from jaxtrain.errors import UserError
from jaxtrain.losses.distillation import Distillation
from jaxtrain.losses.divergences import ForwardKL, TopK
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer

TEACHER = "HuggingFaceTB/SmolLM2-1.7B"


def get_config(arg: str = "") -> Config:
    model = LlamaConfig(
        hidden_size=960,
        intermediate_size=2560,
        num_layers=32,
        num_heads=15,
        num_kv_heads=5,
        max_seq_len=2048,
        rope_theta=100_000.0,
        tie_embeddings=True,
    )
    if arg not in ("", "cached"):
        raise UserError(f"configs/distill.py:{arg}: give cached, or nothing")
    config = pretrain(
        model, total_tokens=10_000_000_000, batch_tokens=524_288, learning_rate=5e-4, micro_batch_tokens=16_384
    )
    if arg == "cached":
        for source in config.data.sources.values():
            source.max_samples = 1_000_000
    return dataclasses.replace(
        config,
        tokenizer=HuggingFaceTokenizer(name=TEACHER, vocab_size=49_152),
        teacher=Teacher(model=TEACHER, cache="runs/distill-cached/teacher" if arg == "cached" else None),
        distillation=Distillation(
            divergence=TopK(k=64) if arg == "cached" else ForwardKL(), ce_weight=0.3, kd_weight=0.7
        ),
    )
