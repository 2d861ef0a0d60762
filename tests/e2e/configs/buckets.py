"""One stage on tar shards, parquet and JSON lines in the bucket `data`. Argument: s3|TOKENIZER'S MODEL, or gs|..."""

from jaxtrain.config import Config
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.data.sources.webdataset import WebDataset
from jaxtrain.plan import Stage
from tests.e2e.configs import tiny


def get_config(arg: str) -> Config:
    scheme, tokenizer = arg.split("|")
    config = tiny.get_config(tokenizer)
    config.data.sources = {
        "tars": WebDataset(urls=(f"{scheme}://data/tars/shard-{{0..3}}.tar.bz2",)),
        "web": HuggingFace(name="parquet", data_files=(f"{scheme}://data/web/*.parquet",)),
        "code": HuggingFace(name="json", data_files=(f"{scheme}://data/code/train-*.jsonl.gz",)),
    }
    config.stages = (Stage(seq_len=32, batch_size=8, weights={"tars": 0.4, "web": 0.4, "code": 0.2}),)
    config.total_tokens = 32 * 8 * 30
    config.eval.every_steps = None
    return config
