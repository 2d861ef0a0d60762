"""tools.inspect_stream on a Hub and local files: its description of a step, against the files and the data path."""

import functools
import json
import pathlib

import pytest

from jaxtrain import cli
from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.data import ledger, pipeline
from jaxtrain.errors import TransientError
from jaxtrain.tokenizers.sentencepiece import SentencePiece
from jaxtrain.tokenizers.training import TrainTokenizer
from jaxtrain.trainer import compatibility
from tests.e2e.conftest import WIKI, fill
from tests.e2e.runs import documents
from tests.hub import LoopbackHub, parquet_bytes
from tools.inspect_stream import __main__ as inspect_stream
from tools.inspect_stream import inspect
from tools.pretokenize import __main__ as pretokenize

CONFIG = """
from jaxtrain.data.sources.text_files import TextFiles
from tests.e2e.configs import tiny

def get_config(arg=''):
    config = tiny.get_config({tokenizer!r})
    config.data.sources["lines"] = TextFiles(patterns=({lines!r},), document="line")
    config.stages[1].weights = {{"web": 0.5, "wiki": 0.2, "code": 0.2, "lines": 0.1}}
    return config
"""
LINES = documents(30, 200, words=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    TrainTokenizer(vocab_size=384, max_samples=200).train(documents(0, 200), folder, progress=False)
    return str(folder / "tokenizer" / "tokenizer.model")


@pytest.fixture
def spec(hub: LoopbackHub, tokenizer: str, tmp_path, request, monkeypatch) -> str:
    """The end-to-end tests' config (three stages, shuffle, overlap, holdout, 4 lanes), with local lines too."""
    monkeypatch.chdir(request.config.rootpath)
    fill(hub)
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(LINES) + "\n")
    path = tmp_path / "traced.py"
    path.write_text(CONFIG.format(tokenizer=tokenizer, lines=str(lines)))
    return str(path)


@pytest.fixture
def answer(spec, tmp_path, capfd):
    """Runs the tool: (code, output, errors, the answer in JSON)."""

    def answer(*flags: str, config: str | None = None):
        path = tmp_path / "answer.json"
        path.unlink(missing_ok=True)
        # Otherwise the one from an earlier call in the same work directory wins.
        given = [] if any(flag.startswith("--workdir") for flag in flags) else [f"--workdir={tmp_path / 'none'}"]
        arguments = [f"--config={config or spec}", f"--json={path}", *given, *flags]
        code = cli.exit_code(inspect_stream.main, inspect_stream.COMMAND, arguments)
        out, err = capfd.readouterr()
        return code, out, err, json.loads(path.read_text()) if path.exists() else None

    return answer


def text_of(source: str, file: str, row: int) -> str:
    """A document, read from the files."""
    if source == "web":
        return documents(int(file.removeprefix("data/train-").removesuffix(".parquet")), 120)[row]
    return {"wiki": WIKI, "code": documents(20, 300), "lines": LINES}[source][row]


def run_of(spec: str, workdir: pathlib.Path, last_step: int) -> list[pipeline.StepBatch]:
    """The batches of training, and a checkpoint of each step's data state in the work directory."""
    config = cli.load(spec, [])
    made = inspect.connect(config, str(workdir))
    plan, lanes = made.plan, range(config.data.num_lanes)
    batches = pipeline.host_batches(made.readers, plan, made.rows, lanes, made.threads, after=0, states={}, prefetch=2)
    found = [next(batches) for _ in range(last_step)]
    batches.close()
    identities = compatibility.identities(config, made.readers, made.tokenizer, plan, made.forgotten)
    for batch in found:
        states = ledger.gather(batch.states, config.data.num_lanes)
        at = plan.at(batch.step)
        data = {"step": batch.step, "tokens": at.tokens_after, "data_ended": False}
        data["lanes"] = ledger.to_json(states, plan.source_names)
        folder = workdir / "checkpoints" / str(batch.step) / "data"
        folder.mkdir(parents=True)
        (folder / "metadata").write_text(json.dumps({**identities, **data}))
    return found


