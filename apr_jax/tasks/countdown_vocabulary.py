"""The pieces of the Countdown formats: one token each, a text has one segmentation.

Numbers have a piece with a leading space, as the formats of this project write them. A number above 199 is two pieces,
all but its last digit and the digit. APR's texts, whose threads name many states, have pieces for a number up to 199
alone, in a list and as a result, with the sign before it, for whole phrases, and for two that hold the target, up to
100.
"""

from collections.abc import Iterable

from apr_jax.tasks.countdown_search import BLOCK_SIZE, MAX_LINES, MAX_VALUE

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
CONTROLS = (UNK, BOS, EOS, PAD)  # ids 0 to 3
MODES = {name: f"<{name}>" for name in ("sequential", "multiverse", "threadweaver", "npr")}
TAGS = tuple(
    tag
    for name in ("Parallel", "Goal", "Outline", "Path", "Conclusion", "think", "Outlines", "Thread",
                 "guideline", "plan", "step", "takeaway")
    for tag in (f"<{name}>", f"</{name}>")
)  # fmt: skip
LABELS = tuple(f"{i}:" for i in range(1, BLOCK_SIZE + 1))
MARKER, MATCH, NEAREST, NONE, EMPTY = " =>", " !", " ~", " none", " ."
LEFT = "\n :"  # behind a line break: APR's client reads the line of a state to its end
SIGNS = (LEFT, " =", " |", " ,", " ;", MATCH, MARKER, " ->", EMPTY, " -", " +", " *", " /", NONE, NEAREST)
NUMBERS = tuple(f" {n}" for n in range(MAX_VALUE + 1))

BARE_NUMBERS = tuple(str(n) for n in range(MAX_VALUE + 1))
LISTED = tuple(f", {n}" for n in range(MAX_VALUE + 1))
RESULTS = tuple(f"={n}" for n in range(MAX_VALUE + 1))
MAX_TARGET = 100  # of APR's distribution
TARGETS = tuple(f"{n}:[" for n in range(MAX_TARGET + 1))
GOALS = tuple(f"\n{n},{n} equal: Goal Reached" for n in range(MAX_TARGET + 1))
BARE_SIGNS = ("-", "+", "*", "/", "\n")
NODE, NODES = "Moving to Node #0", tuple(f"Moving to Node #0,{i}" for i in range(MAX_LINES))
GENERATED = tuple(f"\nGenerated Node #0,{i}: " for i in range(MAX_LINES))
FIRST_GENERATED = {
    i: f"Generated Node #0,{i}: " for i in range(BLOCK_SIZE, MAX_LINES, BLOCK_SIZE)
}  # behind a line break
START, FAILED, REACHED = (
    tuple(text.format(i % BLOCK_SIZE, i) for i in range(MAX_LINES))
    for text in (
        "\n<Start Sub Search {} at level 1> Moving to Node #0,{}",
        "\n<No Solution in Sub Search {} at level 1 at Node #0,{}>",
        "\n<Goal Reached in Sub Search {} at level 1 at Node #0,{}>",
    )
)
# Behind a call that is dropped the numbers of searches and nodes part ways: such a line is two pieces.
PARTS = tuple(
    text.format(i)
    for text, count in (
        ("\n<Start Sub Search {}", BLOCK_SIZE),
        ("\n<No Solution in Sub Search {}", BLOCK_SIZE),
        ("\n<Goal Reached in Sub Search {}", BLOCK_SIZE),
        (" at level 1> Moving to Node #0,{}", MAX_LINES),
        (" at level 1 at Node #0,{}>", MAX_LINES),
    )
    for i in range(count)
)
STATE = "\nCurrent State: "
NO_OPERATIONS, OPERATIONS, OPERATION, END_OPERATIONS = "], Operations: []", "], Operations: ['", "', '", "']"
MADE_BY, NOTHING_FOUND = "] Operation: ", "\nNo solution found."
PATHS = tuple(f"\n{node}\nOperations: " for node in NODES)
CALLS = ("<Calling Sub Searches>", "<End Calling Sub Searches>", "<Sub Searches>", "<End Sub Searches>")
PHRASES = (
    NODE, *NODES, *GENERATED, *FIRST_GENERATED.values(), *START, *FAILED, *REACHED, STATE, NO_OPERATIONS, OPERATIONS,
    OPERATION, END_OPERATIONS, MADE_BY, NOTHING_FOUND, *PATHS, *PARTS,
)  # fmt: skip


def vocabulary() -> tuple[str, ...]:
    """All pieces in the order of their ids."""
    marks = (*CONTROLS, *MODES.values(), *TAGS, *CALLS, *LABELS, *SIGNS)
    return (*marks, *NUMBERS, *BARE_NUMBERS, *LISTED, *RESULTS, *TARGETS, *GOALS, *BARE_SIGNS, *PHRASES)


def number_pieces(value: int | None) -> list[str]:
    """The pieces of a value, ` .` for None."""
    if value is None:
        return [EMPTY]
    return [NUMBERS[value]] if value <= MAX_VALUE else [NUMBERS[value // 10], BARE_NUMBERS[value % 10]]


def numbers_pieces(values: Iterable[int | None]) -> list[str]:
    """The pieces of several values."""
    return [piece for value in values for piece in number_pieces(value)]
