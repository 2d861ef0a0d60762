"""A compiled program, read from its HLO text: instructions, source lines, and collectives with how often each runs.

XLA's own cost analysis counts a loop's body once. Here it counts once per iteration: by the compiler's
`known_trip_count`, or else by the loop's condition (`i < constant`), start and step, as JAX's scans compile for TPUs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

_HOST_TRANSFER = "is_host_transfer=true"
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s64": 8, "u64": 8}
_BYTES |= {"f64": 8, "c64": 8, "c128": 16, "token": 0}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLS = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO. shape, operands: as written. attributes: the text after the operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    text: str
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
        kind: one of KINDS, or "send": a TPU's share of a collective between slices, which goes through the hosts.
        size: bytes of a group's whole array: after gathering, before scattering, reduced, or what one device passes on.
        groups: device numbers, in the mesh's order; pairs (from, to) for a collective-permute, none for a send.
        times: how often it runs in one run of the program.
        exact: False if a loop around it has an unknown number of iterations, counted as 1.
    """

    kind: str
    size: int
    groups: tuple[tuple[int, ...], ...]
    times: int
    exact: bool

    @property
    def ways(self) -> int:
        """Devices in a group; 2 for a collective-permute and a send."""
        return len(self.groups[0]) if self.groups else 2


def collectives(text: str, num_devices: int) -> list[Collective]:
    """Collectives among several devices, of a program's text (`executable.as_text()`)."""
    program = Program(text)
    found = [
        collective_of(instruction, times, exact, num_devices)
        for instruction, times, exact in program.walk(program.entry)
    ]
    return [one for one in found if one.ways > 1]


def custom_calls(text: str) -> set[str]:
    """Targets of custom calls: "tpu_custom_call" is a Pallas kernel, "__cudnn$fmha..." is cuDNN's attention."""
    return set(re.findall(r'custom_call_target="([^"]+)"', text))


