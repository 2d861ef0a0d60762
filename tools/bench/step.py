"""`bench step`: a whole train step in jaxtrain and in torch, interleaved."""

import contextlib
import importlib.util
import time
from collections.abc import Callable
from typing import Literal

from jaxtrain.cli import Command, Flag, Flags
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.model.llama import LlamaConfig
from tools.bench import distill
from tools.bench.common import (
    Spent,
    at_least_one,
    cpus,
    in_turns,
    median,
    one_core,
    progress,
    ratio,
    result,
    rounds_flag,
    short,
    walls,
)
from tools.bench.jax_step import JaxStep, Size

BASELINES = ("torch_eager", "torch_compiled")
COMMAND = Command(
    name="python -m tools.bench step",
    description="Time of a train step (forward, backward, clipping, AdamW) of a Llama in jaxtrain and, if torch is "
    "installed, in torch, eager and compiled, measured alternately. The default is a model of 12.6M parameters in "
    "fp32.",
    examples=(
        "python -m tools.bench step",
        "python -m tools.bench step --distill --one_core",
        "python -m tools.bench step --hidden_size=768 --intermediate_size=2048 --num_layers=12 --vocab_size=32000",
    ),
    flags=(
        Flag(name="batch_size", type=int, default=8, help="rows"),
        Flag(name="seq_len", type=int, default=512, help="tokens of a row"),
        Flag(name="hidden_size", type=int, default=384, help="width of the model"),
        Flag(name="intermediate_size", type=int, default=1024, help="width of the MLP"),
        Flag(name="num_layers", type=int, default=6, help="layers"),
        Flag(name="num_heads", type=int, default=6, help="query heads"),
        Flag(name="num_kv_heads", type=int, default=6, help="key/value heads"),
        Flag(name="vocab_size", type=int, default=5120, help="tokens of the vocabulary, a multiple of 128"),
        Flag(
            name="dtype", type=Literal["float32", "bfloat16"], default="float32", help="bfloat16 is autocast in torch"
        ),
        Flag(name="remat", type=Literal["none", "dots", "full"], default="full", help="see jaxtrain.model.llama"),
        Flag(name="one_core", type=bool, default=False, help="use one core: other load hardly changes its CPU seconds"),
        Flag(name="distill", type=bool, default=False, help="with a teacher, compared with student and teacher alone"),
        Flag(
            name="teacher_times", type=int, default=2, help="the teacher's width, heads and layers, times the model's"
        ),
        Flag(name="baselines", type=tuple[str, ...], default=BASELINES, help="what to compare with"),
        rounds_flag(7),
    ),
    config="none",
)


def measure(flags: Flags) -> Json:
    at_least_one(
        rounds=flags.rounds,
        batch_size=flags.batch_size,
        seq_len=flags.seq_len,
        teacher_times=flags.teacher_times,
    )
    for name in flags.baselines:
        if name not in BASELINES:
            raise UserError(f"--baselines: {name!r} is not known; give some of {', '.join(BASELINES)}")
    if flags.vocab_size % 128:
        raise UserError(f"--vocab_size={flags.vocab_size}: give a multiple of 128, so that neither side pads")
    with one_core() if flags.one_core else contextlib.nullcontext():
        settings: Json = {flag.name: getattr(flags, flag.name) for flag in COMMAND.flags}
        size = _size(flags)
        numbers = distill.compare(size, flags.teacher_times, flags.rounds) if flags.distill else _compare(flags, size)
        return result("step", {"settings": settings, **numbers}, device=True)


def _compare(flags: Flags, size: Size) -> Json:
    runs: dict[str, Callable[[], float]] = {}
    ready_seconds: dict[str, float] = {}
    for name, make in _makers(size, flags.baselines).items():
        begun = time.perf_counter()
        runs[name] = make()
        first = runs[name]()
        ready_seconds[name] = short(time.perf_counter() - begun)
        progress(f"{name}: ready after {ready_seconds[name]} s, first loss {first:.4f}")
    spent = in_turns(runs, flags.rounds)
    found: Json = {
        "parameters": size.model.build(size.vocab_size, None).num_params,
    }
    for name in ("jaxtrain", *BASELINES):
        found[name] = _numbers(spent[name], ready_seconds[name], size) if name in spent else None
    for name in BASELINES:
        for kind, of in (("seconds", walls), ("cpu_seconds", cpus)):
            both = (of(spent[name]), of(spent["jaxtrain"])) if name in spent else None
            found[f"{name}_{kind}_over_jaxtrain"] = None if both is None else ratio(*both)
    return found


def _size(flags: Flags) -> Size:
    model = LlamaConfig(
        hidden_size=flags.hidden_size,
        intermediate_size=flags.intermediate_size,
        num_layers=flags.num_layers,
        num_heads=flags.num_heads,
        num_kv_heads=flags.num_kv_heads,
        max_seq_len=flags.seq_len,
        tie_embeddings=True,
        dtype=flags.dtype,
        remat=flags.remat,
    )
    model.check()
    return Size(model, flags.vocab_size, flags.batch_size, flags.seq_len)


def _makers(size: Size, baselines: tuple[str, ...]) -> dict[str, Callable[[], Callable[[], float]]]:
    """Functions that prepare a step, by name. Only those that can run on this machine."""
    makers: dict[str, Callable[[], Callable[[], float]]] = {"jaxtrain": lambda: JaxStep(size).run}
    if not baselines:
        return makers
    if importlib.util.find_spec("torch") is None:
        progress("torch is not installed: its numbers will be null (pip install 'jaxtrain[parity]')")
        return makers
    import jax

    from tools.bench import torch_step

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if not torch_step.available(device):
        progress("torch has no CUDA here: its numbers will be null")
        return makers
    for name in baselines:
        compiled = name == "torch_compiled"
        makers[name] = lambda compiled=compiled: torch_step.TorchStep(size, device=device, compile=compiled).run
    return makers


def _numbers(spent: list[Spent], ready_seconds: float, size: Size) -> Json:
    return {
        "step_seconds": median(walls(spent)),
        "fastest_step_seconds": short(min(walls(spent))),
        "step_cpu_seconds": median(cpus(spent)),
        "tokens_per_second": median([size.tokens / one.wall for one in spent]),
        "first_step_seconds": ready_seconds,
    }
