"""configs/270m_curriculum.py with a small model, against a Hub with small stand-ins for its three datasets."""

import pathlib

import pytest

from jaxtrain.tokenizers.training import TrainTokenizer
from tests.e2e.runs import Run, documents, environment
from tests.hub import LoopbackHub, parquet_bytes

SMALL = (
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=64",
    "--config.model.num_layers=1",
    "--config.model.num_heads=2",
    "--config.model.num_kv_heads=1",
    "--config.eval.tokens=4096",
    "--config.eval.seq_len=128",
    "--config.data.shuffle_window=8",  # with larger windows, the stand-ins do not have documents for every lane
)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_streams_its_datasets(tmp_path: pathlib.Path) -> None:
    TrainTokenizer(kind="bpe", vocab_size=400, max_samples=200).train(documents(0, 200), tmp_path, progress=False)
    with LoopbackHub() as hub:
        for number, name in enumerate(
            ("HuggingFaceFW/fineweb-edu", "Yxanul/cc-math-finest", "Yxanul/python-finest-pretrain")
        ):
            folder = "sample/10BT" if number == 0 else "data"
            files = {
                f"{folder}/{file:03}.parquet": parquet_bytes(documents(100 * number + file, 400), row_group_size=50)
                for file in range(3)
            }
            if number == 0:
                card = "---\nconfigs:\n- config_name: sample-10BT\n  data_files: sample/10BT/*.parquet\n---\n"
                files["README.md"] = card.encode()
            hub.commit(name, files)
        # The dry run compiles ten stages.
        quickly = environment(hub.env(), JAX_DISABLE_MOST_OPTIMIZATIONS="1")
        run = Run(tmp_path / "run", "configs/270m_curriculum.py", quickly)
        small = (*SMALL, f"--config.tokenizer.name={tmp_path / 'tokenizer'}")
        run("--dry_run", *small)
        assert "10/10 Final Polish" in run.output
        assert "4,572 steps, 1,000,000,000 tokens; 199,168 of the last batch's 262,144 tokens count." in run.output
        for name in ("web", "math", "code"):
            assert f"  {name}: " in run.output
        run("--config.steps=3", "--config.log_every=1", *small)
        lines = run.steps()
        assert [line["tokens"] for line in lines] == [131_072, 262_144, 393_216]
        assert "| Stage 1/10 (393,216/393,216 tokens, 100.0%)" in run.output
        shares = {name: source["share"] for name, source in lines[-1]["sources"].items()}
        assert shares == pytest.approx({"web": 0.95, "math": 0.05, "code": 0.0}, abs=8 / 393_216)
