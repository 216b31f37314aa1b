"""The supervised run: schedule, steps, evaluation, checkpoints, log. Resumes from its working directory."""

import dataclasses
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from apr_jax.config import check
from apr_jax.models.decoder import Decoder
from apr_jax.train.data import ChunkReader, ChunkStore
from apr_jax.train.state import Checkpoints, TrainState
from apr_jax.train.supervised import make_train_step
from apr_jax.train.utilisation import matmul_flops_per_s, step_flops

Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay; "muon" trains the matrices inside layers with Muon.

    Attributes:
      final_share: of the peak, at the end of a decay.
      restarts: (step, share of the peak) where the learning rate warms up and decays once more, in order.
    """

    name: str = "adamw"
    learning_rate: float = 3e-3
    muon_learning_rate: float = 0.02
    final_share: float = 0.01
    warmup_steps: int = 100
    num_steps: int = 1000
    restarts: tuple[tuple[int, float], ...] = ()
    beta2: float = 0.98
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        check(self.name in ("adamw", "muon"), f"optimizer is {self.name!r}, must be 'adamw' or 'muon'")
        pairs = all(isinstance(restart, tuple | list) and len(restart) == 2 for restart in self.restarts)
        check(pairs, f"restarts are {self.restarts}, must be pairs of a step and a share of the peak")
        restarts = [step for step, _ in self.restarts]
        starts = [0, *restarts, self.num_steps]
        ascend = all(start < stop for start, stop in itertools.pairwise(starts))
        check(ascend, f"restarts at {restarts} must ascend in (0, {self.num_steps}), num_steps")
        shortest = min(stop - start for start, stop in itertools.pairwise(starts))
        within = 0 <= self.warmup_steps < shortest
        check(within, f"warmup_steps is {self.warmup_steps}, must be in [0, {shortest}), as long as each decay")

    def schedule(self, peak: float) -> optax.Schedule:
        """Learning rate by step."""
        starts, shares = zip((0, 1.0), *self.restarts, strict=True)
        decays = [
            optax.warmup_cosine_decay_schedule(
                0.0, peak * share, self.warmup_steps, stop - start, peak * self.final_share
            )
            for start, stop, share in zip(starts, (*starts[1:], self.num_steps), shares, strict=True)
        ]
        return optax.join_schedules(decays, starts[1:])

    def build(self) -> optax.GradientTransformation:
        schedule = self.schedule
        if self.name == "adamw":
            inner = optax.adamw(schedule(self.learning_rate), b2=self.beta2, weight_decay=self.weight_decay)
        else:
            inner = optax.contrib.muon(
                schedule(self.muon_learning_rate),
                weight_decay=self.weight_decay,
                adam_b2=self.beta2,
                adam_weight_decay=self.weight_decay,
                adam_learning_rate=schedule(self.learning_rate),
                muon_weight_dimension_numbers=_inner_matrices,
            )
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), inner)


def _inner_matrices(params: Any) -> Any:
    """Muon's dimension numbers for every matrix but the embedding, None elsewhere."""

    def choose(path, leaf):
        name = jax.tree_util.keystr(path)
        return optax.contrib.MuonDimensionNumbers() if leaf.ndim == 2 and "embedding" not in name else None

    return jax.tree_util.tree_map_with_path(choose, params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How often things happen, in steps.

    Attributes:
      num_workers: processes that make data; 0: the training itself does, when it needs some.
    """

    log_every: int = 20
    eval_every: int = 500
    checkpoint_every: int = 200
    keep_checkpoints: int = 3
    num_workers: int = 1

    def __post_init__(self):
        for name in ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, must be >= 1")
        check(self.num_workers >= 0, f"num_workers is {self.num_workers}, must be >= 0")


class TrainLog:
    """JSON lines, one a record; reopening drops what a killed run wrote after the step it resumes from.

    Attributes:
      evaluated: steps with held-out figures.
    """

    def __init__(self, path: pathlib.Path, resumed_step: int):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= resumed_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(path)  # whole, or as it was
        self.evaluated = {record["step"] for record in map(json.loads, kept) if "held_out" in record}
        self._file = path.open("a")

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def train(
    decoder: Decoder,
    store: ChunkStore,
    workdir: pathlib.Path,
    optimizer_config: OptimizerConfig,
    loop: LoopConfig,
    *,
    evaluate: Callable[[Decoder], Metrics] | None = None,
    on_record: Callable[[Mapping[str, Any]], None] = lambda record: None,
    on_step: Callable[[int], None] = lambda step: None,
    stop_at: int | None = None,
    token_weights: jax.Array | None = None,
) -> Decoder:
    """Trains until `optimizer_config.num_steps`, going on from the newest checkpoint in `workdir`.

    Args:
      decoder: initial weights; used up.
      evaluate: held-out metrics of a decoder, called every `eval_every` steps and at the end.
      on_record: gets every log record (also written to `workdir/log.jsonl`); on_step: every step's number.
      token_weights: [V] how much each target token counts in the loss; None: all the same.
      stop_at: end early after this step, with a checkpoint, as if interrupted there.

    Returns: the trained decoder.

    Raises:
      ValueError: the run is beyond num_steps already, or its loss or gradient is not finite any more; the checkpoints
        before that stay.

    A record holds the step's loss, and since the one before: learned tokens a second, the arithmetic done a second, its
    share of what a large matmul reaches on the device, and the share of time spent waiting for data.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    optimizer = optimizer_config.build()
    graphdef, params = nnx.split(decoder)
    state = TrainState(params, optimizer.init(params))
    checkpoints = Checkpoints(workdir / "checkpoints", loop.keep_checkpoints)
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(graphdef, state)
    log = TrainLog(workdir / "log.jsonl", state.step)
    update = make_train_step(graphdef, optimizer, token_weights)
    num_steps = optimizer_config.num_steps
    check(state.step <= num_steps, f"{workdir} is at step {state.step:,} already, num_steps is {num_steps:,}")
    last_step = min(num_steps, stop_at or num_steps)
    num_params, peak_flops_per_s = decoder.num_params, matmul_flops_per_s(str(jnp.dtype(decoder.dtype)))
    num_tokens, flops, since, waited_s = 0.0, 0.0, time.monotonic(), 0.0

    def record(values: Mapping[str, Any]) -> None:
        log.write({"step": state.step, **values})
        on_record({"step": state.step, **values})

    def evaluate_if_due() -> bool:
        due = state.step % loop.eval_every == 0 or state.step == num_steps
        if evaluate is None or state.step == 0 or not due or state.step in log.evaluated:
            return False
        record({"held_out": evaluate(nnx.merge(graphdef, state.params))})
        return True

    evaluate_if_due()  # where a run was killed at it
    since = time.monotonic()
    with ChunkReader(store, first=state.chunk, num_workers=loop.num_workers) as reader:
        steps = reader.load(state.chunk) if state.step < last_step else []
        while state.step < last_step:
            if state.offset >= len(steps):
                state.chunk, state.offset = state.chunk + 1, 0
                asked = time.monotonic()
                steps = reader.load(state.chunk)
                waited_s += time.monotonic() - asked
                continue
            with jax.profiler.StepTraceAnnotation("train", step_num=state.step):
                batch = steps[state.offset]
                state.params, state.opt_state, metrics = update(state.params, state.opt_state, batch)
                num_tokens += float(metrics["num_tokens"])
            _check_finite(metrics, state.step + 1, checkpoints.latest_step())
            num_rows = {length: len(rows["tokens"]) for length, rows in batch.items()}
            flops += step_flops(decoder.config, num_params, num_rows)
            state.step, state.offset = state.step + 1, state.offset + 1
            on_step(state.step)
            if state.step % loop.log_every == 0 or state.step == last_step:
                now = time.monotonic()
                values: dict[str, Any] = {name: round(float(value), 5) for name, value in metrics.items()}
                flops_per_s = flops / (now - since)
                values |= {
                    "tokens_per_s": round(num_tokens / (now - since)),
                    "gflops_per_s": round(flops_per_s / 1e9, 2),
                    "utilisation": float(f"{flops_per_s / peak_flops_per_s:.3g}"),
                    "data_wait": round(waited_s / (now - since), 3),
                    "time": round(time.time(), 1),
                }
                record(values)
                num_tokens, flops, since, waited_s = 0.0, 0.0, now, 0.0
            if state.step % loop.checkpoint_every == 0 or state.step == last_step:
                checkpoints.save(graphdef, state)  # before an evaluation, which may fail
            if evaluate_if_due():
                num_tokens, flops, since, waited_s = 0.0, 0.0, time.monotonic(), 0.0
    checkpoints.close()
    log.close()
    return nnx.merge(graphdef, state.params)


def _check_finite(metrics: Mapping[str, jax.Array], step: int, saved: int | None) -> None:
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    kept = "there is no checkpoint" if saved is None else f"the newest checkpoint is of step {saved:,}"
    check(math.isfinite(loss + norm), f"step {step:,}: the loss is {loss}, the gradient's norm {norm}; {kept}")