def keep_only(workdir: pathlib.Path, step: int) -> None:
    folders = (workdir / "checkpoints").iterdir()
    for folder in [folder for folder in folders if folder.name != str(step)]:
        folder.rename(workdir / folder.name)


def test_every_token_of_a_step_is_traced(spec, answer, tokenizer, tmp_path):
    workdir = tmp_path / "run"
    model = SentencePiece(path=tokenizer).build("")
    batches = run_of(spec, workdir, 47)
    sources = set()
    for step, kept in ((1, 20), (18, 17), (30, 20), (36, 20), (38, 30), (47, 46)):
        for folder in workdir.glob("[0-9]*"):
            folder.rename(workdir / "checkpoints" / folder.name)
        keep_only(workdir, kept)
        code, out, err, resumed = answer(f"--at_step={step}", f"--workdir={workdir}")
        assert code == 0, err
        nearest = kept if kept < step else None
        assert resumed.pop("from_checkpoint") == nearest
        assert f"checkpoint of step {nearest}" in out if nearest else "from the beginning of the run" in out
        assert f"{step - 1 - (nearest or 0)} steps before step {step}." in out
        _, _, _, replayed = answer(f"--at_step={step}")
        assert replayed.pop("from_checkpoint") is None
        assert replayed == resumed
        batch = batches[step - 1].arrays
        assert len(replayed["rows"]) == len(batch["tokens"]) == replayed["batch_size"]
        for number, row in enumerate(replayed["rows"]):
            assert (row["row"], row["lane"]) == (number, number * 4 // len(batch["tokens"]))
            expected: list[int] = []
            for span in row["documents"]:
                ids, _ = model.encode_batch([text_of(row["source"], span["file"], span["row"])])
                expected += [*ids.tolist(), model.eos_id][span["first"] : span["end"]]
                sources.add(row["source"])
            assert expected == batch["tokens"][number].tolist()
            assert f"row {number} (lane {row['lane']}, {row['source']}): " in out
    assert sources == {"web", "wiki", "code", "lines"}


def test_the_last_batch_shows_what_is_masked(answer):
    code, out, _, found = answer("--at_step=48")
    assert code == 0
    assert [row["counted"] for row in found["rows"]] == [64, 36, 0, 0, 0, 0, 0, 0]
    lines = [line for line in out.splitlines() if line.startswith("row ")]
    assert "(only its first 36 tokens count: the run ends here)" in lines[1]
    assert lines[0].endswith(")")
    assert "the run ends here" not in lines[0]
    assert lines[7].endswith("(masked: the run ends here)")


def test_a_moved_branch_does_not_change_what_a_run_trained_on(hub, spec, answer, tmp_path):
    workdir = tmp_path / "run"
    run_of(spec, workdir, 6)
    keep_only(workdir, 6)
    before = answer("--at_step=3", f"--workdir={workdir}")[3]
    hub.commit("e2e/web", {"data/train-0.parquet": parquet_bytes(documents(99, 120), row_group_size=12)})
    assert answer("--at_step=3", f"--workdir={workdir}")[3] == before
    code, _, err, _ = answer("--at_step=3", f"--workdir={workdir}", "--config.seed=8")
    assert code == 2
    assert "seed" in err
    assert "another config" in err


def test_sources_are_read_as_the_run_reads_them(hub, spec, answer, tmp_path):
    """From the cache and from token stores, while a run holds the work directory; the answer never changes."""
    workdir = tmp_path / "run"
    ask = functools.partial(answer, "--at_step=30", f"--workdir={workdir}")
    code, out, err, expected = ask()
    assert code == 0, err
    assert "Source web: stream, as data.mode says" in out
    assert not workdir.exists()
    with Workdir(workdir):
        code, out, err, found = ask("--config.data.mode=download")
        assert code == 0, err
        assert "Source web: download, as data.mode says" in out
        assert "Source lines: stream, its files are on this machine" in out
        assert found == expected
        downloaded, asked = sorted((workdir / "cache" / "data").iterdir()), hub.bytes("/cdn/")
        assert len(downloaded) == 6 + 1  # files, and the cache's own lock
        assert ask("--config.data.mode=download")[3] == expected
        # The footers of two files show that the columns exist.
        assert hub.bytes("/cdn/") - asked < sum(file.stat().st_size for file in downloaded) / 2
        assert sorted((workdir / "cache" / "data").iterdir()) == downloaded
        command = [f"--config={spec}", f"--workdir={workdir}", "--all"]
        assert cli.exit_code(pretokenize.main, pretokenize.COMMAND, command) == 0
        hub.fault("", "status:503")
        for mode, why in (("pretokenized", "as data.mode says"), ("auto", "its token store")):
            code, out, err, found = ask(f"--config.data.mode={mode}")
            assert code == 0, err
            assert all(f"Source {name}: pretokenized, {why}" in out for name in ("web", "wiki", "code", "lines"))
            assert found == expected


def test_bare_shows_the_first_and_the_last_stage(answer):
    code, out, err, found = answer("--samples=60")
    assert code == 0, err
    for line in ("Loading HuggingFace dataset... web, wiki, code", "HuggingFace streaming ready", "Time estimate: "):
        assert line in out
    assert out.endswith("\nStreaming completed successfully!\n")
    assert [stage["stage"] for stage in found["stages"]] == [1, 3]
    for stage, weights in zip(found["stages"], ({"web": 0.7, "wiki": 0.3}, {"web": 0.2, "code": 0.8}), strict=True):
        assert stage["documents"] >= 60 or stage["steps_read"] in (16, 12)
        shares = {name: given["share"] for name, given in stage["sources"].items()}
        assert shares.keys() == weights.keys()
        rows = stage["steps_read"] * stage["batch_size"]
        assert all(abs(shares[name] - weight) < 1.01 / rows for name, weight in weights.items())
        assert stage["tokens_per_second"] > 0
    assert found["estimate_seconds"] > 0
    for number in (1, 2, 3):
        assert f"  Sample {number} (" in out
    for line in (line for line in out.splitlines() if line.startswith(("  Sample 1", "  Sample 2"))):
        source, file, row = line.split("(")[1].split(")")[0].replace(", ", " ").replace(" row ", " ").split()
        shown = line.split(": ", 1)[1].strip("'")
        assert shown
        assert text_of(source, file, int(row)).startswith(shown[:30])


def test_stages_and_transitions(answer):
    assert [stage["stage"] for stage in answer("--stage=2", "--samples=5")[3]["stages"]] == [2]
    assert [stage["stage"] for stage in answer("--all_stages", "--samples=5")[3]["stages"]] == [1, 2, 3]
    code, out, _, found = answer("--transitions")
    assert code == 0
    first, second = found["transitions"]
    assert [step["step"] for step in first["steps"]] == [15, 16, 17, 18]
    assert [step["shape"] for step in first["steps"]] == [[16, 16], [16, 16], [8, 32], [8, 32]]
    assert [step["shape"] for step in second["steps"]] == [[8, 32], [8, 32], [8, 64], [8, 64]]
    assert [sum(step["rows"].values()) for step in second["steps"]] == [8, 8, 8, 8]
    assert first["steps"][1]["tokens_after"] == first["steps"][2]["tokens_before"] == 4096
    assert "Stage 1 (short) to stage 2 (mixed):" in out


def test_data_that_ends_and_long_replays(answer, monkeypatch):
    monkeypatch.setattr(inspect, "_LOGGED_STEPS", 2)
    few = [f"--config.data.sources.{name}.max_samples=3" for name in ("web", "wiki", "code", "lines")]
    code, out, err, found = answer("--transitions", "--config.epochs=1", "--config.data.num_lanes=1", *few)
    assert code == 0, err
    assert "(read from its beginning, the data ends here)" in out
    assert [len(change["steps"]) for change in found["transitions"]] == [4, 3]
    code, out, err, _ = answer("--at_step=21")
    assert code == 0, err
    assert [line for line in out.splitlines() if line.endswith(" of 20 steps")] == [
        f"  {number} of 20 steps" for number in range(2, 21, 2)
    ]


def test_a_tokenizer_of_the_runs_own_is_trained_in_the_work_directory(answer, tmp_path):
    flags = (f"--workdir={tmp_path / 'own'}", "--config.tokenizer.max_samples=20", "--config.tokenizer.vocab_size=400")
    code, out, err, _ = answer("--samples=3", *flags, config="configs/quickstart.py")
    assert code == 0, err
    assert "Tokenizer trained and saved to" in out
    assert (tmp_path / "own" / "tokenizer" / "training.json").exists()
    code, out, err, _ = answer("--samples=3", *flags, config="configs/quickstart.py")
    assert code == 0, err
    assert "Tokenizer trained" not in out
    code, out, _, found = answer("--transitions", *flags, config="configs/quickstart.py")
    assert code == 0
    assert "one stage" in out
    assert found == {"transitions": []}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--at_step=49"], "step 49 is past the end of the run, step 48"),
        (["--at_step=0"], "--at_step=0: steps count from 1"),
        (["--stage=4"], "--stage=4: the run has no such stage with steps; give 1 or 2 or 3"),
        (["--stage=1", "--transitions"], "--stage and --transitions"),
        (["--samples=0"], "--samples=0"),
        (["--by=url"], "--by and --source belong to --documents"),
        (["--documents=@no/such/file"], "cannot be read"),
        (["--documents=x", "--source=wbe"], "--source=wbe: the config has web, wiki, code, lines"),
        (["--config.data.sources.web.name=e2e/gone"], "source 'web'"),
        (["--config.data.sources.code.column=body"], "source 'code'"),
    ],
)
def test_what_the_user_must_change_is_one_message(answer, flags, said):
    code, out, err, _ = answer(*flags)
    assert code == 2
    assert said in err
    assert err.startswith("error: ")
    assert "completed" not in out


