"""Reads optimised HLO: which weights and pages a program copies, and which collectives it runs.

How a copy is found. An instruction *moves* data if it is a copy, a transpose, a slice, a concatenation or the like,
an all-gather, or a fusion of nothing else. Every value is followed back through moves, bitcasts, tuples, loops and
branches to the arguments of the program. A move into main memory whose data come from a weight, and whose result is
at least half as large, is a copy of the weight: once if it stands before the loop, at every step within it. Moves to
on-chip memory are how a TPU reads weights ahead, and do not count.

The cache is held to more: whatever writes an array of a page store's shape anew is a copy of it, on-chip or not.
Allowed are views, loops and branches, updates in place (scatters, dynamic-update-slices, fusions that end in one) and
custom calls that alias an operand. An update whose operand XLA had to preserve shows as a copy before it.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from apr_jax.aot.hlo_text import ARRAY, Instruction, dims, num_bytes, parse_instruction

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_MOVES = frozenset((
    "copy", "copy-start", "transpose", "slice", "dynamic-slice", "concatenate", "pad", "reverse", "reshape", "convert",
    "all-gather", "all-gather-start",
))  # fmt: skip
_VIEWS = frozenset((
    "bitcast", "get-tuple-element", "copy-done", "all-gather-done", "async-done", "async-update",
    "optimization-barrier", "parameter",
))  # fmt: skip
_IN_PLACE = frozenset(("scatter", "dynamic-update-slice"))
_CONTROL = frozenset(("tuple", "while", "conditional", "call", "async-start"))
_IN_FUSION = _MOVES | _VIEWS | {"constant", "tuple"}
_COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
)  # fmt: skip
_MIN_WEIGHT_BYTES = 2**16  # norms and biases are copied about freely


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy that was found.

    Attributes:
      of: the weight's name, or "pages".
      in_loop: each step repeats it.
    """

    of: str
    instruction: str
    bytes: int
    in_loop: bool
    on_chip: bool = False