class Program:
    """A program's text, parsed.

    Attributes:
        computations: Instructions by name of each computation by name, in the order of their schedule.
        entry: Name of the computation that the program starts with.
        sources: "function file:line" by stack frame: the innermost line of jaxtrain, or else the innermost line.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.sources = _sources(text)
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[1], {})
                if line.startswith("ENTRY"):
                    self.entry = header[1]
            elif line.startswith("  ") and " = " in line and (instruction := _instruction(line)):
                current[instruction.name] = instruction

    def walk(self, name: str, times: int = 1, exact: bool = True) -> Iterator[tuple[Instruction, int, bool]]:
        """(collective, how often it runs, whether that is exact) for each one in a computation and those it calls."""
        seen: set[tuple[str, str]] = set()
        for instruction in self.computations[name].values():
            if _communicates(instruction):
                yield instruction, times, exact
            elif instruction.opcode == "while":
                count = self.iterations(name, instruction)
                body = attribute(instruction, "body")
                yield from self.walk(body, times * (1 if count is None else count), exact and count is not None)
            elif instruction.opcode == "conditional":
                yield from self._largest_branch(instruction, times, exact)
            elif instruction.opcode in ("fusion", "call", "async-start"):
                for called in _CALLS.findall(instruction.attributes):
                    for one, often, known in self.walk(called, times, exact):
                        if called.startswith("all-reduce-scatter") and one.opcode == "all-reduce":
                            # A TPU's form of a reduce-scatter: an all-reduce whose result is cut at once.
                            one = dataclasses.replace(one, opcode="all-reduce-scatter")
                        # TPUs spread a collective over several fusions to overlap it: each holds a copy.
                        channel = re.search(r"channel_id=(\d+)", one.attributes)
                        key = (one.opcode, channel[1] if channel else one.name)
                        if instruction.opcode != "fusion" or key not in seen:
                            seen.add(key)
                            yield one, often, known

    def source(self, computation: str, name: str, depth: int = 6) -> str:
        """The source line of an instruction: its own, or of a fusion's inside, or of an operand; "" if unknown."""
        instruction = self.computations[computation].get(name)
        if instruction is None or depth == 0:
            return ""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        if frame and frame[1] in self.sources:
            return self.sources[frame[1]]
        if instruction.opcode == "fusion":
            called = attribute(instruction, "calls")
            for inner in reversed(self.computations[called].values()):
                frame = re.search(r"stack_frame_id=(\d+)", inner.attributes)
                if frame and frame[1] in self.sources:
                    return self.sources[frame[1]]
        found = (self.source(computation, operand, depth - 1) for operand in instruction.operands)
        return next((source for source in found if source), "")

    def _largest_branch(self, instruction: Instruction, times: int, exact: bool) -> list[tuple[Instruction, int, bool]]:
        branches = [list(self.walk(branch, times, exact)) for branch in branches_of(instruction)]
        return max(branches, key=lambda found: sum(num_bytes(one.shape) * often for one, often, _ in found))

    def iterations(self, parent: str, loop: Instruction) -> int | None:
        """Iterations of a while loop; None if they cannot be determined."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = self.computations[attribute(loop, "condition")]
        root = next(instruction for instruction in condition.values() if instruction.is_root)
        inside, outer = condition, None
        if root.opcode == "fusion":  # of the comparison and its constant, on GPUs
            inside, outer = self.computations[attribute(root, "calls")], root
            root = next(instruction for instruction in inside.values() if instruction.is_root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, bound = inside.get(root.operands[0]), self._constant(inside, root.operands[1])
        if outer is not None and counter is not None and counter.opcode == "parameter":
            number = re.search(r" parameter\((\d+)\)", counter.text)
            counter = condition.get(outer.operands[int(number[1])]) if number else None
        if counter is None or counter.opcode != "get-tuple-element" or bound is None:
            return None
        index = int(attribute(counter, "index"))
        body = self.computations[attribute(loop, "body")]
        last = next(instruction for instruction in body.values() if instruction.is_root)
        added = body.get(last.operands[index]) if last.opcode == "tuple" else None
        step = None
        if added is not None and added.opcode == "add":
            step = next((c for c in (self._constant(body, o) for o in added.operands) if c is not None), None)
        start = None
        initial = self.computations[parent].get(loop.operands[0])
        if initial is not None and initial.opcode == "tuple":
            start = self._constant(self.computations[parent], initial.operands[index])
        # Fusions may hide them: JAX's loops start at 0 and step by 1.
        return max(0, math.ceil((bound - (start or 0)) / (step or 1)))

    def _constant(self, computation: dict[str, Instruction], name: str) -> int | None:
        instruction = computation.get(name)
        while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
            instruction = computation.get(instruction.operands[0])
        if instruction is None or instruction.opcode != "constant":
            return None
        value = re.search(r" constant\((-?\d+)\)", instruction.text)
        return int(value[1]) if value else None


def branches_of(conditional: Instruction) -> list[str]:
    """Names of the computations of a conditional."""
    named = _BRANCHES.search(conditional.attributes)
    return re.findall(r"[\w.\-]+", named[1]) if named else _CALLS.findall(conditional.attributes)


def _sources(text: str) -> dict[str, str]:
    """Reads the text's tables of files, functions, locations and stack frames."""
    tables: dict[str, dict[str, Any]] = {}
    table: dict[str, Any] = {}
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif entry := re.match(r"(\d+) (.*)$", line):
            known = re.findall(r"(\w+)=(\d+)", entry[2]) if entry[2].startswith("{") else entry[2].strip('"')
            table[entry[1]] = dict(known) if isinstance(known, list) else known
        elif line.startswith(("%", "ENTRY")):
            break
    frames = tables.get("StackFrames", {})
    # A frame without a parent names 0 or, in newer texts, where numbers are one higher, 1: itself if it is the first.
    shift = int(frames["1"].get("parent_frame_id", 0)) if "1" in frames else 0
    found = {}
    for first in frames:
        lines, frame = [], first
        while frame in frames:
            place = tables["FileLocations"][frames[frame]["file_location_id"]]
            function = tables["FunctionNames"][place["function_name_id"]].replace("<locals>.", "")
            lines.append((tables["FileNames"][place["file_name_id"]], f"{function} ", f":{place['line']}"))
            frame = str(min(int(frames[frame].get("parent_frame_id", 0)) - shift, int(frame) - 1))
        path, function, line = next((line for line in lines if _is_ours(line[0])), lines[0])
        found[first] = function + path.rpartition("/jaxtrain/")[2].rpartition("/site-packages/")[2] + line
    return found


