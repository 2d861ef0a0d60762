"""configs/gemma3_1b.py with a small model, against a Hub with a small stand-in for FineWeb-Edu."""

import pathlib

import pytest

from jaxtrain.tokenizers.training import TrainTokenizer
from tests.e2e.runs import Run, documents, environment
from tests.hub import LoopbackHub, parquet_bytes

SMALL = (
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=64",
    "--config.model.num_layers=8",
    "--config.model.head_dim=8",
    "--config.model.sliding_window=16",
    "--config.model.max_seq_len=64",
    "--config.stages.0.seq_len=64",
    "--config.stages.0.tokens_per_batch=512",
    "--config.eval.tokens=1024",
    "--config.data.num_lanes=4",
    "--config.data.shuffle_window=8",
    "--config.tokenizer.vocab_size=none",
)


@pytest.mark.slow
def test_plans_and_trains(tmp_path: pathlib.Path) -> None:
    TrainTokenizer(kind="bpe", vocab_size=400, max_samples=200).train(documents(0, 200), tmp_path, progress=False)
    with LoopbackHub() as hub:
        files = {f"sample/100BT/{file:03}.parquet": parquet_bytes(documents(file, 400)) for file in range(3)}
        card = "---\nconfigs:\n- config_name: sample-100BT\n  data_files: sample/100BT/*.parquet\n---\n"
        hub.commit("HuggingFaceFW/fineweb-edu", {**files, "README.md": card.encode()})
        run = Run(tmp_path / "run", "configs/gemma3_1b.py", environment(hub.env()))
        small = (*SMALL, f"--config.tokenizer.name={tmp_path / 'tokenizer'}")
        run("--dry_run", *small)
        assert "20,000,000,000 tokens" in run.output
        run("--config.steps=3", "--config.total_tokens=none", "--config.log_every=1", *small)
        assert [line["tokens"] for line in run.steps()] == [512, 1024, 1536]
