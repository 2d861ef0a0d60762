"""The shipped smoke configs for a few steps, on the golden files and tokenizer instead of the running Python's library.

Argument: quickstart, curriculum, teacher or student. Paths are relative: see README.md.
"""

import dataclasses

from configs import curriculum_smoke, distill_smoke, quickstart
from jaxtrain.config import Config
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.tokenizers.sentencepiece import SentencePiece

# Number of steps; for the curriculum, the first three stages and one step of the fourth.
RUNS = {
    "quickstart": (quickstart.get_config, "", 4),
    "curriculum": (curriculum_smoke.get_config, "", 36),
    "teacher": (distill_smoke.get_config, "teacher", 4),
    "student": (distill_smoke.get_config, "", 4),
}


def get_config(arg: str) -> Config:
    shipped, argument, steps = RUNS[arg]
    config = shipped(argument)
    return dataclasses.replace(
        config,
        tokenizer=SentencePiece(path="mixed/tokenizer/tokenizer.model"),
        data=dataclasses.replace(
            config.data,
            holdout=0.1,
            sources={name: TextFiles(patterns=("prose/*.txt",)) for name in config.data.sources},
        ),
        steps=steps,
        eval=dataclasses.replace(config.eval, tokens=2048),
        log_every=1,
        sample_prompts=(),
    )
