"""What the kernel benchmark counts, plans, checks and prints."""

import itertools
import json

import kernel_baselines
import kernel_flashinfer
import kernel_runs
import numpy as np
import pytest
from command import run
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged
from kernel_cases import SMALL_STEP, STEP, SUITES, parse_case
from kernel_layout import build_plan, lay_out, page_maps, page_table
from kernel_report import markdown
from kernel_runs import NO_SHARING, CaseRun, Settings

PAGE_SIZE = 16
NAMES = [name for name in SUITES["tiny"] + SUITES["cpu"] if name != SMALL_STEP] + [
    "tree3_readers8_root64_tail5",
    "joined64_tokens5_readers16_tail3",
    "unrelated_rows3_context20",
    "prefill_chunk20_context0",
]
SMALL = ("--kv_heads=2", "--head_dim=16", "--repeats=1", "--min_ms=1")


def _plan(name, min_shared_tokens=1):
    options = {"item_pages": 4, "target_runs": 5, "max_partials": 64}
    return build_plan(parse_case(name), PAGE_SIZE, min_shared_tokens=min_shared_tokens, **options)


def _pairs(case, plan):
    """(row, page, slot) that the first query of a decode call, or the last of a chunk, sees; counted."""
    seen = {}
    for w in range(plan.num_items):
        for at, page in enumerate(plan.pages[w].tolist()):
            fill = int(plan.fills[w, at])
            if plan.tail_slot[w] >= 0:
                fill = min(max(case.tail_len - int(plan.tail_offset[w]) - at * PAGE_SIZE, 0), PAGE_SIZE)
            for row in range(*plan.rows[w]):
                for slot in range(fill):
                    seen[row, page, slot] = seen.get((row, page, slot), 0) + 1
    return seen


def _settings(**changes):
    fields = dict(
        page_size=PAGE_SIZE, num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32", kv_dtype="float32",
        item_pages=4, max_partials=64, min_shared_tokens=1, target_runs=(1, 3), repeats=2, min_s=1e-4, seed=0,
        backend="reference", interpret=False, rotate_bytes=100_000, copy_bytes_per_s=1e10, flops_per_s=1e11,
    )  # fmt: skip
    return Settings(**(fields | changes))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("min_shared_tokens", [1, NO_SHARING])
def test_counts_are_those_of_the_plan(name, min_shared_tokens):
    case = parse_case(name)
    plan = _plan(name, min_shared_tokens)
    seen = _pairs(case, plan)
    assert set(seen.values()) == {1}, "a row reads each token once"
    assert len({(page, slot) for _, page, slot in seen}) == case.unique_tokens
    # Query t of a chunk misses the T - 1 - t tokens after it.
    missed = case.num_rows * case.num_queries * (case.num_queries - 1) // 2
    assert case.num_queries * len(seen) - missed == case.visible_tokens
    if min_shared_tokens == NO_SHARING:
        assert (plan.rows[:, 1] - plan.rows[:, 0] == 1).all()


def test_every_case_of_every_suite_has_a_meaning():
    for name in set(itertools.chain.from_iterable(SUITES.values())) - {STEP, SMALL_STEP}:
        case = parse_case(name)
        assert case.name == name and case.parameters and case.unique_tokens <= case.num_rows * case.visible_tokens


def test_the_issue_of_sizes_is_in_the_full_suite():
    for readers, prefix, tail in itertools.product((1, 8, 64, 256), (128, 512, 4096, 32768), (16, 256, 1024)):
        case = parse_case(f"decode_readers{readers}_prefix{prefix}_tail{tail}")
        assert case.name in SUITES["all"]
        assert case.unique_tokens == prefix + readers * tail
        assert case.visible_tokens == readers * (prefix + tail)


@pytest.mark.parametrize("name", ["decode", "tree2_readers10_root64_tail5", "decode_readers0_prefix1_tail1"])
def test_unknown_cases_are_refused(name):
    with pytest.raises(ValueError, match=name):
        parse_case(name)


