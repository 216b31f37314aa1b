"""Decode throughput on a shared prefix, against `transformers.generate` on the same weights and tokens, in one run.

Case `decode_threadsN_prefix512` forks N threads from one prompt of 512 tokens and decodes greedily. The baselines
decode the same N rows with transformers on the CPU (float32, sdpa, the better of 1 and 2 torch threads): as one
batched `generate`, and one row after another. Decode steps only: prompts and first tokens are timed apart and taken
off. Ours and theirs take turns, medians are reported. The last line is one JSON object.

Case `self_consistency_nN_promptP` votes among N samples of one prompt of P tokens, against the same N requests in one
batch with the prefix cache off: wall clock from the prompt to the last token.

Case `hybrid_{off,on,auto}_requestsN` answers --num_problems Countdown problems for N clients at once, with forks
forbidden, allowed, or as load allows.

Case `plan_threadsN_familiesM` times what the host does before a dispatch of N threads; it needs no checkpoint
and takes no flag.

Examples:
  python scripts/benchmark.py
  python scripts/benchmark.py --cases=self_consistency_n16_prompt512,self_consistency_n16_prompt2048 --num_tokens=64
  python scripts/benchmark.py --cases=hybrid_off_requests8,hybrid_on_requests8,hybrid_auto_requests8
  python scripts/benchmark.py --cases=plan_threads256_families16
  python scripts/benchmark.py --cases=decode_threads8_prefix512 --num_tokens=64 --repeats=5 --output_json=out.json
"""

import dataclasses
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import cli
import jax
import loading
import numpy as np
from absl import flags
from hybrid_cases import hybrid_table, run_hybrid
from json_output import check_output_path, write_json
from loading import CHECKPOINT_HELP, load_engine
from plan_cases import plan_table, run_plan
from rich.console import Console
from rich.table import Table
from transformers_baseline import Transformers, load_baseline

from apr_jax import Engine, SamplingParams
from apr_jax.config import EngineConfig, check
from apr_jax.models.checkpoint import load_decoder
from apr_jax.reasoning.programs import make_program
from apr_jax.reasoning.strategies.options import StrategyOptions

_CHECKPOINT = flags.DEFINE_string("checkpoint", "countdown", CHECKPOINT_HELP)
_CASES = flags.DEFINE_list(
    "cases",
    [f"decode_threads{n}_prefix512" for n in (1, 8, 32)],
    "Of the forms decode_threads{N}_prefix{P}, self_consistency_n{N}_prompt{P}, hybrid_{off,on,auto}_requests{N} and "
    "plan_threads{N}_families{M}.",
)
_DECODE = r"decode_threads(\d+)_prefix(\d+)"
_VOTE = r"self_consistency_n(\d+)_prompt(\d+)"
_HYBRID = r"hybrid_(off|on|auto)_requests([1-9]\d*)"
_PLAN = r"plan_threads(\d+)_families(\d+)"
_NUM_PROBLEMS = flags.DEFINE_integer("num_problems", 128, "Problems of a hybrid case, at least one a client.")
_NUM_TOKENS = flags.DEFINE_integer("num_tokens", 128, "Tokens that each thread decodes.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs of each; medians are reported.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the random prompt.")
_OUTPUT_JSON = flags.DEFINE_string("output_json", None, "Write the last line into this file as well.")

flags.adopt_module_key_flags(loading)


