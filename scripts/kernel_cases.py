"""Named cases of `benchmark_kernels.py`: who reads what.

Letters: R rows, T queries a row.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable

from apr_jax.config import check

FAMILY_ROWS = 8  # rows that share a joined context, below a prefix four times as long as a joined segment


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows [lo, hi) read these segments, given by their numbers of tokens."""

    lo: int
    hi: int
    segments: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """A call of the kernel.

    Attributes:
      kind: "decode", "tree", "joined", "prefill" or "unrelated".
      num_rows: R. num_queries: T.
      levels: of the tree of contexts, from the root; the groups of a level are ordered and disjoint.
      tail_len: tokens of each row's own tail, the call's own T among them.
      parameters: what the name says, for plots.
    """

    name: str
    kind: str
    num_rows: int
    levels: tuple[tuple[Group, ...], ...]
    tail_len: int
    num_queries: int = 1
    parameters: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def unique_tokens(self) -> int:
        """Tokens with keys, each counted once."""
        sealed = sum(sum(group.segments) for level in self.levels for group in level)
        return sealed + self.num_rows * self.tail_len

    @property
    def visible_tokens(self) -> int:
        """Pairs of a query and a token that it sees."""
        sealed = sum((group.hi - group.lo) * sum(group.segments) for level in self.levels for group in level)
        first = self.tail_len - self.num_queries + 1  # tokens of the tail that the first query sees
        in_tail = self.num_queries * first + self.num_queries * (self.num_queries - 1) // 2
        return self.num_queries * sealed + self.num_rows * in_tail


def _decode(readers: int, prefix: int, tail: int) -> dict:
    return {"num_rows": readers, "levels": ((Group(0, readers, (prefix,)),),), "tail_len": tail}