def _is_ours(path: str) -> bool:
    return "/jaxtrain/" in path and "/site-packages/" not in path.rpartition("/jaxtrain/")[2]


def _communicates(instruction: Instruction) -> bool:
    if instruction.opcode == "send":
        return _HOST_TRANSFER in instruction.attributes
    return instruction.opcode.removesuffix("-start") in KINDS


def _instruction(line: str) -> Instruction | None:
    left, _, right = line.strip().partition(" = ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    shape, rest = right[:end], right[end:].lstrip()
    opcode, opened, _ = rest.partition("(")
    if not opened or " " in opcode:
        return None
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    name = left.removeprefix("ROOT ").lstrip("%")
    return Instruction(name, shape, opcode, operands, rest[close + 1 :], line, left.startswith("ROOT "))


def _closing(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise AssertionError(text)


def attribute(instruction: Instruction, name: str) -> str:
    """The name that an attribute such as `calls` gives."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    assert found is not None, (name, instruction.text)
    return found[1]


def num_bytes(shape: str) -> int:
    """Bytes of an array or of all arrays of a tuple."""
    return sum(
        math.prod(int(side) for side in sides.split(",") if side)
        * (1 if dtype.startswith("f8") else _BYTES.get(dtype, 4))
        for dtype, sides in _ARRAY.findall(shape)
    )


def elements(shape: str) -> list[str]:
    """The elements of a tuple's shape."""
    parts, depth, begin = [], 0, 1
    for index, sign in enumerate(shape):
        depth += (sign in "([{") - (sign in ")]}")
        if (depth == 1 and sign == ",") or depth == 0:
            parts.append(shape[begin:index])
            begin = index + 1
    return parts


def collective_of(instruction: Instruction, times: int, exact: bool, num_devices: int) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    shape = instruction.shape
    if kind == "all-reduce-scatter":
        return Collective("reduce-scatter", num_bytes(shape), _groups(instruction, num_devices), times, exact)
    if kind == "send":
        return Collective(kind, num_bytes(elements(shape)[0]), (), times, exact)
    if instruction.opcode != kind and kind != "all-reduce" and shape.startswith("("):
        shape = elements(shape)[1]  # (operands, results, ...)
    if kind == "collective-permute":
        groups = _nested(re.search(r"source_target_pairs=\{(\{.*?\})\}", instruction.attributes))
    else:
        groups = _groups(instruction, num_devices)
    size = num_bytes(shape) * (len(groups[0]) if kind == "reduce-scatter" else 1)
    return Collective(kind, size, groups, times, exact)


def _nested(found: re.Match[str] | None) -> tuple[tuple[int, ...], ...]:
    assert found is not None
    return tuple(tuple(map(int, re.findall(r"\d+", group))) for group in re.findall(r"\{([\d, ]+)", found[1]))


def _groups(instruction: Instruction, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """XLA's forms: {{0,1},{2,3}}; [2,2]<=[4] and [2,2]<=[2,2]T(1,0) (iota); mesh['a'=2,'b'=2] {'b'}; {} for all."""
    text = instruction.attributes
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, sides = (tuple(map(int, part.split(","))) for part in iota.groups()[:2])
        numbers = np.arange(math.prod(sides)).reshape(sides)
        if iota[3]:
            numbers = numbers.transpose(tuple(map(int, iota[3].split(","))))
        return _rows(numbers.reshape(shape))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?: device_ids=\S+)? \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        split = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", mesh[2])]
        numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        kept = [axis for axis in range(numbers.ndim) if axis not in split]
        return _rows(numbers.transpose((*kept, *split)).reshape(-1, math.prod(numbers.shape[axis] for axis in split)))
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return _nested(listed)
    return (tuple(range(num_devices)),)


def _rows(numbers: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in numbers.tolist())
