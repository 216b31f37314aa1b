"""A grammar of one's own, from a TOML file: one key a field of `Grammar`, `name` being the file's unless given.

    block = ["<Parallel>", "</Parallel>"]
    plan = "<Goal>"
    trigger = "</Goal>"
    outline = '<Outline>\\s*([0-9]+)\\s*:'
    header = "<Path>{label}:"
    closer = "</Path>"
    after_join = "<Conclusion>"
    join = "stitch"

    [child_sampling]
    repetition_penalty = 1.02

Keys without a default must be there; what contradicts is refused. A task's prompts go by `name`: with
`name = "multiverse"` the embedded model gets those on which it writes Multiverse's blocks.
"""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from apr_jax.config import check
from apr_jax.reasoning.grammars.declaration import Grammar

_KINDS: dict[str, tuple[type, ...]] = {
    "block": (list,),
    "nested": (bool,),
    "child_sampling": (dict,),
    **dict.fromkeys(("num_paths", "max_depth", "max_rounds", "max_children", "max_child_tokens"), (int,)),
}
_WORDS = {str: "a string", int: "a whole number", bool: "true or false", list: "a list", dict: "a table"}


def load_grammar(path: str | Path) -> Grammar:
    """The grammar in a file.

    Raises:
      ValueError: there is no such file, it is no TOML, or no sound grammar; the message names the key and its value.
    """
    path = Path(path)
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"grammar file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"grammar file {path} is no TOML: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(Grammar)}
    table = {"name": path.stem} | table
    for key, value in table.items():
        check(key in fields, f"grammar file {path}: key {key!r} (= {value!r}) is not one of {', '.join(fields)}")
        kinds = _KINDS.get(key, (str,))
        is_kind = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        check(is_kind, f"grammar file {path}: {key} is {value!r}, must be {_WORDS[kinds[0]]}")
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        check(name in table or not needed, f"grammar file {path}: key {name!r} is missing")
    block = table["block"]
    is_pair = len(block) == 2 and all(isinstance(tag, str) for tag in block)
    check(is_pair, f"grammar file {path}: block is {block!r}, must be an opening and a closing tag")
    has_marker = table.get("join") != "conclusion" or "conclusion_marker" in table
    check(has_marker, f"grammar file {path}: join is 'conclusion', but conclusion_marker is missing")
    table["block"] = tuple(block)
    try:
        return Grammar(**table)
    except (ValueError, TypeError) as error:
        raise ValueError(f"grammar file {path}: {error}") from error
