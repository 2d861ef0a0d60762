"""Writes everything in tests/golden/v0_1 except its Python files: `python -m tests.golden.v0_1.make`.

Only for the code of version 0.1 (commit 6504c7a). Never run it with later code, which must reproduce these files.
"""

import contextlib
import dataclasses
import importlib
import json
import pathlib
import random
import shutil
import signal
import sysconfig
import tarfile
import tempfile
import time

import safetensors.numpy

import jaxtrain
from tests.data.sources.tars import COMPRESS, shard
from tests.e2e.conftest import fill
from tests.e2e.runs import STOPPED, Run, documents
from tests.golden.v0_1.place import HERE, ROOT, WHOLE_RUNS, Place, dump, hashes, recorded
from tests.hub import LoopbackHub, jsonl_bytes, parquet_bytes

MADE = ("files", "hub", "mixed", "distilled", "expected", "records")
MIXED, DISTILLED = str(HERE / "mixed.py"), str(HERE / "distilled.py")
# Times, host names and compiled programs.
LEFT_OUT = shutil.ignore_patterns("cache", "lock", "tensorboard", "work")


def write_files() -> None:
    """Texts of four kinds: on a Hub, in files, in JSON lines and in tar shards."""
    for folder in MADE:
        shutil.rmtree(HERE / folder, ignore_errors=True)
    for folder in ("files/prose", "files/shards", "hub", "expected", "records"):
        (HERE / folder).mkdir(parents=True)
    for number in range(3):
        rng = random.Random(number)
        endings = ["", " ünï\u0301cødé", "\n\tx = 1  # ☃\n", " 漢字"]
        texts = [text + rng.choice(endings) for text in documents(number, 80)]
        scores = [rng.choice([None, 0, 1, 2, 3, 4, 5]) for _ in texts]
        titles = [rng.choice([None, f"Title {row}"]) for row in range(len(texts))]
        (HERE / "hub" / f"train-{number}.parquet").write_bytes(
            parquet_bytes(texts, row_group_size=20, title=titles, int_score=scores)
        )
    for number in range(40):
        paragraphs = documents(100 + number, 4, words=20 + number)
        (HERE / "files" / "prose" / f"{number:02d}.txt").write_text("\n\n".join(paragraphs) + "\n")
    for number in range(2):
        lines = documents(200 + number, 80)
        (HERE / "files" / f"lines-{number}.jsonl.gz").write_bytes(jsonl_bytes(lines, compress=True, content=lines))
    for number in range(4):
        content = COMPRESS["tar.gz"](shard(documents(300 + number, 30), first=30 * number))
        (HERE / "files" / "shards" / f"s-{number}.tar.gz").write_bytes(content)


def stop(place: Place, spec: str, workdir: str, after: int, before: int) -> None:
    """Starts a run and stops it with SIGTERM after a step in that range; tries again if it missed the range."""
    run = place.read(workdir)
    while True:
        with place.popen("jaxtrain.main", f"--config={spec}", f"--workdir={workdir}") as process:
            while run.last_step() < after and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate()
        if process.returncode == STOPPED and run.checkpoints()[-1] <= before:
            return
        print(f"{workdir}: exit code {process.returncode} at step {run.last_step()}; again", output[-300:])
        for name in ("checkpoints", "tensorboard"):
            shutil.rmtree(run.workdir / name)
        for name in ("metrics.jsonl", "log.txt"):
            (run.workdir / name).unlink()


def pack(folder: pathlib.Path) -> None:
    """ArrayRecord pads each file to 64 KiB: a few kB of tokens would take megabytes."""
    with tarfile.open(HERE / f"{folder.name}.tar.xz", "w:xz") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            member = tarfile.TarInfo(path.relative_to(folder.parent).as_posix())
            member.size = path.stat().st_size
            with path.open("rb") as content:
                archive.addfile(member, content)


