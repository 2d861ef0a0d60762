"""A student with Muon that learns from a cache of the outputs of mixed.py's run. Paths are relative: see README.md."""

import dataclasses

from jaxtrain.config import Config
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.data.transforms import AtLeast, MinLength, Template
from jaxtrain.distill.teacher import Teacher
from jaxtrain.losses.distillation import Distillation
from jaxtrain.losses.divergences import TopK
from jaxtrain.optim.muon import Muon
from jaxtrain.plan import Stage
from jaxtrain.plan.schedules import WSD
from jaxtrain.tokenizers.sentencepiece import SentencePiece
from tests.golden.v0_1 import mixed


def get_config(arg: str = "") -> Config:
    config = mixed.get_config()
    sources = {
        "web": HuggingFace(
            name="golden/web",
            fetch_rows=16,
            max_samples=100,
            transforms=(AtLeast(column="int_score", value=1), Template(template="{title}: {text}")),
        ),
        "prose": TextFiles(patterns=("prose/*.txt",), max_samples=10, transforms=(MinLength(characters=10),)),
    }
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, hidden_size=16, intermediate_size=32, num_heads=2, num_kv_heads=1),
        tokenizer=SentencePiece(path="mixed/tokenizer/tokenizer.model"),
        teacher=Teacher(model="mixed", dtype="float32", cache="teacher"),
        distillation=Distillation(divergence=TopK(k=8), temperature=1.5, ce_weight=0.4, kd_weight=0.6),
        data=dataclasses.replace(config.data, sources=sources),
        stages=(Stage(seq_len=32, batch_size=8, weights={"web": 0.5, "prose": 0.5}),),
        total_tokens=24 * 256,
        micro_batch_tokens=None,
        optimizer=Muon(learning_rate=5e-3, schedule=WSD(warmup_fraction=0.1, decay_fraction=0.3)),
    )
