"""Records survive whatever happens to their process; records of other settings are not mixed with them."""

import dataclasses
import json
import os

import pytest

from apr_jax.evaluation.budgets import TokenBudget
from apr_jax.evaluation.records import Record, RecordStore

SETTINGS = {"task": "countdown", "seed": 1, "sampling": {"temperature": 0.0, "stop_ids": ()}}


def record(problem: int, budget: TokenBudget | None = None, **fields) -> Record:
    values = {
        "program": "multiverse+when=first",
        "budget": budget,
        "problem": problem,
        "seed": 1 + problem,
        "settings": "x",
        "correct": bool(problem % 2),
        "answer": "ü",
        "reason": None,
        "finish_reason": "eos",
        "well_formed": True,
        "degraded": ["thread 0: odd"],
        "metrics": {"total_tokens": 3 + problem, "wall_s": 0.25},
        "needed": {"total": 4},
    }
    return Record(**{**values, **fields})


def test_what_was_added_is_there_again(tmp_path):
    path = tmp_path / "records.jsonl"
    budgets = [None, TokenBudget("total", 256), TokenBudget("context", 256)]
    with RecordStore(SETTINGS, path) as store:
        for budget in budgets:
            store.add(record(7, budget))
    with RecordStore(SETTINGS, path) as store:
        for budget in budgets:
            assert store.get("multiverse+when=first", budget, 7) == record(7, budget)
        assert store.get("multiverse", None, 7) is None
        assert store.get("multiverse+when=first", TokenBudget("critical_path", 256), 7) is None


@pytest.mark.parametrize("lost", [1, 7, 60])
def test_a_torn_last_line_is_dropped_and_written_anew(tmp_path, lost):
    path = tmp_path / "records.jsonl"
    with RecordStore(SETTINGS, path) as store:
        store.add(record(1))
        store.add(record(2))
    os.truncate(path, path.stat().st_size - lost)
    with RecordStore(SETTINGS, path) as store:
        assert store.get("multiverse+when=first", None, 1) == record(1)
        assert store.get("multiverse+when=first", None, 2) is None
        store.add(record(2))
    with RecordStore(SETTINGS, path) as store:
        assert store.get("multiverse+when=first", None, 2) == record(2)


@pytest.mark.parametrize("content", ['{"mine": 1}', '{"mine": 1}\n{"mine": 2}'])
def test_what_is_not_ours_stays_as_it_is(tmp_path, content):
    path = tmp_path / "records.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="line 1 holds no settings"):
        RecordStore(SETTINGS, path)
    assert path.read_text() == content


def test_a_torn_first_line_is_an_empty_file(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"settings": SETTINGS})[:-3])
    with RecordStore(SETTINGS, path) as store:
        store.add(record(1))
    with RecordStore(SETTINGS, path) as store:
        assert store.get("multiverse+when=first", None, 1) == record(1)


def test_other_settings_are_refused_by_name_and_nothing_changes(tmp_path):
    path = tmp_path / "records.jsonl"
    with RecordStore(SETTINGS, path) as store:
        store.add(record(1))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"holds results with seed = 1, asked for is 2"):
        RecordStore({**SETTINGS, "seed": 2}, path)
    with pytest.raises(ValueError, match=r"holds results with dtype = None, asked for is 'bfloat16'"):
        RecordStore({**SETTINGS, "dtype": "bfloat16"}, path)
    assert path.read_bytes() == before


def test_what_is_no_record_is_refused_with_its_line(tmp_path):
    path = tmp_path / "records.jsonl"
    with RecordStore(SETTINGS, path) as store:
        store.add(record(1))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + '{"program": "x"}\n' + lines[1])
    with pytest.raises(ValueError, match="line 2 is no record"):
        RecordStore(SETTINGS, path)
    path.write_text("my notes\n")
    with pytest.raises(ValueError, match="line 1 holds no settings"):
        RecordStore(SETTINGS, path)


def test_two_processes_do_not_write_to_one_file(tmp_path):
    path = tmp_path / "records.jsonl"
    with RecordStore(SETTINGS, path), pytest.raises(OSError, match="another process writes to"):
        RecordStore(SETTINGS, path)
    RecordStore(SETTINGS, path).__exit__()


def test_without_a_file_records_are_kept_in_memory():
    with RecordStore(SETTINGS) as store:
        store.add(record(1))
        store.add(dataclasses.replace(record(1), correct=False))
        found = store.get("multiverse+when=first", None, 1)
    assert found is not None and not found.correct