def _tree(depth: int, readers: int, root: int, tail: int) -> dict:
    """depth - 1 levels below the root, then the leaves' tails; each node has as many children as any other."""
    fan = round(readers ** (1 / depth))
    check(fan**depth == readers and fan > 1, f"tree{depth} has {readers} readers, must be n ** {depth} for an n > 1")
    levels = []
    for level in range(depth):
        size = readers // fan**level
        tokens = max(1, root // fan**level)
        levels.append(tuple(Group(lo, lo + size, (tokens,)) for lo in range(0, readers, size)))
    return {"num_rows": readers, "levels": tuple(levels), "tail_len": tail}


def _joined(segments: int, tokens: int, readers: int, tail: int) -> dict:
    size = min(FAMILY_ROWS, readers)
    check(readers % size == 0, f"readers is {readers}, must be a multiple of {size}")
    parts = (4 * tokens, *[tokens] * segments)
    return {
        "num_rows": readers,
        "levels": (tuple(Group(lo, lo + size, parts) for lo in range(0, readers, size)),),
        "tail_len": tail,
    }


def _prefill(chunk: int, context: int) -> dict:
    levels = ((Group(0, 1, (context,)),),) if context else ()
    return {"num_rows": 1, "levels": levels, "tail_len": chunk, "num_queries": chunk}


def _unrelated(rows: int, context: int) -> dict:
    tail = min(64, context)
    levels = (tuple(Group(i, i + 1, (context - tail,)) for i in range(rows)),) if context > tail else ()
    return {"num_rows": rows, "levels": levels, "tail_len": tail}


_FORMS: dict[str, tuple[str, str, Callable[..., dict]]] = {  # kind -> (form, pattern, what makes the case)
    "decode": ("decode_readersN_prefixN_tailN", r"decode_readers(\d+)_prefix(\d+)_tail(\d+)", _decode),
    "tree": ("treeN_readersN_rootN_tailN", r"tree(\d+)_readers(\d+)_root(\d+)_tail(\d+)", _tree),
    "joined": ("joinedN_tokensN_readersN_tailN", r"joined(\d+)_tokens(\d+)_readers(\d+)_tail(\d+)", _joined),
    "prefill": ("prefill_chunkN_contextN", r"prefill_chunk(\d+)_context(\d+)", _prefill),
    "unrelated": ("unrelated_rowsN_contextN", r"unrelated_rows(\d+)_context(\d+)", _unrelated),
}

READERS, PREFIXES, TAILS = (1, 8, 64, 256), (128, 512, 4096, 32768), (16, 256, 1024)
_OTHERS = (
    "tree2_readers64_root4096_tail128",
    "tree3_readers64_root4096_tail128",
    "tree2_readers256_root4096_tail128",
    "joined8_tokens100_readers64_tail64",
    "joined64_tokens100_readers64_tail64",
    "prefill_chunk512_context0",
    "prefill_chunk512_context4096",
    "prefill_chunk512_context32768",
    "prefill_chunk2048_context0",
    "prefill_chunk2048_context4096",
    "prefill_chunk2048_context32768",
    "unrelated_rows8_context4096",
    "unrelated_rows64_context512",
    "unrelated_rows64_context4096",
    "unrelated_rows256_context4096",
)
STEP, SMALL_STEP = "step_threads64_prefix4096", "step_threads2_prefix32"  # a model's whole decode step: decode_step.py

SUITES: dict[str, tuple[str, ...]] = {
    "all": (
        STEP,
        *_OTHERS,
        *(f"decode_readers{r}_prefix{p}_tail{t}" for r, p, t in itertools.product(READERS, PREFIXES, TAILS)),
    ),
    # About 8 minutes on an H200, what matters most first: the rest is cut off by --budget_s.
    "h200": (
        "decode_readers64_prefix4096_tail16",
        "unrelated_rows256_context4096",
        STEP,
        "tree2_readers64_root4096_tail128",
        "tree3_readers64_root4096_tail128",
        "joined8_tokens100_readers64_tail64",
        "joined64_tokens100_readers64_tail64",
        *(f"decode_readers{r}_prefix4096_tail256" for r in READERS),
        *(f"decode_readers64_prefix{p}_tail256" for p in PREFIXES if p != 4096),
        "prefill_chunk512_context4096",
        "prefill_chunk2048_context32768",
        "decode_readers1_prefix32768_tail256",
        "decode_readers256_prefix32768_tail1024",
        "decode_readers64_prefix4096_tail1024",
        "unrelated_rows64_context4096",
    ),
    "cpu": (
        "decode_readers1_prefix512_tail16",
        "decode_readers8_prefix512_tail16",
        "decode_readers32_prefix512_tail16",
        "tree2_readers16_root512_tail16",
        "joined8_tokens20_readers8_tail16",
        "prefill_chunk64_context512",
        "unrelated_rows8_context512",
    ),
    "tiny": (  # what interpret mode can run
        "decode_readers1_prefix32_tail5",
        "decode_readers4_prefix64_tail9",
        "tree2_readers4_root64_tail9",
        "joined3_tokens9_readers4_tail5",
        "prefill_chunk24_context40",
        "unrelated_rows4_context90",
        SMALL_STEP,
    ),
}


def parse_case(name: str) -> KernelCase:
    """The case that a name stands for.

    Raises:
      ValueError: the name has no known form, or a number that makes no case.
    """
    for kind, (_, pattern, make) in _FORMS.items():
        found = re.fullmatch(pattern, name)
        if found is None:
            continue
        numbers = [int(number) for number in found.groups()]
        zero_is_fine = kind == "prefill" and numbers[0] > 0
        check(zero_is_fine or min(numbers) > 0, f"case {name!r}: numbers must be >= 1")
        words = [word for word in re.findall(r"[a-z]+", pattern.replace(r"\d", "")) if word != kind]
        words = ["depth" if kind == "tree" else "segments"] * (len(numbers) > len(words)) + words
        try:
            sizes = make(*numbers)
        except ValueError as error:
            raise ValueError(f"case {name!r}: {error}") from None
        return KernelCase(name, kind, **sizes, parameters=dict(zip(words, numbers, strict=True)))
    forms = ", ".join(form for form, _, _ in _FORMS.values())
    raise ValueError(f"case {name!r} is unknown, must be {STEP} or of a form {forms}")
