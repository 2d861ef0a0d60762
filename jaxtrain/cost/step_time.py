"""How long a compiled step would take on its chips: an estimate from the scheduled HLO text, without a chip.

The entry computation is walked in the order of its schedule, loops as often as they turn. Every kernel takes the longer
of its arithmetic and its memory traffic, at the rates of `Rates`. A collective overlaps with what is scheduled between
its start and its end; the rest of it is exposed.

What it does not know: how well the chip's own code reaches these rates, contention for memory, clocks lowered by power.
Differences between two programs are more reliable than the time of one.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

from jaxtrain.cost.hardware import Chip
from jaxtrain.cost.hlo import KINDS, Collective, Instruction, Program, attribute, branches_of, elements, num_bytes
from jaxtrain.cost.hlo import collective_of as parse_collective
from jaxtrain.cost.roofline import sent

# Between the estimate and what a run reaches: large matrix products get about 90% of a TPU's peak, and MaxText's
# published runs about 85% of such an estimate.
ERROR = 0.15
_SYNC = 25e-6  # a conditional on a GPU: the predicate goes to the host, which waits for the device
_LATENCY = 5e-6  # of a small collective
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id")
_FREE += ("replica-id", "add-dependency", "opt-barrier")
# Copies between memories that a TPU's scheduler overlaps with the kernels around them.
_HIDDEN = ("copy-start", "copy-done", "async-start", "async-done", "async-update", "slice-start", "slice-done")
_HIDDEN += ("dynamic-slice-start",)
# A part of the step by the source line that an instruction stands for.
_PARTS = (
    ("head and loss", re.compile(r"losses/|Llama\.head")),
    ("optimizer", re.compile(r"optim/|optax|train_step\.step")),
    ("rotary positions", re.compile(r"model/rope\.py")),
    ("norms", re.compile(r"Norm\.")),
    ("MLP's elementwise", re.compile(r"MLP\.")),
    ("attention's layouts", re.compile(r"model/attention|Attention\.")),
    ("casts and copies of weights", re.compile(r"Linear\.")),
    ("embedding", re.compile(r"_embed")),
    ("saved activations", re.compile(r"model/pattern|_decode")),
    ("gradient sums", re.compile(r"_gradients")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What the units of a chip are assumed to reach.

    Attributes:
        matmul: FLOP/s of matrix products.
        attention: FLOP/s of a flash kernel, forward and backward, on the blocks that it computes.
        memory: bytes/s of everything that is no matrix product.
        matmul_memory: bytes/s of matrix products.
        ring: bytes/s that a chip sends in a collective.
        gap: seconds between two kernels.
        least: the least seconds of a kernel.
    """

    matmul: float
    attention: tuple[float, float]
    memory: float
    matmul_memory: float
    ring: float
    gap: float
    least: float