def main() -> None:
    check(_NUM_TOKENS.value >= 2, f"--num_tokens={_NUM_TOKENS.value}, must be >= 2")
    check(_REPEATS.value >= 1, f"--repeats={_REPEATS.value}, must be >= 1")
    check(_NUM_PROBLEMS.value >= 1, f"--num_problems={_NUM_PROBLEMS.value}, must be >= 1")
    loops = [(found[1], int(found[2])) for name in _CASES.value if (found := re.fullmatch(_HYBRID, name))]
    votes = [_parse_case(name, _VOTE) for name in _CASES.value if re.fullmatch(_VOTE, name)]
    plans = [_parse_case(name, _PLAN) for name in _CASES.value if re.fullmatch(_PLAN, name)]
    others = f"{_VOTE}|{_HYBRID}|{_PLAN}"
    cases = [_parse_case(name, _DECODE) for name in _CASES.value if not re.fullmatch(others, name)]
    output_path = check_output_path(_OUTPUT_JSON.value) if _OUTPUT_JSON.value else None
    planned = [run_plan(n, families) for n, families in plans]
    if planned:
        Console().print(plan_table(planned))
    baseline, results = None, []
    if loops or votes or cases:
        threads = [n for n, _ in cases + votes] + [EngineConfig.max_threads] * bool(loops)
        engine = load_engine(_CHECKPOINT.value, max_threads=max(threads))
        baseline = load_baseline(_CHECKPOINT.value) if cases else None
        with cli.profile():
            results = [_run_case(engine, baseline, n, prefix) for n, prefix in cases]
            results += [_run_vote(engine, n, prompt_len) for n, prompt_len in votes]
            if loops:
                engine.warm_up()
                looped = [run_hybrid(engine, parallelism, n, max(n, _NUM_PROBLEMS.value)) for parallelism, n in loops]
                Console().print(hybrid_table(looped))
                results += looped
        _show(results)
    summary = {
        "cases": [*planned, *results],
        "checkpoint": _CHECKPOINT.value,
        "num_tokens": _NUM_TOKENS.value,
        "repeats": _REPEATS.value,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            **({} if baseline is None else baseline.versions),
        },
        "device": jax.devices()[0].device_kind,
    }
    if output_path is not None:
        write_json(output_path, summary)
    print(json.dumps(summary))


def _parse_case(name: str, pattern: str) -> tuple[int, int]:
    found = re.fullmatch(pattern, name)
    if not found:
        like = "decode_threads8_prefix512, self_consistency_n16_prompt512, hybrid_auto_requests8 or "
        like += "plan_threads256_families16"
        raise ValueError(f"--cases has {name!r}, must be like {like}")
    num_threads, prefix_len = int(found[1]), int(found[2])
    check(num_threads >= 1 and prefix_len >= 1, f"--cases has {name!r}: both numbers must be >= 1")
    return num_threads, prefix_len


def _ours(engine: Engine, rows: np.ndarray, num_tokens: int) -> tuple[float, np.ndarray, int]:
    """Seconds for the threads' decode steps after the first dispatch, tokens [N, num_tokens], and round trips.

    The first dispatch, with the forced tokens, is left out as the prompt is; what is timed is scaled to the tokens
    decoded in it.
    """
    first = SamplingParams(max_new_tokens=0, ignore_eos=True)
    root = engine.submit(rows[0, :-1].tolist(), sampling=first)
    engine.run()
    sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    threads = engine.fork(root, [[int(row[-1])] for row in rows], sampling=sampling)
    engine.step()
    tokens_before, trips_before = engine.stats.decode_tokens, engine.stats.num_round_trips
    started = time.perf_counter()
    engine.run()
    seconds = time.perf_counter() - started
    timed = engine.stats.decode_tokens - tokens_before
    trips = engine.stats.num_round_trips - trips_before
    tokens = np.array([thread.token_ids[1:] for thread in threads])
    engine.release(root)
    engine.cache.flush_prefix_cache()
    return seconds * len(rows) * (num_tokens - 1) / timed, tokens, trips


def _run_case(engine: Engine, baseline: Transformers | None, num_threads: int, prefix_len: int) -> dict[str, Any]:
    num_tokens, vocab_size = _NUM_TOKENS.value, engine.model_config.vocab_size
    window = engine.model_config.max_position
    first = engine.config.steps_per_dispatch
    check(num_tokens > first, f"--num_tokens={num_tokens}, must be > {first}: a first dispatch of {first} is not timed")
    check(
        prefix_len + num_tokens <= window,
        f"{prefix_len} + {num_tokens} tokens, the context window is {window}",
    )
    rng = np.random.default_rng(_SEED.value)
    rows = np.tile(rng.integers(0, vocab_size, prefix_len), (num_threads, 1))
    rows[:, -1] = rng.integers(0, vocab_size, num_threads)  # the threads' own first tokens
    timed: dict[str, list[float]] = {"ours": []}
    _, ours, trips = _ours(engine, rows, num_tokens)  # compiles
    theirs = None
    variants: dict[str, Callable[[], tuple[float, np.ndarray]]] = {}
    if baseline is not None:
        for torch_threads in (1, 2):
            variants[f"batched_{torch_threads}"] = lambda n=torch_threads: baseline.decode_s(rows, num_tokens, n)
            variants[f"single_{torch_threads}"] = lambda n=torch_threads: baseline.decode_s(rows[:1], num_tokens, n)
        _, theirs = variants["batched_1"]()
    for _ in range(_REPEATS.value):
        timed["ours"].append(_ours(engine, rows, num_tokens)[0])
        for name, run in variants.items():
            timed.setdefault(name, []).append(run()[0])
    count = num_threads * (num_tokens - 1)
    ours_tps = count / statistics.median(timed["ours"])
    result: dict[str, Any] = {
        "name": f"decode_threads{num_threads}_prefix{prefix_len}",
        "tokens_per_s": ours_tps,
        "ms_per_step": 1e3 * statistics.median(timed["ours"]) / (num_tokens - 1),
        "round_trips": trips,
        "baseline": None,
        "baseline_tokens_per_s": None,
        "ratio": None,
    }
    if theirs is not None:
        batched = count / min(statistics.median(timed[f"batched_{n}"]) for n in (1, 2))
        single = (num_tokens - 1) / min(statistics.median(timed[f"single_{n}"]) for n in (1, 2))
        result |= {
            "baseline": "transformers.generate, batched",
            "baseline_tokens_per_s": batched,
            "ratio": ours_tps / batched,
            "one_by_one_tokens_per_s": single,
            "one_by_one_ratio": ours_tps / single,
            "equal_tokens": float((ours == theirs).mean()),
        }
    return result