def test_variants_lie_on_pages_of_their_own():
    maps = page_maps(7, 5, np.random.default_rng(0))
    assert (maps[:, 0] == 0).all()
    assert sorted(maps[:, 1:].ravel().tolist()) == list(range(1, 31))


def test_page_tables_are_for_contexts_without_holes():
    tree = parse_case("tree2_readers4_root64_tail9")
    table = page_table(tree, lay_out(tree, PAGE_SIZE), PAGE_SIZE)
    assert table is not None and table.shape == (4, 4 + 2 + 1)
    assert (table[:, :4] == table[0, :4]).all() and len(np.unique(table)) == 4 + 2 * 2 + 4
    joined = parse_case("joined3_tokens9_readers4_tail5")
    assert page_table(joined, lay_out(joined, PAGE_SIZE), PAGE_SIZE) is None


def test_the_table_says_what_has_no_time():
    untimed = {"kind": "tree", "us": None, "backend": "tpu"}
    cases = [
        {"name": "checked", "max_error": 1e-3, "correct": True, "baselines": {}, **untimed},
        {"name": "bad", "max_error": 0.5, "correct": False, **untimed},
        {"name": "broken", "error": "ValueError: a|b", **untimed},
        {"name": "late", "skipped": "--budget_s=1 are over", **untimed},
        {"name": "step", "skipped": "--budget_s=1 are over", **untimed, "kind": "step"},
    ]
    summary = {"cases": cases, "measured": None, "note": "", "device": {"kind": "a chip", "backend": "tpu"}}
    lines = {line.split("|")[1].strip(): line for line in markdown(summary).splitlines() if line.startswith("| ")}
    assert len({line.count("|") for line in lines.values()}) == 1, "every row has every cell"
    assert "1.0e-03" in lines["checked"] and "WRONG" not in lines["checked"]
    assert "5.0e-01 WRONG" in lines["bad"]
    assert "a/b" in lines["broken"] and "skipped" in lines["late"]
    assert "`step`: skipped" in markdown(summary)


def _tokens(ids, last, page_size):
    """Where the tokens of a sequence of pages lie, the last page holding `last`."""
    found = [int(page) * page_size + slot for page in ids for slot in range(page_size)]
    return found[: len(found) - page_size + last]


@pytest.mark.parametrize(
    "name", ["joined3_tokens9_readers4_tail5", "tree3_readers8_root64_tail5", "decode_readers4_prefix64_tail9"]
)
def test_flashinfer_is_given_what_each_row_sees(name):
    case_run = CaseRun(parse_case(name), _settings())
    expected = [[] for _ in range(case_run.case.num_rows)]
    for row, page, slot in _pairs(case_run.case, _plan(name)):
        expected[row].append(int(case_run.maps[-1][page]) * PAGE_SIZE + slot)
    names = []
    for how, levels, page_size, _ in kernel_flashinfer._candidates(case_run):
        found = [[] for _ in expected]
        for bounds, ids, last in kernel_flashinfer._mapped(levels, case_run.maps[-1], PAGE_SIZE, page_size):
            for lo, hi, pages, fill in zip(bounds, bounds[1:], ids, last, strict=False):
                for row in range(lo, hi):
                    found[row] += _tokens(pages, fill, page_size)
        assert [sorted(row) for row in found] == [sorted(row) for row in expected], how
        names.append(how)
    assert len(names) == 3 and "Cascade" in names[0]


@pytest.mark.parametrize("name", ["decode_readers4_prefix64_tail9", "prefill_chunk32_context64"])
def test_jaxs_ragged_kernel_is_given_what_each_row_sees(name, monkeypatch):
    """JAX's own reference stands in for the kernel, which needs a TPU."""
    monkeypatch.setattr(ragged, "ragged_paged_attention", ragged.ref_ragged_paged_attention)
    case_run = CaseRun(parse_case(name), _settings())
    table = page_table(case_run.case, case_run.layout, PAGE_SIZE)
    ((_, table, call, make_store),) = kernel_baselines._ragged_candidates(case_run, table)
    scaled = case_run.q * case_run.settings.head_dim**-0.5
    o = call(scaled, make_store(case_run.stores[0]), case_run.maps[0][table])
    assert case_run.error_of(o, case_run.reference())[1]


