"""The text of HLO: its instructions and shapes."""

import dataclasses
import re
from collections.abc import Iterable

_ITEM_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8}
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"\b(?:calls|called_computations|to_apply|body|condition|branch_computations|true_computation|false_computation)="
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      shape: as printed; a tuple's begins with a parenthesis.
      called: computations named by it, in order.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    called: tuple[str, ...]
    is_root: bool


def parse_instruction(line: str) -> Instruction | None:
    """The instruction of a line; None if it holds none."""
    match = _LINE.match(line)
    if match is None:
        return None
    shape, rest = _split_shape(match[3])
    opcode, _, rest = rest.partition("(")
    end = _closing(rest)
    inside, attributes = rest[:end], rest[end + 1 :]
    operands = re.findall(r"%([\w.\-]+)", inside) if "%" in inside else re.findall(r"[A-Za-z_][\w.\-]*", inside)
    called: list[str] = []
    for found in _CALLED.finditer(attributes):
        value = attributes[found.end() :]
        value = value[1 : value.index("}")] if value.startswith("{") else re.split(r"[,\s]", value, maxsplit=1)[0]
        called += [name.strip().lstrip("%") for name in value.split(",")]
    if opcode == "parameter":
        operands, attributes = [], f"({inside})" + attributes
    return Instruction(match[2], shape, opcode.strip(), tuple(operands), attributes, tuple(called), bool(match[1]))


def _split_shape(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    end = _closing(text[1:]) + 2
    return text[:end], text[end:].lstrip()


def _closing(text: str) -> int:
    """Where the parenthesis that is open at the start of the text closes."""
    depth = 1
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return at
    return len(text)


def dims(array: str) -> tuple[int, ...]:
    """The sizes in an array's shape, such as "bf16[8,33]{1,0}"."""
    match = ARRAY.match(array)
    return tuple(int(size) for size in match[2].split(",") if size) if match else ()


def product(sizes: Iterable[int]) -> int:
    """Of all sizes; 1 if there are none."""
    total = 1
    for size in sizes:
        total *= size
    return total


def num_bytes(shape: str) -> int:
    """Bytes of all arrays of a shape, without what the layout pads."""
    total = 0
    for kind, dims, _ in ARRAY.findall(shape):
        digits = re.search(r"\d+$", kind)
        bits = _ITEM_BITS.get(kind) or (int(digits[0]) if digits else 0)
        total += product(int(size) for size in dims.split(",") if size) * bits // 8
    return total
