"""What a compiled program does on each device, read from its text: products, kernels, collectives, traffic with memory.

XLA's own cost analysis counts the body of a loop once and nothing inside a Pallas kernel; here a body counts as often as
it runs, and a kernel by the sizes of its operands.
"""

import collections
import functools
import itertools
import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# products of queries by keys by head size: those that contract over the head, and the others
KERNELS = {"dense_attention": (1, 1), "attention_gradients": (2, 3)}
CUDNN = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}  # such products of its attention
WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}  # bytes of types whose name does not say
PLAIN = {"stride": 1, "lhs_dilate": 1, "rhs_dilate": 1, "pad": 0}  # of a convolution whose window does not say
SILENT = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"}

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|bf16|c64|c128|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")


class Operation(NamedTuple):
    name: str
    type: str
    code: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("),", 1)[0])

    def calls(self, attribute: str) -> str | None:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found and found[1]


@dataclass
class Cost:
    """Of one device. products, kernels: FLOPs; contracting: those of kernels that contract over the head size

    sent: bytes that each kind of collective sends, counts: how often it runs; between_slices: bytes given to the host for
    other slices; traffic: bytes to and from memory
    """

    products: float = 0.0
    kernels: float = 0.0
    contracting: float = 0.0
    traffic: float = 0.0
    sent: collections.Counter = field(default_factory=collections.Counter)
    counts: collections.Counter = field(default_factory=collections.Counter)
    between_slices: float = 0.0
    kernel_calls: int = 0

    @property
    def flops(self) -> float:
        return self.products + self.kernels

    def add(self, other: "Cost", times: int) -> None:
        for name in ("products", "kernels", "contracting", "traffic", "between_slices", "kernel_calls"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for mine, theirs in ((self.sent, other.sent), (self.counts, other.counts)):
            for kind, value in theirs.items():
                mine[kind] += times * value


def cost_of(text: str) -> Cost:
    """Of the entry computation of a module, `compiled.as_text()`."""
    return _Module(text).cost(None, fused=False)


class _Module:
    def __init__(self, text: str):
        self.computations: dict[str | None, dict[str, Operation]] = {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations.setdefault(None if header[1] else header[2], {})
            elif row := _INSTRUCTION.match(line):
                current[row[1]] = Operation(*row.groups())
        self.cost = functools.cache(self._cost)

    def _cost(self, computation: str | None, *, fused: bool) -> Cost:
        total, rows = Cost(), self.computations[computation]
        for operation in rows.values():
            code = operation.code.removesuffix("-start")
            if code == "while":
                total.add(self.cost(operation.calls("body"), fused=False), self._trips(operation))
            elif code in COLLECTIVES:
                if "chain_id=" not in operation.rest or _starts_chain(rows):
                    self._count_collective(total, code, operation, rows, computation or "")
            elif code == "send" and "xla_megascale_runtime" in operation.rest:
                total.between_slices += _bytes(rows[operation.operands[0]].type)
            elif code in ("dot", "convolution"):
                shapes = [_shape(rows[name].type) for name in operation.operands]
                total.products += {"dot": _dot, "convolution": _convolution}[code](operation, *shapes)
            elif code == "custom-call":
                _count_call(total, operation, [rows[name].type for name in operation.operands])
            elif code == "conditional":
                for branch in re.findall(
                    r"%([\w.\-]+)", operation.rest.split("branch_computations=")[-1].split("}")[0]
                ):
                    total.add(self.cost(branch, fused=False), 1)
            elif (called := operation.calls("calls") or operation.calls("to_apply")) and code in (
                "fusion",
                "call",
                "async",
            ):
                total.add(self.cost(called, fused=code == "fusion"), 1)
            if not fused and code not in SILENT and not operation.code.endswith("-done"):
                total.traffic += self._traffic(operation, rows)
        return total

    def _trips(self, loop: Operation) -> int:
        """A loop counts up from zero to the one constant of its condition, by the step of its body.

        A scan's step is one; where a product and a gather were made one loop, it is the parts that a round works on.
        A GPU's compiler says the number itself.
        """
        if known := re.search(r'"known_trip_count": ?\{"n": ?"(\d+)"', loop.rest):
            return int(known[1])
        condition = loop.calls("condition")
        bound = max(self._integers(condition), default=1)
        counters = [row for row in self.computations[condition].values() if _is_counter(row)]
        return -(-bound // self._step(loop.calls("body"), counters[0])) if counters else bound

    def _integers(self, computation: str | None) -> list[int]:
        """The constants of a condition, which may lie in a fusion."""
        found = []
        for row in self.computations[computation].values():
            if row.code == "constant" and row.type.startswith(("s32[]", "u32[]")):
                found.append(_integer(row))
            elif called := row.calls("calls"):
                found += self._integers(called)
        return found

    def _step(self, body: str | None, counter: Operation) -> int:
        """What a body adds to the element of its state that the condition looks at."""
        rows = self.computations[body]
        index = int(re.findall(r"index=(\d+)", counter.rest)[0])
        operation = rows[_root(rows).operands[index]]
        while operation.code == "copy":
            operation = rows[operation.operands[0]]
        if called := operation.calls("calls"):
            rows = self.computations[called]
            operation = _root(rows)
        added = [rows[name] for name in operation.operands if rows[name].code == "constant"]
        return _integer(added[0]) if operation.code == "add" and added else 1

    def _count_collective(self, total: Cost, code: str, operation: Operation, rows, computation: str) -> None:
        size = sum(_bytes(rows[name].type) for name in operation.operands)
        n = _group(operation.rest)
        if computation.startswith("all-reduce-scatter"):  # how a TPU's compiler writes one
            code = "reduce-scatter"
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(code, (n - 1) / n)
        total.sent[code] += size * share
        total.counts[code] += 1

    def _traffic(self, operation: Operation, rows) -> float:
        """What it writes and reads; of what it only takes a slice of, or writes a slice into, the slice."""
        called = self.computations.get(operation.calls("calls")) if operation.code == "fusion" else None
        if operation.code == "dynamic-update-slice":
            return 2 * _in_memory(rows[operation.operands[1]].type)
        result = _result(operation)
        written = _in_memory(result)
        if operation.code.removesuffix("-start") in ("dynamic-slice", "slice"):
            return written + (_bytes(result) if _in_memory(rows[operation.operands[0]].type) else 0)
        read = [_in_memory(rows[name].type) for name in operation.operands if name in rows]
        if called:
            inside = [row for row in called.values() if row.code == "parameter"]
            inside.sort(key=lambda row: int(row.rest.split(")")[0]))
            for i, parameter in enumerate(inside[: len(read)]):
                users = [row for row in called.values() if parameter.name in row.operands]
                if users and all(row.code in ("dynamic-slice", "slice", "gather") for row in users):
                    read[i] = min(read[i], sum(_bytes(row.type) for row in users))
                elif users and all(row.code == "dynamic-update-slice" for row in users):
                    slices = sum(_bytes(called[row.operands[1]].type) for row in users)
                    read[i], written = 0, min(written, slices)
        return written + sum(read)


def _result(operation: Operation) -> str:
    """The type of what it gives. Of what starts and goes on beside other work, the type has its operands in it as well."""
    started = operation.code.endswith("-start") and operation.code != "all-reduce-start"
    if not started or not operation.type.startswith("("):
        return operation.type
    ends = [match.start() for match in re.finditer(",", operation.type) if _depth(operation.type[: match.start()]) == 1]
    parts = [operation.type[start + 1 : end] for start, end in itertools.pairwise([0, *ends, len(operation.type) - 1])]
    return parts[0 if operation.code == "copy-start" else 1]


def _depth(text: str) -> int:
    return sum(text.count(start) - text.count(end) for start, end in ("()", "[]", "{}"))


def _starts_chain(rows: dict[str, Operation]) -> bool:
    """A TPU's compiler may send while it computes: the collective is written again in every fusion that it goes on in."""
    return any("AsyncCollectiveStart" in row.rest for row in rows.values())


def _root(rows: dict[str, Operation]) -> Operation:
    return list(rows.values())[-1]


def _is_counter(row: Operation) -> bool:
    return row.code == "get-tuple-element" and row.type.startswith(("s32[]", "u32[]"))


def _integer(constant: Operation) -> int:
    return int(constant.rest.split(")")[0])


def _dot(operation: Operation, left: list[int], _right: list[int]) -> float:
    """XLA's own product, or that of a library, whose axes are written as JSON."""
    contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:] ?[{\[]([\d,"]*)[}\]]', operation.rest)
    axes = [int(axis) for axis in re.findall(r"\d+", contracted[1])] if contracted else []
    return 2.0 * math.prod(_shape(operation.type)) * math.prod(left[axis] for axis in axes)


def _convolution(operation: Operation, left: list[int], right: list[int]) -> float:
    """Multiply-adds with values that are there: not with padding, nor with the holes of a dilated operand."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", operation.rest)
    assert labels, operation.rest
    inputs, kernel, outputs = labels.groups()
    out, window = _shape(operation.type), _window(operation.rest)
    places = 1
    for axis in sorted(set(inputs) - {"b", "f"}):
        given = {name: window[name][int(axis)] if name in window else default for name, default in PLAIN.items()}
        length = (left[inputs.index(axis)] - 1) * given["lhs_dilate"] + 1
        starts = np.arange(out[outputs.index(axis)]) * given["stride"] - given["pad"]
        at = starts[:, None] + np.arange(right[kernel.index(axis)]) * given["rhs_dilate"]
        places *= int(((at >= 0) & (at < length) & (at % given["lhs_dilate"] == 0)).sum())
    groups = re.search(r"batch_group_count=(\d+)", operation.rest)
    batch = left[inputs.index("b")] // (int(groups[1]) if groups else 1)
    # the kernel's input features are those of one group already
    return 2.0 * batch * right[kernel.index("i")] * right[kernel.index("o")] * places


def _window(rest: str) -> dict[str, list[int]]:
    found = re.search(r"window=\{([^}]*)\}", rest)
    parts = (part.split("=") for part in (found[1].split() if found else ()))
    return {
        name: [int(value.split("_")[0]) for value in values.split("x")]
        for name, values in parts
        if name != "rhs_reversal"
    }


def _count_call(total: Cost, operation: Operation, operands: list[str]) -> None:
    """Kernels, and products that a GPU's compiler leaves to cuBLAS and cuDNN."""
    found = re.search(r'custom_call_target="([^"]+)"', operation.rest)
    target = found[1] if found else ""
    if target == "tpu_custom_call":
        _count_kernel(total, operation)
    elif target.startswith("__cublas$"):
        total.products += _dot(operation, *map(_shape, operands[:2]))
    elif target.startswith("__cudnn$conv"):
        total.products += _convolution(operation, *map(_shape, operands[:2]))
    elif target in CUDNN:
        queries, keys = map(_shape, operands[:2])  # (B, S, N, K), (B, L, N, K)
        total.kernel_calls += 1
        total.kernels += CUDNN[target] * 2.0 * math.prod(queries) * keys[1]


def _count_kernel(total: Cost, operation: Operation) -> None:
    total.kernel_calls += 1
    name = next((kernel for kernel in KERNELS if kernel in operation.name), None)
    if name is None:
        return
    layouts = re.search(r"operand_layout_constraints=\{(.*?)\}\}", operation.rest)
    assert layouts, f"{operation.name} does not say what its operands are"
    floats = [array[0] for array in _ARRAY.finditer(layouts[1]) if array[1] in ("bf16", "f32")]
    queries, keys = (_shape(array) for array in floats[:2])
    one = 2.0 * math.prod(queries) * keys[-2]
    head, others = KERNELS[name]
    total.kernels += (head + others) * one
    total.contracting += head * one


def _group(rest: str) -> int:
    """Devices that take part in a collective together."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\S+)? \{(.*?)\}", rest):  # all axes, its own
        sizes = dict(axis.split("=") for axis in found[1].split(","))
        # an axis, or of one that is cut, as in 'axis':(2)4, the part of four
        return math.prod(int(sizes.get(axis) or axis.split(")")[1]) for axis in found[2].replace(" ", "").split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    assert "replica_groups=" not in rest, f"cannot read who takes part in {rest}"
    return 1


def _shapes(text: str) -> list[list[int]]:
    return [[int(n) for n in sizes.split(",") if n] for _, _, sizes, _ in _ARRAY.findall(text)]


def _shape(text: str) -> list[int]:
    return _shapes(text)[0]


def _bytes(text: str) -> int:
    return sum(
        math.prod(int(n) for n in sizes.split(",") if n) * (WIDTHS.get(kind) or max(1, int(bits) // 8))
        for kind, bits, sizes, _ in _ARRAY.findall(text)
    )


def _in_memory(text: str) -> int:
    """Bytes of the arrays of a type that do not lie on the chip itself, S(1)."""
    return sum(_bytes(f"{match[1]}[{match[3]}]") for match in _ARRAY.finditer(text) if "S(" not in (match[4] or ""))