def test_our_kernel_is_checked_before_it_is_timed(monkeypatch):
    case_run = CaseRun(parse_case("decode_readers4_prefix64_tail9"), _settings())
    assert len(case_run.stores) * len(case_run.maps) > 1 and case_run.rotated_bytes >= 100_000
    expected = case_run.reference()
    good = case_run.measure(1, expected)
    assert good["correct"] and good["us"] > 0
    attend = kernel_runs.paged_attention

    def wrong(*args, **options):
        o, lse = attend(*args, **options)
        return o * 1.001, lse

    monkeypatch.setattr(kernel_runs, "paged_attention", wrong)
    bad = case_run.measure(1, expected)
    assert not bad["correct"] and bad["us"] is None and bad["max_error"] > good["max_error"]


def test_sharing_and_not_sharing_agree():
    case_run = CaseRun(parse_case("tree2_readers4_root64_tail9"), _settings())
    found = case_run.measure(NO_SHARING, case_run.reference(), timed=False)
    assert found["correct"] and found["max_error"] > 0


@pytest.mark.slow
def test_the_script_times_the_reference_on_a_cpu(tmp_path):
    cases = "decode_readers4_prefix64_tail9,step_threads2_prefix32"
    code, out, err = run("benchmark_kernels.py", f"--cases={cases}", "--model=tiny", f"--output_dir={tmp_path}", *SMALL)
    assert code == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary == json.loads((tmp_path / "kernels.json").read_text())
    assert "reference" in summary["note"]
    decode, step = summary["cases"]
    unique = (64 + 4 * 9) * 2 * 2 * 16 * 4
    assert decode["unique_bytes"] == unique
    assert decode["gb_per_s"] == pytest.approx(unique / decode["us"] / 1e3)
    copy = summary["measured"]["copy_gb_per_s"]
    assert decode["roofline_us"] >= unique / copy / 1e3 * 0.999
    assert decode["roofline_fraction"] == pytest.approx(decode["roofline_us"] / decode["us"])
    assert decode["baseline"] == "private" and decode["ratio"] == pytest.approx(decode["baseline_us"] / decode["us"])
    for name in ("jax", "flashinfer"):
        assert decode["baselines"][name]["us"] is None and decode["baselines"][name]["reason"]
    assert step["weight_bytes"] > 0 and step["parts_us"].keys() >= {"attention", "kv update", "rest"}
    text = (tmp_path / "kernels.md").read_text()
    assert text == markdown(summary) and "| decode_readers4_prefix64_tail9 |" in text and "step_threads2" in text


@pytest.mark.slow
def test_the_script_interprets_pallas_kernels():
    case = "decode_readers2_prefix32_tail5"
    options = (f"--cases={case}", "--interpret", "--backend=tpu", "--kv_heads=1")
    code, out, err = run("benchmark_kernels.py", *options)
    assert code == 0, err
    (found,) = json.loads(out.splitlines()[-1])["cases"]
    assert found["backend"] == "tpu" and found["correct"] and found["us"] is None and found["max_error"] > 0


@pytest.mark.slow
def test_cases_beyond_the_budget_are_skipped():
    code, out, err = run("benchmark_kernels.py", "--cases=unrelated_rows2_context20", "--budget_s=0", *SMALL)
    assert code == 0, err
    (found,) = json.loads(out.splitlines()[-1])["cases"]
    assert found["us"] is None and "--budget_s" in found["skipped"]


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--cases=nothing", "nothing"),
        ("--backend=gpu_hopper", "--interpret"),
        ("--target_runs=x", "x"),
        ("--baselines=vllm", "vllm"),
        ("--output_json=/nowhere/x.json", "/nowhere"),
    ],
)
def test_bad_input_is_one_line(option, named):
    code, out, err = run("benchmark_kernels.py", option)
    assert code == 2 and not out
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and named in err
