"""A run that is killed goes on as if nothing had happened."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from apr_jax.config import ModelConfig
from apr_jax.models.decoder import Decoder
from apr_jax.models.hf import load_hf
from apr_jax.tasks.countdown import draw_problem
from apr_jax.tasks.countdown_search import hardness
from apr_jax.tasks.countdown_sets import SIZES, held_out_problems
from apr_jax.tasks.countdown_task import HELD_OUT_SEED, TASKS
from apr_jax.tasks.countdown_vocabulary import vocabulary
from apr_jax.train import countdown_data
from apr_jax.train.countdown_data import PAD_ID, CountdownSamples
from apr_jax.train.data import ChunkReader, ChunkStore
from apr_jax.train.export import export_countdown
from apr_jax.train.held_out import teacher_forced
from apr_jax.train.loop import LoopConfig, OptimizerConfig, train
from apr_jax.train.packing import FIELDS
from apr_jax.train.state import Checkpoints, TrainState
from apr_jax.train.supervised import make_train_step
from apr_jax.train.utilisation import step_flops
from apr_jax.train.workdir import check_settings, held_workdir

pytestmark = pytest.mark.usefixtures("light_compilation")  # compiling takes most of the time

ROOT = pathlib.Path(__file__).parents[2]
SAMPLES = CountdownSamples(max_len=128)
CONFIG = ModelConfig(
    vocab_size=len(vocabulary()), d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24,
    max_position=2048, tie_embeddings=True, bos_id=1, eos_ids=(2,),
)  # fmt: skip
LOOP = LoopConfig(log_every=1, eval_every=4, checkpoint_every=3, num_workers=0)


def store(directory) -> ChunkStore:
    return ChunkStore(directory, SAMPLES, chunk_size=12, rows_per_step={128: 1}, pad_id=PAD_ID)


def run(workdir, data, **options) -> Decoder:
    config = OptimizerConfig(num_steps=11, warmup_steps=2)
    return train(Decoder(CONFIG, rngs=nnx.Rngs(0)), store(data), workdir, config, LOOP, **options)


class Killed(Exception):
    pass


def test_killed_run_resumes_to_the_same_parameters(tmp_path):
    def dies_at(fatal: int):
        def on_step(step: int) -> None:
            if step == fatal:
                raise Killed

        return on_step

    data = tmp_path / "data"
    whole = run(tmp_path / "whole", data)
    for fatal in (5, 8):  # past the checkpoints of steps 3 and 6, across a chunk's end
        with pytest.raises(Killed):
            run(tmp_path / "killed", data, on_step=dies_at(fatal))
    resumed = run(tmp_path / "killed", data)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(resumed), nnx.state(whole))
    logs = []
    for name in ("whole", "killed"):
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        logs.append([(line["step"], line["loss"]) for line in lines])
    assert logs[0] == logs[1] and [step for step, _ in logs[0]] == list(range(1, 12))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_checkpoint_holds_the_whole_state(tmp_path, name):
    optimizer = OptimizerConfig(name=name).build()
    graphdef, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoints.restore(graphdef, TrainState(params, opt_state))
    checkpoints.save(graphdef, TrainState(params, opt_state, step=7, chunk=2, offset=3))
    _, other = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(1)))
    restored = checkpoints.restore(graphdef, TrainState(other, optimizer.init(other)))
    assert (restored.step, restored.chunk, restored.offset) == (7, 2, 3)
    jax.tree.map(np.testing.assert_array_equal, restored.params, params)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, opt_state)


def test_finished_run_is_left_as_it_is(tmp_path):
    first = run(tmp_path / "run", tmp_path / "data")
    seen = []
    again = run(tmp_path / "run", tmp_path / "data", on_step=seen.append)
    assert seen == []
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(first))


def test_evaluation_is_called_and_logged(tmp_path):
    records = []
    evaluate = teacher_forced(TASKS["countdown"].problems(3, HELD_OUT_SEED))
    run(tmp_path / "run", tmp_path / "data", evaluate=evaluate, on_record=records.append)
    held_out = {record["step"]: record["held_out"] for record in records if "held_out" in record}
    assert sorted(held_out) == [4, 8, 11]
    guessing = math.log(len(vocabulary()))
    assert held_out[11]["sequential/loss"] < held_out[4]["sequential/loss"] < 1.08 * guessing
    assert 0 <= held_out[11]["multiverse/accuracy"] <= 1 and held_out[11]["multiverse/exact"] == 0


def test_an_evaluation_that_failed_costs_no_step_and_is_made_up_for(tmp_path):
    steps, figures = [], []

    def fails_once(decoder):
        figures.append(len(steps))
        if len(figures) == 1:
            raise Killed
        return {"loss": 1.0}

    with pytest.raises(Killed):
        run(tmp_path / "run", tmp_path / "data", evaluate=fails_once, on_step=steps.append, stop_at=4)
    run(tmp_path / "run", tmp_path / "data", evaluate=fails_once, on_step=steps.append)
    assert steps == list(range(1, 12)) and figures == [4, 4, 8, 11]


def test_a_run_that_diverges_ends_with_its_last_good_checkpoint(tmp_path):
    config = OptimizerConfig(num_steps=11, warmup_steps=5, learning_rate=1e38)
    with pytest.raises(ValueError, match=r"step \d: the loss is .*nan.*; there is no checkpoint"):
        train(Decoder(CONFIG, rngs=nnx.Rngs(0)), store(tmp_path / "data"), tmp_path / "run", config, LOOP)
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_an_update_that_overflows_is_not_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    graphdef, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    checkpoints.save(graphdef, TrainState(params, (), step=1))
    with pytest.raises(ValueError, match=r"values of .* are not finite"):
        checkpoints.save(graphdef, TrainState(jax.tree.map(lambda x: x / 0, params), (), step=2))
    assert checkpoints.latest_step() == 1


def test_fewer_steps_than_a_run_has_made_are_refused(tmp_path):
    run(tmp_path / "run", tmp_path / "data")
    config = OptimizerConfig(num_steps=10, warmup_steps=2)
    with pytest.raises(ValueError, match="is at step 11 already, num_steps is 10"):
        train(Decoder(CONFIG, rngs=nnx.Rngs(0)), store(tmp_path / "data"), tmp_path / "run", config, LOOP)


def fails_in_chunk_1(index: int):
    if index == 12:
        raise ValueError("sample 12 cannot be drawn")
    return SAMPLES(index)


def test_what_ends_a_worker_is_raised_where_its_chunk_is_asked_for(tmp_path):
    failing = ChunkStore(tmp_path, fails_in_chunk_1, chunk_size=12, rows_per_step={128: 1}, pad_id=PAD_ID)
    with ChunkReader(failing, num_workers=2, ahead=2) as reader:
        assert reader.load(0)
        with pytest.raises(ValueError, match="sample 12 cannot be drawn"):
            reader.load(1)


def test_a_directory_is_of_one_process_and_one_run(tmp_path):
    settings = {"seed": 0, "samples": {"shares": (1.0, 2.0)}}
    with held_workdir(tmp_path, settings), pytest.raises(OSError, match="another process trains in"):
        held_workdir(tmp_path, settings).__enter__()
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with held_workdir(tmp_path, settings) as keep:
        check_settings(tmp_path, {"seed": 1})  # nothing was kept yet
        keep()
    other = {"seed": 0, "samples": {"shares": (1.0, 3.0)}}
    message = r"was begun with samples.shares = \[1.0, 2.0\], asked for is \[1.0, 3.0\]"
    with pytest.raises(ValueError, match=message), held_workdir(tmp_path, other):
        pass
    with held_workdir(tmp_path, other, allow_changes=True) as keep:
        keep()
    check_settings(tmp_path, other)


def test_chunks_are_the_same_whoever_makes_them(tmp_path):
    mine, theirs = store(tmp_path / "a"), store(tmp_path / "b")
    with ChunkReader(theirs, num_workers=2, ahead=2) as reader:
        for chunk in (0, 1, 2):
            for ours, other in zip(mine.load(chunk), reader.load(chunk), strict=True):
                assert ours.keys() == other.keys()
                jax.tree.map(np.testing.assert_array_equal, ours, other)
    assert not list(theirs.directory.glob("*.npz.partial"))
    other = ChunkStore(tmp_path / "a", SAMPLES, chunk_size=13, rows_per_step={128: 1}, pad_id=PAD_ID)
    assert other.directory != mine.directory


def test_samples_leave_out_the_held_out_problems(monkeypatch):
    drawn = []

    def spy(seed, index, config, exclude):
        drawn.append(exclude)
        return draw_problem(seed, index, config, exclude)

    monkeypatch.setattr(countdown_data, "draw_problem", spy)
    SAMPLES(0)
    sets = {name: held_out_problems(name) for name in SIZES}
    assert {name: len(set(problems)) for name, problems in sets.items()} == SIZES
    assert all(set(problems) <= drawn[0] for problems in sets.values())
    for task, name in (("countdown", "apr"), ("countdown_hard", "hard"), ("countdown_five", "five")):
        assert tuple(TASKS[task].problems(20, HELD_OUT_SEED)) == sets[name][:20]
    assert all(hardness(problem) >= 6 and len(problem.numbers) == 4 for problem in sets["hard"])
    assert all(len(problem.numbers) == 5 for problem in sets["five"])


def test_settings_are_checked():
    with pytest.raises(ValueError, match="keep_checkpoints is 0, must be >= 1"):
        LoopConfig(keep_checkpoints=0)
    with pytest.raises(ValueError, match=r"drill_share is 1\.5, must be in"):
        CountdownSamples(drill_share=1.5)
    with pytest.raises(ValueError, match=r"lengths are \[256, 128\], must ascend"):
        ChunkStore("data", SAMPLES, chunk_size=1, rows_per_step={256: 1, 128: 1}, pad_id=PAD_ID)
    with pytest.raises(ValueError, match="'sgd'"):
        OptimizerConfig(name="sgd")
    with pytest.raises(ValueError, match="warmup_steps is 5"):
        OptimizerConfig(warmup_steps=5, num_steps=5)
    with pytest.raises(ValueError, match=r"warmup_steps is 5, must be in \[0, 5\)"):
        OptimizerConfig(warmup_steps=5, num_steps=20, restarts=((15, 0.5),))
    with pytest.raises(ValueError, match=r"restarts at \[15, 30\] must ascend in \(0, 20\), num_steps"):
        OptimizerConfig(warmup_steps=5, num_steps=20, restarts=((15, 0.5), (30, 0.5)))


def test_the_learning_rate_starts_again():
    """Two cosines written out, each behind a warm-up of ten steps."""
    config = OptimizerConfig(warmup_steps=10, num_steps=150, final_share=0.1, restarts=((100, 0.5),))
    schedule = config.schedule(8.0)
    for start, stop, peak in ((0, 100, 8.0), (100, 150, 4.0)):
        for step in range(start, stop):
            done = (step - start - 10) / (stop - start - 10)
            decayed = 0.8 + (peak - 0.8) * (1 + math.cos(math.pi * done)) / 2
            assert float(schedule(step)) == pytest.approx(
                decayed if done >= 0 else peak * (step - start) / 10, rel=1e-4
            )


def test_export_replaces_an_earlier_export_alone(tmp_path):
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    export_countdown(tmp_path / "model", decoder)
    (tmp_path / "model" / "README.md").write_text("the card")
    export_countdown(tmp_path / "model", decoder)
    assert (tmp_path / "model" / "README.md").read_text() == "the card"
    loaded = load_hf(tmp_path / "model")
    np.testing.assert_array_equal(loaded.embedding[...], decoder.embedding[...])
    (tmp_path / "model" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        export_countdown(tmp_path / "model", decoder)


@pytest.mark.slow
def test_script_survives_a_real_kill(tmp_path):
    command = [sys.executable, "scripts/train_sft.py", "--config=configs/countdown_tiny.py"]
    command.append("--config.num_decoded_problems=1")

    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | cache

    def start(workdir):
        flags = [*command, f"--workdir={workdir}"]
        return subprocess.Popen(flags, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)

    killed = start(tmp_path / "killed")
    log = tmp_path / "killed" / "log.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (log.exists() and '"step": 10' in log.read_text()):
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    for workdir in ("killed", "whole"):
        process = start(tmp_path / workdir)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0 and "for 20 steps" in output
    whole, resumed = ((tmp_path / w / "model" / "model.safetensors").read_bytes() for w in ("whole", "killed"))
    assert whole == resumed


def test_the_log_says_how_much_of_the_device_a_step_uses(tmp_path):
    run(tmp_path, tmp_path / "data")
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(0 < record["utilisation"] < 1 for record in records[2:]) and records[-1]["tokens_per_s"] > 0


def test_flops_of_a_step_are_those_that_the_compiler_counts():
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(decoder)
    length = 512  # a few chunks of attention: a query's own chunk is computed whole
    batch = {length: {name: np.zeros((2, length), np.int32) for name in FIELDS}}
    optimizer = OptimizerConfig(num_steps=2, warmup_steps=1).build()
    step = make_train_step(graphdef, optimizer).lower(params, optimizer.init(params), batch).compile()
    assert 0.75 < step_flops(CONFIG, decoder.num_params, {length: 2}) / step.cost_analysis()["flops"] < 1
