"""`bench gpu`: all measurements that need a GPU, within minutes, each part in its own process.

A part that fails, aborts or hangs loses only its own numbers, and its memory is freed for the next. Each part's result
is printed to stderr as soon as it is known.
"""

import json
import os
import subprocess
import sys
import time
from typing import Any

from jaxtrain.cli import Command, Flag, Flags
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from tools.bench.common import progress, result

# Part → time limit in seconds. All others need the first; they are ordered by importance.
PARTS = {
    "device": 60,
    "attention": 150,
    "loss": 90,
    "step": 180,
    "torch": 240,
    "step_dots": 120,
    "step_no_remat": 120,
    "step_xla_attention": 120,
}
_MIN_SECONDS = 10  # no part starts with less time left
COMMAND = Command(
    name="python -m tools.bench gpu",
    description="On a GPU: attention kernels against a reference (grouped queries, packed documents, forward and "
    "backward), the loss's memory and values, the 1B train step's time, memory and MFU, and the same step in torch if "
    "torch has CUDA. Parts that fail are reported as errors; parts skipped for lack of time are null.",
    examples=("python -m tools.bench gpu", "python -m tools.bench gpu --tiny --parts=device,loss"),
    flags=(
        Flag(name="tiny", type=bool, default=False, help="sizes small enough for a CPU, to check the script"),
        Flag(name="parts", type=tuple[str, ...], default=tuple(PARTS), help="which parts to run, after `device`"),
        Flag(name="minutes", type=float, default=8.0, help="time limit of all parts together"),
        Flag(name="only", type=str | None, default=None, help="run only this part, in this process"),
    ),
    config="none",
)


def measure(flags: Flags) -> Json | None:
    for name in (*flags.parts, *([flags.only] if flags.only else [])):
        if name not in PARTS:
            raise UserError(f"there is no part {name!r}; the parts are {', '.join(PARTS)}")
    if flags.only:
        return _one(flags.only, flags.tiny)
    deadline = time.monotonic() + 60 * flags.minutes
    found: dict[str, Any] = dict.fromkeys(PARTS)
    # "device" detects the GPU and puts the other numbers in context.
    for name in ("device", *(name for name in flags.parts if name != "device")):
        left = deadline - time.monotonic()
        if left < _MIN_SECONDS:
            progress(f"{name}: no time left")
            continue
        begun = time.monotonic()
        found[name] = _in_child(name, flags.tiny, min(left, PARTS[name]))
        progress(f"{name} ({time.monotonic() - begun:.0f} s): {json.dumps(found[name])}")
        if name == "device" and not flags.tiny and _on_cpu(found[name]):
            raise UserError("JAX finds no GPU here (pip install 'jaxtrain[gpu]'); --tiny checks the script on a CPU")
    return result("gpu", {"tiny": flags.tiny, **found}, device=False)


def _on_cpu(device: Json | None) -> bool:
    return device is not None and device.get("platform") == "cpu"


def _one(name: str, tiny: bool) -> Json | None:
    """Runs a part in this process. An exception becomes the result."""
    # JAX allocates the GPU's memory on first use, so only processes that run a part import it.
    from tools.bench import gpu_parts

    try:
        return gpu_parts.run(name, tiny)
    except Exception as error:
        return gpu_parts.failure(error)


def _in_child(name: str, tiny: bool, seconds: float) -> Json | None:
    command = [sys.executable, "-m", "tools.bench", "gpu", f"--only={name}", *(["--tiny"] if tiny else [])]
    # torch needs the GPU's memory, so JAX runs on the CPU.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"} if name == "torch" else None
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {seconds:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"error": f"its process ended with exit code {done.returncode}; see stderr"}
    return json.loads(lines[-1])