def rates(chip: Chip) -> Rates:
    """The rates assumed for a chip.

    TPU: the published peaks, with 85% of the memory's bandwidth for elementwise operations (what XLA's own cost model
    reaches on v5e), and 45% and 50% of the peak for splash, an assumption. A ring uses two links of a chip.
    GPU: 780 of 989 TFLOP/s for large products (measured on an H200), cuDNN's attention at 550 and 425 (its published
    benchmarks on H100).
    """
    if chip.platform == "tpu":
        return Rates(
            matmul=chip.flops,
            attention=(0.45 * chip.flops, 0.5 * chip.flops),
            memory=0.85 * chip.bandwidth,
            matmul_memory=chip.bandwidth,
            ring=chip.ring,
            gap=0.0,
            least=0.0,
        )
    scale = chip.flops / 989e12
    return Rates(
        matmul=780e12 * scale,
        attention=(550e12 * scale, 425e12 * scale),
        memory=0.85 * chip.bandwidth,
        matmul_memory=0.85 * chip.bandwidth,
        ring=chip.ring,
        gap=1.5e-6,
        least=2.5e-6,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel of the program.

    Attributes:
        name: of the instruction.
        part: of the step, such as "matmuls, forward".
        source: "function file:line".
        times: how often it runs.
        seconds: of all runs together; so are `flops` and `bytes`.
    """

    name: str
    part: str
    source: str
    times: int
    seconds: float
    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Communication:
    """A collective: seconds that the links need for all runs, and how many of them no kernel hides."""

    kind: str
    source: str
    seconds: float
    exposed: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A step by kernels and collectives.

    Attributes:
        exact: False if a loop has an unknown number of iterations, counted as one.
    """

    kernels: Sequence[Kernel]
    communication: Sequence[Communication]
    exact: bool

    @property
    def exposed(self) -> float:
        return sum(one.exposed for one in self.communication)

    @property
    def seconds(self) -> float:
        return sum(kernel.seconds for kernel in self.kernels) + self.exposed

    def parts(self) -> dict[str, float]:
        """Seconds by part of the step, the longest first."""
        sums: dict[str, float] = collections.defaultdict(float)
        for kernel in self.kernels:
            sums[kernel.part] += kernel.seconds
        sums["collectives, exposed"] = self.exposed
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def wastes(self) -> list[tuple[str, float, float]]:
        """(source line, seconds, bytes) of what is neither a matrix product nor attention, the longest first."""
        sums: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
        for kernel in self.kernels:
            if not kernel.flops:
                sums[kernel.source][0] += kernel.seconds
                sums[kernel.source][1] += kernel.bytes
        for one in self.communication:
            sums[f"{one.kind}, exposed: {one.source}"][0] += one.exposed
        return [(source, *both) for source, both in sorted(sums.items(), key=lambda item: -item[1][0])]  # type: ignore


def estimate(text: str, chip: Chip, islands: Sequence[int], vocab_size: int) -> Estimate:
    """Estimates a program.

    Args:
        text: Its scheduled HLO: `executable.as_text()`, or XLA's dump after buffer assignment.
        chip: What it is compiled for.
        islands: Of each device, which slice or host it is in.
        vocab_size: Columns of the head, by which the loss's products are told apart.
    """
    walk = _Walk(Program(text), chip, islands, vocab_size)
    walk.computation(walk.program.entry, 1)
    return Estimate(walk.kernels, walk.communication, walk.exact)


class _Walk:
    def __init__(self, program: Program, chip: Chip, islands: Sequence[int], vocab_size: int):
        self.program = program
        self.chip = chip
        self.rates = rates(chip)
        self.islands = islands
        self.vocab = re.compile(rf"[\[,]{vocab_size}[\],]")
        self.kernels: list[Kernel] = []
        self.communication: list[Communication] = []
        self.exact = True

    def computation(self, name: str, times: int) -> float:
        """Walks a computation. Returns the seconds of one run, with what is exposed in it."""
        clock = _Clock()
        for instruction in self.program.computations[name].values():
            opcode = instruction.opcode
            if opcode == "while":
                turns = self.program.iterations(name, instruction)
                self.exact &= turns is not None
                turns = 1 if turns is None else turns
                clock.now += turns * self.computation(attribute(instruction, "body"), times * turns)
            elif opcode == "conditional":
                clock.now += self._conditional(instruction, times)
            elif opcode == "call":
                clock.now += self.computation(attribute(instruction, "to_apply"), times)
            elif not self._communicates(name, instruction, times, clock) and opcode not in _FREE:
                clock.now += self._kernel(name, instruction, times)
        for end, one in clock.fused:
            clock.finish(end, one)
        self.communication += clock.done
        return clock.now

    def _conditional(self, instruction: Instruction, times: int) -> float:
        """Takes the longest branch; on a GPU the shortest, since only rows of many documents leave cuDNN's kernel."""
        gpu, before = self.chip.platform == "gpu", (self.kernels, self.communication)
        found = []
        for branch in branches_of(instruction):
            self.kernels, self.communication = [], []
            found.append((self.computation(branch, times), self.kernels, self.communication))
        seconds, kernels, communication = (min if gpu else max)(found, key=lambda branch: branch[0])
        self.kernels, self.communication = before[0] + kernels, before[1] + communication
        if gpu:
            self.kernels.append(_kernel_of(instruction, "host waits of conditionals", "", times, _SYNC, 0, 0))
            seconds += _SYNC
        return seconds

    # ---- Collectives

    def _communicates(self, computation: str, instruction: Instruction, times: int, clock: "_Clock") -> bool:
        """Accounts for a collective. Returns False for an instruction that is a kernel (too)."""
        kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
        if kind in KINDS:
            if instruction.opcode.endswith("-done"):
                clock.end(instruction.operands[0])
            else:
                self._start(computation, instruction, instruction, times, clock)
            return True
        if instruction.opcode not in ("fusion", "async-start", "async-done"):
            return False
        called = re.search(r"calls=%?([\w.\-]+)", instruction.attributes)
        inside = list(self._collectives_in(called[1])) if called else []
        if inside and called and called[1].startswith("all-reduce-scatter"):
            one = dataclasses.replace(inside[0], opcode="all-reduce-scatter", attributes=inside[0].attributes)
            self._start(computation, one, instruction, times, clock)
            return True
        for one in inside:
            channel = re.search(r"channel_id=(\d+)", one.attributes)
            self._start(computation, one, instruction, times, clock, fused=channel[1] if channel else one.name)
        if instruction.name.startswith("async-collective-done") and clock.fused:
            clock.finish(*clock.fused.pop(0))
        return False

    def _collectives_in(self, name: str) -> Iterator[Instruction]:
        for instruction in self.program.computations.get(name, {}).values():
            if instruction.opcode.removesuffix("-start") in KINDS:
                if self._moved(instruction).ways > 1:
                    yield instruction
            elif instruction.opcode in ("fusion", "call", "async-start"):
                called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", instruction.attributes)
                yield from self._collectives_in(called[1]) if called else ()

    def _moved(self, instruction: Instruction) -> Collective:
        return parse_collective(instruction, 1, True, len(self.islands))

    def _start(
        self, computation: str, one: Instruction, shown: Instruction, times: int, clock: "_Clock", fused: str = ""
    ) -> None:
        moved = self._moved(one)
        if moved.ways < 2:
            return
        links, network = sent(moved, self.islands)
        need = links / self.rates.ring + network / self.chip.network
        source = self.program.source(computation, shown.name)
        clock.start(moved.kind, source, need, times, one, fused)

    # ---- Kernels

    def _kernel(self, computation: str, instruction: Instruction, times: int) -> float:
        """Records a kernel. Returns the seconds of one run."""
        flops, attention = self._arithmetic(computation, instruction)
        if _is_hidden(instruction, flops) or (instruction.opcode.endswith(("-done", "-update")) and not flops):
            return 0.0
        if instruction.opcode == "custom-call" and self.chip.platform == "tpu" and attention is None:
            return 0.0
        traffic = self._traffic(computation, instruction)
        rates = self.rates
        if attention is not None:
            seconds = flops / rates.attention[attention]
        elif flops:
            # Products of 8-bit values have twice the peak.
            rate = rates.matmul * (2 if "matmul$f8" in instruction.attributes else 1)
            seconds = max(flops / rate, traffic / rates.matmul_memory)
        else:
            seconds = traffic / rates.memory
        seconds = max(seconds, rates.least) + rates.gap
        source = self.program.source(computation, instruction.name)
        part = self._part(computation, instruction, flops, attention, source)
        self.kernels.append(_kernel_of(instruction, part, source, times, seconds, flops, traffic))
        return seconds

    def _arithmetic(self, computation: str, instruction: Instruction) -> tuple[float, int | None]:
        """FLOPs of matrix products, and for an attention kernel 0 (forward) or 1 (backward)."""
        shapes = self._operand_shapes(computation, instruction)
        if instruction.opcode in ("dot", "convolution"):
            return _product_flops(instruction, shapes), None
        if instruction.opcode == "fusion":
            return self._flops_of(attribute(instruction, "calls")), None
        if instruction.opcode != "custom-call":
            return 0.0, None
        target = re.search(r'custom_call_target="([^"]+)"', instruction.attributes)
        target = target[1] if target else ""
        if "fmha" in target:
            batch, seq_len, heads, width = _sides(shapes[0])
            backward = "Backward" in target
            return (5 if backward else 2) * batch * heads * seq_len**2 * width, int(backward)
        if "gemm" in target or "matmul" in target:
            contracted = re.search(r'lhs_contracting_dimensions":\["(\d+)"', instruction.attributes)
            out = elements(instruction.shape)[0] if instruction.shape.startswith("(") else instruction.shape
            return 2 * math.prod(_sides(out)) * _sides(shapes[0])[int(contracted[1])] if contracted else 0.0, None
        if target == "tpu_custom_call" and "splash" in instruction.name + instruction.attributes:
            return _splash_flops(instruction, shapes)
        return 0.0, None

    @functools.cache  # noqa: B019
    def _flops_of(self, name: str) -> float:
        total = 0.0
        for instruction in self.program.computations[name].values():
            if instruction.opcode in ("dot", "convolution"):
                total += _product_flops(instruction, self._operand_shapes(name, instruction))
            elif instruction.opcode == "fusion":
                total += self._flops_of(attribute(instruction, "calls"))
            elif instruction.opcode == "call":
                total += self._flops_of(attribute(instruction, "to_apply"))
        return total

    def _operand_shapes(self, computation: str, instruction: Instruction) -> list[str]:
        found = self.program.computations[computation]
        return [found[operand].shape for operand in instruction.operands if operand in found]

    def _traffic(self, computation: str, instruction: Instruction) -> float:
        """Bytes that a kernel reads from and writes to the chip's main memory."""
        found, shapes = self.program.computations[computation], self._operand_shapes(computation, instruction)
        if instruction.opcode == "fusion":
            called = attribute(instruction, "calls")
            read = sum(
                min(_main(found[operand].shape), self._read(called, index))
                for index, operand in enumerate(instruction.operands)
                if operand in found
            )
            return read + self._written(called, instruction.shape)
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _main(instruction.shape)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * _main(shapes[1])
        if instruction.opcode == "custom-call":
            # Their scratch space is an output of bytes or, for softmax statistics, small.
            outputs = elements(instruction.shape) if instruction.shape.startswith("(") else [instruction.shape]
            return sum(_main(shape) for shape in (*outputs, *shapes) if "u8[" not in shape)
        return _main(instruction.shape) + sum(map(_main, shapes))

    @functools.cache  # noqa: B019
    def _users(self, computation: str) -> dict[str, list[Instruction]]:
        users = collections.defaultdict(list)
        for instruction in self.program.computations[computation].values():
            for operand in set(instruction.operands):
                users[operand].append(instruction)
        return users

    @functools.cache  # noqa: B019
    def _read(self, computation: str, index: int) -> float:
        """Bytes that a fused computation reads of a parameter: slices if it only takes those."""
        mark = f"parameter({index})"
        parameter = next(one for one in self.program.computations[computation].values() if mark in one.text)
        return self._read_by_users(computation, parameter, num_bytes(parameter.shape))

    def _read_by_users(self, computation: str, read: Instruction, whole: float) -> float:
        total = float(whole) if read.is_root else 0.0
        for user in self._users(computation)[read.name]:
            first = user.operands[0] == read.name
            if user.opcode in ("dynamic-slice", "slice", "gather"):
                total += num_bytes(user.shape) if first else whole
            elif user.opcode in ("dynamic-update-slice", "scatter") and first:
                continue
            elif user.opcode in ("bitcast", "reshape", "convert", "copy", "transpose"):
                total += self._read_by_users(computation, user, whole)
            elif user.opcode == "fusion":
                called = attribute(user, "calls")
                total += max(self._read(called, k) for k, operand in enumerate(user.operands) if operand == read.name)
            else:
                return whole
        return min(whole, total)

    def _written(self, called: str, shape: str) -> float:
        """Bytes that a fusion writes; of an update in place, the slice."""
        inside = self.program.computations[called]
        root = next(instruction for instruction in inside.values() if instruction.is_root)
        if root.opcode != "tuple":
            return self._output(inside, root, shape)
        parts = zip(root.operands, elements(shape), strict=False)
        return sum(self._output(inside, inside[name], part) for name, part in parts if name in inside)

    def _output(self, inside: dict[str, Instruction], root: Instruction, shape: str) -> float:
        made = root
        while made.opcode in ("bitcast", "reshape", "convert", "copy") and made.operands[0] in inside:
            made = inside[made.operands[0]]
        if made.opcode == "dynamic-update-slice":
            return num_bytes(inside[made.operands[1]].shape)
        if made.opcode == "scatter":
            return 3 * num_bytes(inside[made.operands[2]].shape)  # rows are read, added to and written
        return _main(shape)

    def _part(
        self, computation: str, instruction: Instruction, flops: float, attention: int | None, source: str
    ) -> str:
        name = re.search(r'op_name="([^"]*)"', instruction.attributes)
        text = name[1] if name else ""
        again = "rematted_computation" in text
        phase = "recomputed" if again else "backward" if "transpose(" in text else "forward"
        if attention is not None:
            return f"attention, {'backward' if attention else phase}"
        shapes = (instruction.shape, *self._operand_shapes(computation, instruction))
        if any(map(self.vocab.search, shapes)) and (flops or not re.search("optim|_gradients", source)):
            return "head and loss"
        if flops:
            return f"matmuls, {phase}"
        return next((part for part, pattern in _PARTS if pattern.search(source)), "other")


@dataclasses.dataclass
class _Pending:
    kind: str
    source: str
    need: float
    times: int
    exposed: float = 0.0

    def total(self) -> Communication:
        return Communication(
            kind=self.kind, source=self.source, seconds=self.need * self.times, exposed=self.exposed * self.times
        )


class _Clock:
    """The schedule of one computation: links serve one collective after another, beside the kernels."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy = 0.0  # until when the links are
        self.started: dict[str, tuple[float, _Pending]] = {}
        self.fused: list[tuple[float, _Pending]] = []
        self.seen: set[tuple[str, str]] = set()
        self.done: list[Communication] = []

    def start(self, kind: str, source: str, need: float, times: int, one: Instruction, fused: str) -> None:
        if fused:
            # A collective spread over several fusions has a copy in each, with one channel.
            if (one.opcode, fused) in self.seen:
                return
            self.seen.add((one.opcode, fused))
        pending = _Pending(kind, source, need, times)
        waits = not fused and not one.opcode.endswith("-start")
        if waits and need < 2e-5:
            # Scalars and norms do not queue behind large ones.
            pending.exposed = need + _LATENCY
            self.now += pending.exposed
            self.done.append(pending.total())
            return
        self.busy = max(self.now, self.busy) + need
        if fused:
            self.fused.append((self.busy, pending))
        elif waits:
            self.finish(self.busy, pending)
        else:
            self.started[one.name] = (self.busy, pending)

    def end(self, name: str) -> None:
        if name in self.started:
            self.finish(*self.started.pop(name))

    def finish(self, end: float, pending: _Pending) -> None:
        pending.exposed = max(0.0, end - self.now)
        self.now += pending.exposed
        self.done.append(pending.total())


def _kernel_of(
    instruction: Instruction, part: str, source: str, times: int, seconds: float, flops: float, traffic: float
) -> Kernel:
    return Kernel(
        name=instruction.name,
        part=part,
        source=source,
        times=times,
        seconds=seconds * times,
        flops=flops * times,
        bytes=traffic * times,
    )


def _is_hidden(instruction: Instruction, flops: float) -> bool:
    fused = instruction.name.startswith(("async-collective-start", "async-collective-done"))
    return (fused and not flops) or instruction.opcode in _HIDDEN


def _sides(shape: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(side) for side in found[1].split(",") if side] if found else []


def _main(shape: str) -> float:
    """Bytes in the chip's main memory: layouts with S(1) are in a TPU's VMEM."""
    return float(num_bytes(re.sub(r"[a-z]\w*\[[\d,]*\]\{[^}]*S\([1-9][^}]*\}", "", shape)))


def _product_flops(instruction: Instruction, shapes: Sequence[str]) -> float:
    """Two per output and contracted element of a dot, or of a convolution, as TPUs write matrix products."""
    left, out = _sides(shapes[0]), _sides(instruction.shape)
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        assert contracted is not None, instruction.text
        return 2.0 * math.prod(out) * math.prod(left[int(axis)] for axis in contracted[1].split(",") if axis)
    labels = re.search(r"dim_labels=([^\s,_]+)_([^\s,_]+)->([^\s,]+)", instruction.attributes)
    assert labels is not None, instruction.text
    kernel = _sides(shapes[1])
    inputs, weights, outputs = labels.groups()
    flops = 2.0 * out[outputs.index("b")] * out[outputs.index("f")] * kernel[weights.index("i")]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = dict(item.split("=") for item in window[1].split()) if window else {}
    for index, axis in enumerate(sorted(filter(str.isdigit, inputs))):
        sizes = (left[inputs.index(axis)], kernel[weights.index(axis)], out[outputs.index(axis)])
        flops *= _pairs(*sizes, settings, index)
    group = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return flops / int(group[1]) if group else flops


def _pairs(inputs: int, kernel: int, outputs: int, window: dict[str, str], axis: int) -> int:
    """Pairs of an output and a kernel position that meet an input, along one spatial axis."""

    def setting(name: str, default: str) -> int:
        return int(window[name].split("x")[axis].split("_")[0]) if name in window else int(default)

    stride, left, right = setting("stride", "1"), setting("lhs_dilate", "1"), setting("rhs_dilate", "1")
    pad = setting("pad", "0")
    if kernel == 1 and stride == left == 1 and not pad:
        return outputs
    if outputs == 1 and inputs == kernel and not pad:
        return kernel
    places = (o * stride - pad + k * right for o in range(outputs) for k in range(kernel))
    return sum(0 <= place <= (inputs - 1) * left and place % left == 0 for place in places)


def _splash_flops(instruction: Instruction, shapes: Sequence[str]) -> tuple[float, int]:
    """FLOPs of JAX's splash kernel on the blocks of a causal mask, and whether it is of the backward pass.

    Queries are [..., T, h]. Its scratch outputs of [..., block, h] tell the block.
    """
    query = max((shape for shape in shapes if len(_sides(shape)) >= 4), key=num_bytes)
    *heads, seq_len, width = _sides(query)
    outputs = elements(instruction.shape) if instruction.shape.startswith("(") else [instruction.shape]
    sides = [_sides(shape) for shape in outputs]
    block = min((side[-2] for side in sides if len(side) > 1 and side[-1] == width), default=seq_len)
    blocks = max(1, seq_len // block)
    computed = (blocks + 1) / (2 * blocks)
    name = instruction.name + instruction.attributes
    # Scores and output forward; in the backward pass scores, dp, dv and dk, with dq in the same kernel or another.
    products, backward = 2, 0
    if "dkv" in name:
        fused = sum(side[-2:] == [seq_len, width] and len(side) > len(heads) + 2 for side in sides) > 0
        products, backward = (5 if fused else 4), 1
    elif "_dq" in name:
        products, backward = 3, 1
    return products * 2.0 * math.prod(heads) * seq_len**2 * width * computed, backward