def test_an_outage_is_exit_code_1(answer, monkeypatch):
    def unreachable(*_):
        raise TransientError("source 'web': nothing answers")

    monkeypatch.setattr(pipeline, "resolve", unreachable)
    code, out, err, _ = answer()
    assert code == 1
    assert err.startswith("error: source 'web': nothing answers\n")
    assert "Traceback" not in err
    assert "ready" not in out


def test_documents_are_found_and_left_out_in_every_mode(hub, spec, answer, tmp_path):
    at_step = functools.partial(answer, "--at_step=30", f"--workdir={tmp_path / 'run'}")
    rows = at_step()[3]["rows"]
    spans = {(row["source"], span["file"], span["row"]) for row in rows for span in row["documents"]}
    gone = sorted(spans)[::3]
    values = tmp_path / "texts.txt"
    values.write_text("".join(f"{text_of(*address)}\n" for address in gone) + "\nnowhere to be found\n")
    forget = tmp_path / "asked.json"
    code, out, err, found = answer(f"--documents=@{values}")
    assert code == 0, err
    assert found["missing"] == ["nowhere to be found"]
    listed = {(name, file, row) for name, files in found["documents"].items() for file in files for row in files[file]}
    assert set(gone) <= listed
    assert "1 of" in out.splitlines()[-3]
    forget.write_text(json.dumps(found))
    flag = f"--config.data.forget={forget}"
    code, out, err, without = at_step(flag)
    assert code == 0, err
    assert "document(s) are left out" in out
    left = {(row["source"], span["file"], span["row"]) for row in without["rows"] for span in row["documents"]}
    assert not left & listed
    assert left
    assert at_step(flag, "--config.data.mode=download")[3] == without
    command = [f"--config={spec}", f"--workdir={tmp_path / 'run'}", "--all"]
    assert cli.exit_code(pretokenize.main, pretokenize.COMMAND, command) == 0
    assert at_step(flag, "--config.data.mode=pretokenized")[3] == without


def test_documents_are_found_by_a_column(answer, tmp_path):
    rows = [{"text": f"text {n}", "url": f"https://example.org/{n % 7}"} for n in range(20)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        "--config.data.sources.web.name=json",
        f"--config.data.sources.web.data_files=('{tmp_path}/pages.jsonl',)",
        "--documents=https://example.org/3",
        "--by=url",
    )
    code, _, err, _ = answer(*flags)
    assert code == 2
    assert "has no column 'url'" in err
    code, _, err, found = answer(*flags, "--source=web")
    assert code == 0, err
    ((_, rows),) = found["documents"]["web"].items()
    assert rows == [3, 10, 17]