def record(name: str, run: Run, **more: object) -> None:
    dump(HERE / "expected" / f"{name}.json", recorded(run))
    print(name, run.last_step(), "steps; loss", run.steps()[-1]["loss"])


def runs(place: Place) -> None:
    place.train(MIXED, "mixed")
    record("mixed", place.read("mixed"))
    shutil.copytree(place.folder / "mixed" / "tokenizer", place.folder / "stopped" / "tokenizer")
    stop(place, MIXED, "stopped", after=19, before=26)
    shutil.copytree(place.folder / "stopped", HERE / "mixed", ignore=LEFT_OUT)
    shutil.rmtree(place.folder / "mixed")
    shutil.copytree(HERE / "mixed", place.folder / "mixed")

    place.command("tools.pretokenize", f"--config={MIXED}", "--workdir=mixed", "--output=tokens", "--all")
    pack(place.folder / "tokens")
    place.command(
        "tools.cache_teacher",
        f"--config={DISTILLED}",
        "--workdir=cached",
        "--output=teacher",
        "--k=8",
        "--batch_tokens=512",
    )
    pack(place.folder / "teacher")
    place.train(DISTILLED, "whole")
    record("distilled", place.read("whole"))
    stop(place, DISTILLED, "distilled", after=9, before=18)
    shutil.copytree(place.folder / "distilled", HERE / "distilled", ignore=LEFT_OUT)

    for name in ("mixed", "distilled"):
        arrays = hashes(Run(HERE / name, "", {}).state())
        place.command("tools.export_hf", f"--workdir={name}", "--output=exported", "--dtype=float32")
        exported = hashes(safetensors.numpy.load_file(place.folder / "exported" / "model.safetensors"))
        shutil.rmtree(place.folder / "exported")
        found = {"checkpoint": arrays, "exported": exported}
        (HERE / "expected" / f"{name}_arrays.json").write_text(json.dumps(found, indent=1) + "\n")
    place.command("tools.evaluate", "--workdir=mixed", "--by_source", "--json=evaluated.json")
    shutil.copy(place.folder / "evaluated.json", HERE / "expected" / "evaluated.json")
    for name in WHOLE_RUNS:
        record(name, place.whole(name))


def records() -> None:
    """How version 0.1 recorded every shipped config, and the identities in the two checkpoints."""
    from jaxtrain import recipe  # pyright: ignore[reportAttributeAccessIssue] - this runs in the tree of version 0.1

    for path in sorted((ROOT / "configs").glob("[!_]*.py")):
        argument = {"pretrain": ":tiny"}.get(path.stem, "")
        found = json.dumps(recipe.to_json(recipe.load(f"{path}{argument}")), indent=1)
        found = found.replace(sysconfig.get_paths()["stdlib"], "/usr/lib/python3.11")
        (HERE / "records" / f"{path.stem}.json").write_text(found + "\n")
    kinds = set()
    for path in sorted((ROOT / "jaxtrain").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        with contextlib.suppress(ImportError):
            kinds |= {
                f"{name}.{kind.__qualname__}"
                for kind in vars(importlib.import_module(name)).values()
                if is_config(kind, name)
            }
    (HERE / "records" / "kinds.json").write_text(json.dumps(sorted(kinds - {"jaxtrain.monitor.Run"}), indent=1) + "\n")


def is_config(kind: object, module: str) -> bool:
    """Configs are the dataclasses whose fields are keyword-only and can be set."""
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module):
        return False
    frozen = kind.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
    return not frozen and all(field.kw_only for field in dataclasses.fields(kind))


def main() -> None:
    assert jaxtrain.__file__ == str(ROOT / "jaxtrain" / "__init__.py"), jaxtrain.__file__
    assert (ROOT / "jaxtrain" / "recipe" / "record.py").exists(), "this is not the code of version 0.1"
    write_files()
    with tempfile.TemporaryDirectory() as folder, LoopbackHub() as hub:
        fill(hub)
        runs(Place(pathlib.Path(folder), hub))
    records()


if __name__ == "__main__":
    main()