def _run_vote(loaded: Engine, num_samples: int, prompt_len: int) -> dict[str, Any]:
    """A vote whose samples share their prompt, against requests that share nothing. Both have the same pages."""
    num_tokens = _NUM_TOKENS.value
    length = prompt_len + num_tokens
    config = dataclasses.replace(loaded.model_config, max_position=max(length, loaded.model_config.max_position))
    decoder = load_decoder(_CHECKPOINT.value, dtype=loaded.config.dtype)
    pages = num_samples * (-(-length // loaded.cache.page_size) + 2) + 2

    def make(prefix_cache: bool) -> Engine:
        cache = dataclasses.replace(loaded.cache.config, num_pages=pages, prefix_cache=prefix_cache)
        return Engine(config, decoder, loaded.tokenizer, cache_config=cache, engine_config=loaded.config)

    program = make_program("self_consistency", loaded.tokenizer, options=StrategyOptions(num_samples=num_samples))
    sampling = SamplingParams(max_new_tokens=num_tokens, temperature=1.0, ignore_eos=True)
    prompt = np.random.default_rng(_SEED.value).integers(0, config.vocab_size, prompt_len).tolist()
    engines = {"ours": make(True), "theirs": make(False)}

    def run(name: str) -> float:
        engine = engines[name]
        engine.cache.flush_prefix_cache()
        started = time.perf_counter()
        if name == "ours":
            engine.generate(prompt, program, sampling=sampling)
        else:
            engine.generate(prompt, sampling=sampling, num_samples=num_samples)
        return time.perf_counter() - started

    for name in engines:
        run(name)  # compiles
    timed: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(_REPEATS.value):
        for name, seconds in timed.items():
            seconds.append(run(name))
    ours, theirs = (statistics.median(timed[name]) for name in engines)
    count = num_samples * num_tokens
    return {
        "name": f"self_consistency_n{num_samples}_prompt{prompt_len}",
        "tokens_per_s": count / ours,
        "baseline": "the same requests in one batch, prefix cache off",
        "baseline_tokens_per_s": count / theirs,
        "ratio": theirs / ours,
        "wall_s": ours,
        "baseline_wall_s": theirs,
        "wall_ratio": ours / theirs,
        "prefill_tokens": engines["ours"].stats.prefill_tokens // (_REPEATS.value + 1),
        "baseline_prefill_tokens": engines["theirs"].stats.prefill_tokens // (_REPEATS.value + 1),
    }


def _show(results: list[dict[str, Any]]) -> None:
    table = Table(title="throughput, tokens/s")
    for column in ("case", "apr_jax", "baseline", "ratio", "one by one", "ratio", "equal tokens"):
        table.add_column(column, justify="left" if column == "case" else "right", overflow="fold")
    for result in results:
        numbers = [result["tokens_per_s"], result["baseline_tokens_per_s"], result["ratio"]]
        numbers += [result.get(key) for key in ("one_by_one_tokens_per_s", "one_by_one_ratio", "equal_tokens")]
        table.add_row(result["name"], *("-" if x is None else f"{x:,.2f}" for x in numbers))
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
