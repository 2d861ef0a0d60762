"""`python -m tools.scale_tables`: writes docs/scale.md's tables from tools.compile_check and tools.estimate."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from jaxtrain import cli
from jaxtrain.cost import clusters, memory
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.trainer import offline, scheduled, session, tuning, variants

COMMAND = cli.Command(
    name="python -m tools.scale_tables",
    description=(
        "Writes the tables of docs/scale.md: 1B, 4B and 8B on 8 to 512 chips of each kind. Compiled rows are kept in a "
        "file of results; --compile adds missing ones, and may be stopped and restarted. The "
        "other rows are estimates and are marked as such."
    ),
    examples=(
        "python -m tools.scale_tables",
        "python -m tools.scale_tables --compile=v5e,v5p",
        "python -m tools.scale_tables --compile=h100,h200,a100,l40s,rtx4090",
    ),
    flags=(
        cli.Flag(name="compile", type=tuple[str, ...], default=(), help="chips whose missing rows are compiled"),
        cli.Flag(name="results", default="docs/scale.json", help="the file of results"),
        cli.Flag(name="output", default="docs/scale.md", help="the page; the text above its tables is kept"),
    ),
    config="none",
    resumes=True,
)
CONFIGS = {"1b": "1B", "4b": "4B", "8b": "8B (Llama 3's shape)"}
_MICRO_BATCH_TOKENS = {"1b": 16_384, "4b": 8192, "8b": 8192}
_FLAT = (("2x4", 1), ("8x8", 1), ("16x16", 1), ("16x16", 2))
_CUBES = (("2x2x2", 1), ("4x4x4", 1), ("4x8x8", 1), ("8x8x8", 1))
_HOSTS = (("1x8", 1), ("8x8", 1), ("32x8", 1), ("64x8", 1))
SHAPES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT}
SHAPES |= dict.fromkeys(("a100", "h100", "h200", "l40s", "rtx4090"), _HOSTS)
MARK = "<!-- tables: python -m tools.scale_tables -->"


def main(flags: cli.Flags) -> None:
    unknown = set(flags.compile) - SHAPES.keys()
    if unknown:
        raise UserError(f"--compile={','.join(flags.compile)}: {sorted(unknown)[0]!r} is none of {', '.join(SHAPES)}")
    path, page = pathlib.Path(flags.results), pathlib.Path(flags.output)
    results: dict[str, Json] = json.loads(path.read_text()) if path.exists() else {}
    clusters.prepare_environment()
    for chip in flags.compile:
        for config, shape, slices in rows(chip):
            key = key_of(config, chip, shape, slices)
            if key not in results:
                results[key] = compiled(config, f"{chip}:{shape}", slices)
                cli.write_json(flags.results, dict(sorted(results.items())))
            if "by_default" not in results[key]:
                results[key]["by_default"] = by_default(config, clusters.parse(f"{chip}:{shape}", "compile", slices))
                cli.write_json(flags.results, dict(sorted(results.items())))
    lines = [line for chip in SHAPES for line in table(chip, results)]
    before = page.read_text().partition(MARK)[0] if page.exists() else "# Scale\n\n"
    page.write_text("\n".join([before + MARK, *lines]) + "\n")


def rows(chip: str) -> list[tuple[str, str, int]]:
    return [(config, shape, slices) for config in CONFIGS for shape, slices in SHAPES[chip]]


def overrides(config: str, slices: int) -> tuple[str, ...]:
    """What the tables change in a config: all sizes recompute whole layers, which takes the least memory."""
    how = ("model.remat=full", "model.scan_layers=true", "loss.chunk_tokens=1024")
    how += (f"micro_batch_tokens={_MICRO_BATCH_TOKENS[config]}", "mesh=mesh", f"mesh.data={slices}")
    return tuple(f"--config.{setting}" for setting in how)


def key_of(config: str, chip: str, shape: str, slices: int) -> str:
    return f"{config} {chip}:{shape}" + (f" x{slices}" if slices > 1 else "")


def compiled(config: str, topology: str, slices: int) -> Json:
    """Returns the JSON result of tools.compile_check, run in its own process: compilers do not release memory."""
    print(f"Compiling {config} for {topology}" + (f", {slices} slices" if slices > 1 else ""), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        answer = os.path.join(folder, "answer.json")
        command = [sys.executable, "-m", "tools.compile_check", f"--config=configs/{config}.py", f"--json={answer}"]
        command += [f"--topology={topology}", f"--slices={slices}", *overrides(config, slices)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode not in (0, 1) or not os.path.exists(answer):
            raise UserError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(pathlib.Path(answer).read_text())


def by_default(config: str, cluster: clusters.Cluster) -> Json | None:
    """The estimate of a run without flags: of its variants by arithmetic, the first that the compiler fits.

    The trainer compiles up to three and takes the fastest. None if nothing fits.
    """
    print(f"Estimating {config} on {cluster}", flush=True)
    loaded: Any = cli.load(f"configs/{config}.py", ())
    plan, limit = loaded.plan(), memory.limit_of_chip(cluster.chip, None)
    loaded = session.with_mesh(loaded, plan, cluster, limit)
    mesh = loaded.mesh.build(clusters.devices(cluster))
    vocab_size, _ = offline.vocabulary(loaded, None)
    components = offline.components(loaded, vocab_size, mesh, limit)
    target = variants.Target(config=loaded, components=components, mesh=mesh.shape, cluster=cluster, limit=limit)
    measure = tuning.by_compiler(target, scheduled.Compiler(loaded, cluster, vocab_size, components))
    (stage,) = plan.stages
    for one in variants.rank(target, stage, doubt=variants.DOUBT):
        found = measure(stage, one.variant)
        if found is not None and found.bytes <= limit:
            speed = stage.batch_size * stage.seq_len / found.seconds / mesh.size
            return {
                "mesh": dict(mesh.shape),
                "variant": dataclasses.asdict(one.variant),
                "needed_bytes": found.bytes,
                "seconds": found.seconds,
                "tokens_per_sec_per_chip": speed,
                "mfu": components.flops_per_token(stage.seq_len) * speed / cluster.chip.flops,
            }
    return None


def table(chip: str, results: dict[str, Json]) -> list[str]:
    """Returns a chip's rows in Markdown."""
    about = clusters.hardware.BY_NAME[chip]
    network = "another host" if about.platform == "gpu" else "another slice"
    lines = [
        "",
        f"## {chip}: {about.memory / (1 << 30):g} GiB, {about.flops / 1e12:g} TFLOP/s, {about.bandwidth / 1e9:g} GB/s; "
        f"links {about.links / 1e9:g} GB/s, to {network} {about.network / 1e9:g}",
        "",
        "| model | cluster | mesh | micro-batches | GB per chip | fits | sent per chip and step, GB (links + network) "
        "| roofline tokens/s (per chip) | MFU at most | bound by | without flags: mesh, remat, micro-batches, GB "
        "| tokens/s per chip, MFU, by estimate |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for config, shape, slices in rows(chip):
        answer = results.get(key_of(config, chip, shape, slices))
        cells = estimated(config, chip, shape, slices) if answer is None else measured(answer)
        cells += _of_default(answer.get("by_default", {}) if answer else {})
        name = f"{slices} x {chip}:{shape}" if slices > 1 else f"{chip}:{shape}"
        lines.append(f"| {CONFIGS[config]} | {name} | " + " | ".join(cells) + " |")
    return lines


def measured(answer: Json) -> list[str]:
    mesh, (stage,) = _mesh(answer["mesh"]), answer["stages"]
    if not stage["fits"]:
        return [mesh, "", f"over {answer['limit_bytes'] / 1e9:.1f}", "no", "", "", "", ""]
    return [
        mesh,
        str(stage["micro_batches"]),
        f"{stage['needed_bytes'] / 1e9:.1f} of {answer['limit_bytes'] / 1e9:.1f}",
        "yes",
        f"{stage['sent_links_bytes'] / 1e9:.1f} + {stage['sent_network_bytes'] / 1e9:.1f}",
        _speed(stage["roofline_tokens_per_sec"], answer["chips"]),
        f"{stage['roofline_mfu']:.0%}",
        stage["bound_by"],
    ]


def estimated(config: str, chip: str, shape: str, slices: int) -> list[str]:
    from jaxtrain.cost import roofline
    from tools.estimate import estimate

    cluster = clusters.parse(f"{chip}:{shape}", "compile", slices)
    loaded: Any = cli.load(f"configs/{config}.py", overrides(config, slices))
    outlook = estimate.make_outlook(loaded, cluster, None, 1.0, 0.0)
    (stage,) = outlook.plan.stages
    memory = estimate.memory(outlook).numbers
    count = memory["micro_batches"][0]
    step = roofline.Shape(
        batch_size=stage.batch_size, seq_len=stage.seq_len, micro_batches=count, mesh=dict(outlook.mesh)
    )
    best = roofline.roofline(
        cluster.chip, outlook.components, step, roofline.loss_chunk(loaded.loss), roofline.Traffic()
    )
    cells = [_mesh(outlook.mesh), f"~{count}", f"~{memory['memory_gb']:.1f} of {memory['limit_gb']:.1f}"]
    if not memory["fits"]:
        return [*cells, "~no", "", "", "", ""]
    speed = f"< {_speed(best.tokens_per_sec, cluster.num_chips)}"
    return [*cells, "~yes", "not compiled", speed, f"< {best.mfu:.0%}", best.bound_by]


def _of_default(found: Json | None) -> list[str]:
    if not found:
        return ["nothing fits" if found is None else "", ""]
    how = f"{_mesh(found['mesh'])}, {found['variant']['remat']}, {found['variant']['micro_batches']}"
    how += f", {found['needed_bytes'] / 1e9:.1f}"
    return [how, f"{found['tokens_per_sec_per_chip']:,.0f}, {found['mfu']:.1%}"]


def _mesh(mesh: Any) -> str:
    return " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one chip"


def _speed(tokens_per_sec: float, chips: int) -> str:
    return f"{tokens_per_sec:,.0f} ({tokens_per_sec / chips:,.0f})"


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
