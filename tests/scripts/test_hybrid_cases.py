"""The closed loops of benchmark.py, on the embedded model."""

import pytest
from hybrid_cases import hybrid_table, run_hybrid

from apr_jax import Engine


@pytest.mark.slow
def test_a_closed_loop_answers_every_problem_whoever_may_fork():
    engine = Engine.from_checkpoint("countdown")
    results = [run_hybrid(engine, parallelism, 3, 8) for parallelism in ("off", "on", "auto")]
    off, on, auto = results
    assert [result["num_problems"] for result in results] == [8] * 3
    assert off["num_threads"] == 1.0 and on["num_threads"] > 1.0 and auto["num_threads"] == on["num_threads"]
    assert off["critical_path_tokens"] == off["total_tokens"] and on["critical_path_tokens"] < on["total_tokens"]
    for result in results:
        assert 0 < result["latency_p50_s"] <= result["latency_p95_s"]
    assert hybrid_table(results).row_count == 3
    assert not engine.scheduler.families
