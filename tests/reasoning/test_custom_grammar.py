"""Grammars from files: what they say holds, and one line names what they get wrong."""

import dataclasses
import json

import pytest
from sentencepiece import sentencepiece_model_pb2
from transcripts import Transcripts, assert_all_pages_free, scripted_engine

from apr_jax.reasoning.grammars.custom import load_grammar
from apr_jax.reasoning.programs import GRAMMARS, make_program
from apr_jax.tasks.countdown_tokenizer import build_sentencepiece_model
from apr_jax.testing import byte_tokenizer
from apr_jax.tokenizers import SentencePieceTokenizer
from apr_jax.types import SamplingParams

FIELDS = {
    "block": ["[fork]", "[/fork]"],
    "plan": "[fork]",
    "trigger": "[go]",
    "outline": r"\* ([a-z]+)",
    "header": "[{label}]",
    "closer": "[end]",
    "after_join": "[all]",
}


def write(tmp_path, fields) -> str:
    """A TOML file of plain fields; JSON's strings, numbers and lists are TOML's."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items() if not isinstance(value, dict)]
    for key, table in fields.items():
        if isinstance(table, dict):
            lines += [f"[{key}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items())]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_a_file_says_the_format(tmp_path):
    path = write(tmp_path, FIELDS | {"join": "prefill", "child_sampling": {"temperature": 0.5}})
    tokenizer = byte_tokenizer()
    program = make_program(path, tokenizer)
    assert program.name == "mine"
    texts = {"": "so [fork]* ab * cd [go] ok[/fork] 7", "0.0": "1[end]", "0.1": "22[end]"}
    engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer)
    out = engine.generate("Q", program, sampling=SamplingParams(max_new_tokens=200))
    assert out.text == "so [fork]* ab * cd [go][ab]1[end][cd]22[end][all] ok[/fork] 7"
    assert out.answer == "7" and out.degraded == [] and out.program == "mine"
    assert out.metrics.reprefill_tokens == len("[cd]22[end]")
    by_name = engine.generate("Q", path, sampling=SamplingParams(max_new_tokens=200))
    assert by_name.text == out.text
    stitched = engine.generate("Q", make_program(path, tokenizer, "stitch"), sampling=SamplingParams())
    assert stitched.text == out.text and stitched.metrics.reprefill_tokens == 0
    assert_all_pages_free(engine)


@pytest.mark.parametrize("name", list(GRAMMARS))
def test_a_published_grammar_survives_the_way_through_a_file(tmp_path, name):
    fields = {key: value for key, value in dataclasses.asdict(GRAMMARS[name]).items() if value is not None}
    assert load_grammar(write(tmp_path, fields)) == GRAMMARS[name]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tirgger": "x"}, "key 'tirgger' (= 'x') is not one of name, block, plan"),
        ({"trigger": None}, "key 'trigger' is missing"),
        ({"block": None}, "key 'block' is missing"),
        ({"trigger": 3}, "trigger is 3, must be a string"),
        ({"nested": 1}, "nested is 1, must be true or false"),
        ({"num_paths": True}, "num_paths is True, must be a whole number"),
        ({"block": "[fork]"}, "block is '[fork]', must be a list"),
        ({"block": ["[fork]"]}, "block is ['[fork]'], must be an opening and a closing tag"),
        ({"block": ["[fork]", 3]}, "block is ['[fork]', 3], must be an opening and a closing tag"),
        ({"child_sampling": 1}, "child_sampling is 1, must be a table"),
        ({"child_sampling": {"seed": 1}}, "child_sampling sets seed, may set temperature"),
        ({"child_sampling": {"temperature": "hot"}}, "temperature in child_sampling is 'hot', must be a finite number"),
        ({"outline": "no group"}, "outline is 'no group', has 0 groups, must have 1, the label"),
        ({"outline": None}, "num_paths is 0, with outline = None"),
        ({"join": "splice"}, "join is 'splice', must be one of stitch, prefill, conclusion"),
        ({"join": "conclusion"}, "join is 'conclusion', but conclusion_marker is missing"),
        ({"closer": ""}, "closer is '', must not be empty"),
        ({"closer": "[go]"}, "trigger is '[go]', is part of the closer '[go]'"),
        ({"block": ["[fork]", "[fork]"]}, "its tags must differ"),
        ({"closer": "[/fork]"}, "closer is '[/fork]', is a tag of the block as well"),
        ({"trigger": "[/fork]"}, "trigger is '[/fork]', is a tag of the block as well"),
        ({"trigger": "[fork]"}, "trigger is '[fork]', opens the plan as well"),
        ({"after_join": "[go]"}, "after_join is '[go]', holds the trigger '[go]'"),
        (
            {"conclusion_marker": "so", "header": "so {label}"},
            "header is 'so {label}', holds the conclusion_marker 'so'",
        ),
        ({"header": "[{label!z}]"}, "header is '[{label!z}]', may name {label} only, without a format or conversion"),
        ({"header": "[{label:d}]"}, "may name {label} only, without a format or conversion"),
        ({"outline": "([0-9]*)"}, "outline is '([0-9]*)', matches nothing at all"),
        ({"outline": None, "plan": "", "num_paths": 2000}, "num_paths is 2000, must be <= 1024"),
        ({"outline": None, "plan": "", "num_paths": 5, "max_children": 2}, "max_children is 2, though num_paths is 5"),
        ({"child_sampling": {"top_k": 1.5}}, "top_k in child_sampling is 1.5, must be a whole number"),
        ({"child_sampling": {"temperature": True}}, "temperature in child_sampling is True, must be a finite number"),
        ({"child_sampling": {"temperature": -1}}, "child_sampling: temperature is -1, must be >= 0"),
    ],
)
def test_what_a_file_gets_wrong_is_named_in_one_line(tmp_path, changes, message):
    fields = {key: value for key, value in (FIELDS | changes).items() if value is not None}
    path = write(tmp_path, fields)
    with pytest.raises(ValueError) as caught:
        make_program(path, byte_tokenizer())
    assert str(caught.value).startswith(f"grammar file {path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"grammar file .*none\.toml: No such file"):
        make_program(str(tmp_path / "none.toml"), byte_tokenizer())
    broken = tmp_path / "broken.toml"
    broken.write_text("= 3", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.toml is no TOML: Invalid statement"):
        make_program(str(broken), byte_tokenizer())
    broken.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"broken\.toml is no TOML"):
        make_program(str(broken), byte_tokenizer())


@pytest.mark.parametrize("name", ["npr", "threadweaver", "parallel_r1", "apr"])
def test_a_tokenizer_that_cannot_write_a_programs_tags_is_named(name, tmp_path):
    model = sentencepiece_model_pb2.ModelProto.FromString(build_sentencepiece_model())
    kept = [piece for piece in model.pieces if "\n" not in piece.piece]
    del model.pieces[:]
    model.pieces.extend(kept)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=f"program '{name}' is not for this model's tokenizer: no token for"):
        make_program(name, SentencePieceTokenizer(path))


def test_programs_that_are_not_there():
    with pytest.raises(ValueError, match=r"program 'multivrse' is not one of sequential, multiverse, .* nor a path"):
        make_program("multivrse", byte_tokenizer())
    with pytest.raises(ValueError, match="join is 'stitch', program 'sequential' has no join to replace"):
        make_program("sequential", byte_tokenizer(), "stitch")
    with pytest.raises(ValueError, match="grammar 'npr': join is 'select', must be one of stitch, prefill"):
        make_program("npr", byte_tokenizer(), "select")