class Program:
    """A module of optimised HLO.

    Args:
      text: as XLA prints or dumps it.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if current is None:
                head = _HEAD.match(line)
                if head:
                    current = self.computations.setdefault(head[2], {})
                    self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            else:
                instruction = parse_instruction(line)
                if instruction is not None:
                    current[instruction.name] = instruction
        self._callers: dict[str, list[tuple[str, Instruction]]] = {}
        for name, body in self.computations.items():
            for instruction in body.values():
                for called in instruction.called:
                    self._callers.setdefault(called, []).append((name, instruction))
        self._sources: dict[tuple[str, str, int], frozenset[str]] = {}

    def collectives(self) -> dict[str, int]:
        """How many of each kind the program holds; one in a loop counts once."""
        found = Counter(
            instruction.opcode.removesuffix("-start")
            for body in self.computations.values()
            for instruction in body.values()
        )
        return {kind: found[kind] for kind in _COLLECTIVES if found[kind]}

    def copied_weights(self) -> list[Copy]:
        """Copies of arguments whose name begins with "params"."""
        sizes = {i.name: num_bytes(i.shape) for i in self.computations.get(self.entry, {}).values() if _is_param(i)}
        found = []
        for computation, move in self._moves():
            size = max(num_bytes(part) for part in _destinations(move))
            if size < _MIN_WEIGHT_BYTES or all(_is_on_chip(part) for part in _destinations(move)):
                continue
            for source in sorted(self._sources_of_operands(computation, move)):
                name = _argument_name(self.computations[self.entry][source])
                if name.startswith("params") and sizes[source] >= _MIN_WEIGHT_BYTES and size >= sizes[source] / 2:
                    found.append(Copy(name, move.name, size, self._in_loop(computation)))
        return found

    def copied_pages(self, shapes: Iterable[Sequence[int]]) -> list[Copy]:
        """What writes an array of a page store anew.

        Args:
          shapes: of the arrays of a page store, on one device. Transposed counts as well.
        """
        wanted = {tuple(sorted(shape)) for shape in shapes}
        found = []
        for computation, instruction in self._unfused():
            if self._keeps_in_place(instruction):
                continue
            for part in _destinations(instruction):
                if tuple(sorted(dims(part))) in wanted:
                    where = self._in_loop(computation), _is_on_chip(part)
                    found.append(Copy("pages", instruction.name, num_bytes(part), *where))
        return found

    def _keeps_in_place(self, instruction: Instruction) -> bool:
        if instruction.opcode == "custom-call":
            return "output_to_operand_aliasing" in instruction.attributes
        if instruction.opcode == "fusion":
            return any(self._ends_in_update(called) for called in instruction.called)
        return instruction.opcode in _VIEWS | _CONTROL | _IN_PLACE

    def _ends_in_update(self, computation: str) -> bool:
        body = self.computations.get(computation, {})
        roots = [i for i in body.values() if i.is_root]
        while roots and roots[0].opcode in ("bitcast", "tuple"):
            roots = [body[name] for name in roots[0].operands if name in body] + roots[1:]
        return bool(roots) and all(root.opcode in _IN_PLACE for root in roots)

    def _moves(self) -> Iterable[tuple[str, Instruction]]:
        return ((name, instruction) for name, instruction in self._unfused() if self._is_move(instruction))

    def _unfused(self) -> Iterable[tuple[str, Instruction]]:
        """Instructions whose results are buffers: not those inside fusions and reductions."""
        fused = {
            name for name, callers in self._callers.items() if any(caller.opcode == "fusion" for _, caller in callers)
        }
        for name, body in self.computations.items():
            if name in fused:
                continue
            for instruction in body.values():
                yield name, instruction

    def _is_move(self, instruction: Instruction) -> bool:
        if instruction.opcode != "fusion":
            return instruction.opcode in _MOVES
        opcodes = {i.opcode for called in instruction.called for i in self.computations.get(called, {}).values()}
        return opcodes <= _IN_FUSION and bool(opcodes & _MOVES)

    # Following values back.

    def _sources_of_operands(self, computation: str, move: Instruction) -> frozenset[str]:
        operands = move.operands[:1] if move.opcode.startswith(("dynamic-slice", "pad")) else move.operands
        return frozenset().union(*(self._source(computation, operand) for operand in operands))

    def _source(self, computation: str, name: str, element: int | None = None) -> frozenset[str]:
        """Entry parameters that the value, or that element of it, is a moved or plain view of."""
        key = (computation, name, -1 if element is None else element)
        if key in self._sources:
            return self._sources[key]
        self._sources[key] = frozenset()  # a loop's carry meets itself
        self._sources[key] = self._find_source(computation, name, element)
        return self._sources[key]

    def _find_source(self, computation: str, name: str, element: int | None) -> frozenset[str]:
        instruction = self.computations[computation].get(name)
        if instruction is None:
            return frozenset()
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            return self._source_of_parameter(computation, instruction, element)
        if opcode == "get-tuple-element":
            index = int(_attribute(instruction, "index") or 0)
            return self._source(computation, operands[0], index) if element is None else frozenset()
        if opcode == "tuple":
            return frozenset() if element is None else self._source(computation, operands[element])
        if opcode in ("while", "optimization-barrier"):
            return self._source(computation, operands[0], element)
        if opcode in _VIEWS or self._is_move(instruction):
            found = (self._source(computation, operand) for operand in operands[:8])
            return frozenset().union(*found)
        return frozenset()

    def _source_of_parameter(self, computation: str, parameter: Instruction, element: int | None) -> frozenset[str]:
        if computation == self.entry:
            return frozenset({parameter.name}) if element is None else frozenset()
        number = int(parameter.attributes.split(")")[0].strip("( ") or 0)
        found: frozenset[str] = frozenset()
        for where, caller in self._callers.get(computation, []):
            operand = number
            if caller.opcode == "conditional":
                operand = 1 + caller.called.index(computation)
            operands = caller.operands or self._late_operands(where, caller)
            if operand < len(operands):
                found |= self._source(where, operands[operand], element)
        return found

    def _late_operands(self, computation: str, start: Instruction) -> tuple[str, ...]:
        """What an async-start without operands gets by its async-update: a tpu7x copies on its sparse cores so."""
        body = self.computations[computation].values()
        updates = (i.operands for i in body if i.opcode == "async-update" and i.operands[:1] == (start.name,))
        return next(updates, ())[1:]

    def _in_loop(self, computation: str) -> bool:
        """Whether a while loop's body leads to the computation."""
        seen, todo = set(), [computation]
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            for where, caller in self._callers.get(name, []):
                if caller.opcode == "while":
                    return True
                todo.append(where)
        return False


def _attribute(instruction: Instruction, name: str) -> str | None:
    found = re.search(rf"\b{name}=([\w.\-]+)", instruction.attributes)
    return found[1] if found else None


def _is_param(instruction: Instruction) -> bool:
    return instruction.opcode == "parameter"


def _argument_name(parameter: Instruction) -> str:
    """The Python name of an argument, such as "params['embedding'].value", or how XLA names it."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', parameter.attributes)
    return found[1].replace("\\'", "'") if found else parameter.name


def _destinations(move: Instruction) -> list[str]:
    """The arrays that a move writes: one of (destination, source, ...), or of all-gather's (source, destination)."""
    arrays = [match[0] for match in ARRAY.finditer(move.shape)]
    if move.opcode == "all-gather-start":
        return arrays[1:2]
    return arrays[:1] if move.opcode == "copy-start" else arrays or ["u8[]"]


def _is_on_chip(array: str) -> bool:
    return re.search(r"S\([1-4]\)", array) is not None
