"""A 270M Llama (270.6 million parameters) trained through a ten-stage curriculum of 1 billion tokens from the Hub.

Rows grow from 8 to 2,048 tokens, and the shares of mathematics and code grow with them. Half of each row is repeated in
the next row of its lane and source. The run ends at exactly 1,000,000,000 trained tokens.

The embedding is tied to the output head: 50 million of the 270 million parameters. A separate head would put a third of
the parameters into two tables whose rows mostly hardly occur in a billion tokens (Press & Wolf 2017; MobileLLM, Liu et
al. 2024, section 2.2.3, ties them below a billion parameters).
"""

from configs import _curriculum
from configs._base import fineweb_edu
from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.config import Config, EvalConfig
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.optim.adamw import AdamW
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer

# Multiples of 32 lanes (and so of 8). Stages 1 to 5 take 131,072 tokens per step, the others 245,760 or 262,144. While
# the loss falls fast, small batches learn more from each token (McCandlish et al. 2018), and the 10 million tokens of
# stage 1 give 77 updates. Later, large batches use the devices better. No stage is a whole number of batches: each ends
# at the step that reaches its cumulative bound, which shortens the next by less than 0.7%. The last batch is masked.
_BATCH_SIZES = (16_384, 8192, 4096, 2048, 1024, 1024, 512, 320, 160, 128)


def get_config(arg: str = "") -> Config:
    tokens = 1_000_000_000
    return Config(
        model=LlamaConfig(
            hidden_size=1024,
            intermediate_size=2560,
            num_layers=21,
            num_heads=16,
            num_kv_heads=4,
            max_seq_len=2048,
            tie_embeddings=True,
        ),
        tokenizer=HuggingFaceTokenizer(name="HuggingFaceTB/SmolLM2-135M", vocab_size=49_152),
        data=DataConfig(
            sources={
                "web": fineweb_edu(tokens),
                "math": HuggingFace(name="Yxanul/cc-math-finest"),
                "code": HuggingFace(name="Yxanul/python-finest-pretrain"),
            },
            num_lanes=32,
            holdout=0.01,
        ),
        stages=_curriculum.stages(_BATCH_SIZES, tokens_per_million=1_000_000),
        total_tokens=tokens,
        micro_batch_tokens=32_768,
        optimizer=AdamW(learning_rate=6e-4, schedule=_curriculum.schedule()),
        checkpoint=CheckpointConfig(every_steps=250, keep=2),
        # Evaluation always uses the last stage's rows and mix, so that losses are comparable across stages.
        eval=EvalConfig(every_tokens=25_000_000, tokens=524_288, batch_size=32),
        sample_prompts=("The capital of France is", "To solve 2x + 3 = 11, ", "def fibonacci(n):"),
    )
