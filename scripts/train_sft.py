"""Trains a Countdown model on whole reasoning trees; goes on where a killed run stopped.

    python scripts/train_sft.py --config=configs/countdown_tiny.py --workdir=/tmp/tiny
    python scripts/train_sft.py --config=configs/countdown_base.py --workdir=/tmp/base \\
        --config.optimizer.num_steps=8000 '--config.optimizer.restarts=()'
    python scripts/train_sft.py --config=configs/countdown_base.py --workdir=/tmp/base --export=/tmp/model

The working directory gets `log.jsonl`, `checkpoints/` and `data/` (chunks made ahead by worker processes); when the
run is done also `model/`, a Hugging Face directory, for `generate.py --checkpoint=/tmp/base/model --task=countdown` and
`evaluate.py --checkpoint=/tmp/base/model`.
"""

import contextlib
import pathlib
import sys
import tempfile
from typing import Any

import cli
import jax.numpy as jnp
import rich.progress
from absl import flags
from flax import nnx
from ml_collections import config_flags

from apr_jax.config import ModelConfig, check
from apr_jax.models.checkpoint import checkpoint_directory, load_checkpoint
from apr_jax.models.decoder import Decoder
from apr_jax.tasks.countdown_features import initial_embedding
from apr_jax.tasks.countdown_renderings import RENDERINGS
from apr_jax.tasks.countdown_sets import held_out_problems
from apr_jax.tasks.countdown_task import TASKS
from apr_jax.tasks.countdown_tokenizer import build_sentencepiece_model
from apr_jax.tasks.countdown_vocabulary import BOS, EOS, MATCH, vocabulary
from apr_jax.tokenizers import Tokenizer, load_tokenizer
from apr_jax.train.countdown_data import PAD_ID, PIECE_IDS, Curriculum, code_version
from apr_jax.train.data import ChunkStore
from apr_jax.train.decoded import decoded
from apr_jax.train.export import export_countdown
from apr_jax.train.held_out import teacher_forced
from apr_jax.train.initialization import pieces_of, take_over, tie_matching_heads
from apr_jax.train.loop import LoopConfig, OptimizerConfig, train
from apr_jax.train.state import Checkpoints, TrainState
from apr_jax.train.workdir import check_settings, held_workdir

_NOT_COMPARED = ("loop", "num_eval_problems", "num_decoded_problems")
_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's settings, one of configs/*.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; a run that is there goes on, under its settings.")
_INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "A new run starts from this checkpoint's weights; its vocabulary may be another. A run that goes on has its own.",
)
_ALLOW_CHANGES = flags.DEFINE_bool(
    "allow_changes", False, "A run goes on though its settings, or the code that makes its samples, have changed."
)
_EXPORT = flags.DEFINE_string("export", None, "Only export the newest checkpoint into this directory.")


def build_decoder(config) -> Decoder:
    """The untrained decoder of a config."""
    model = ModelConfig(
        vocab_size=len(vocabulary()),
        tie_embeddings=True,
        bos_id=PIECE_IDS[BOS],
        eos_ids=(PIECE_IDS[EOS],),
        **config.model,
    )
    decoder = Decoder(model, rngs=nnx.Rngs(config.seed))
    if config.wave_embeddings:
        decoder.embedding[...] = jnp.asarray(initial_embedding(model.d_model, config.seed))
    if config.matching_heads:
        tie_matching_heads(decoder)
    return decoder


def initial_decoder(config) -> Decoder:
    """What a new run starts from."""
    decoder = build_decoder(config)
    if _INIT_FROM.value is None:
        return decoder
    _, source, tokenizer = load_checkpoint(checkpoint_directory(_INIT_FROM.value))
    return take_over(decoder, source, pieces_of(tokenizer, source.config), vocabulary())


def countdown_tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        (pathlib.Path(directory) / "tokenizer.model").write_bytes(build_sentencepiece_model())
        return load_tokenizer(directory)


def build_store(config, samples: Curriculum, workdir: pathlib.Path) -> ChunkStore:
    """The run's training data.

    Raises:
      ValueError: rows and lengths do not go together, or a stage's traces are longer than the longest row.
    """
    data = config.data
    check(len(data.lengths) == len(data.rows), f"data.lengths are {data.lengths}, data.rows {data.rows}: one each")
    longest = max(stage.max_len for _, stage in samples.stages)
    check(
        longest <= max(data.lengths), f"samples.max_len is {longest}, must be <= {max(data.lengths)}, the longest row"
    )
    return ChunkStore(
        workdir / "data",
        samples,
        chunk_size=data.chunk_size,
        rows_per_step=dict(zip(data.lengths, data.rows, strict=True)),
        pad_id=PAD_ID,
        version=code_version(),
    )


def settings_of(config) -> dict[str, Any]:
    """What a run's weights depend on: how often it is evaluated and logged is no part of it."""
    settings = {name: value for name, value in config.to_dict().items() if name not in _NOT_COMPARED}
    return {**settings, "code_of_samples": code_version()}


def load_newest(config, workdir: pathlib.Path) -> tuple[Decoder, int]:
    """The decoder of a run's newest checkpoint, and its step.

    Raises:
      ValueError: there is no such run, or the config is not the one that it was begun with.
    """
    check((workdir / "checkpoints").is_dir(), f"--workdir={workdir} holds no checkpoints/")
    if not _ALLOW_CHANGES.value:
        check_settings(workdir, settings_of(config))
    graphdef, params = nnx.split(build_decoder(config))
    optimizer = OptimizerConfig(**config.optimizer).build()
    checkpoints = Checkpoints(workdir / "checkpoints")
    state = checkpoints.restore(graphdef, TrainState(params, optimizer.init(params)))
    checkpoints.close()
    return nnx.merge(graphdef, state.params), state.step


@contextlib.contextmanager
def progress(num_steps: int):
    """Gives (on_step, on_record): a bar in a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        yield (lambda step: None), (lambda record: print(record, flush=True))
        return
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TextColumn("{task.fields[note]}"))
    with rich.progress.Progress(*columns) as bar:
        task = bar.add_task("training", total=num_steps, note="")

        def on_record(record):
            if "loss" in record:
                bar.update(task, note=f"loss {record['loss']:.4f}  {record['tokens_per_s']:,} tokens/s")
            else:
                bar.console.print(record)

        yield (lambda step: bar.update(task, completed=step)), on_record


def main() -> None:
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise ValueError("--config=configs/NAME.py and --workdir=DIR are needed")
    config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value)
    if _EXPORT.value is not None:
        decoder, step = load_newest(config, workdir)
        export_countdown(pathlib.Path(_EXPORT.value), decoder)
        print(f"{_EXPORT.value}: step {step:,}")
        return
    samples = Curriculum.of(config.samples, config.get("stages", ()))
    optimizer = OptimizerConfig(**config.optimizer)
    held_out = held_out_problems("apr")[: config.num_eval_problems]
    teacher = teacher_forced(held_out)
    to_decode = held_out[: config.num_decoded_problems]
    decode = decoded(TASKS["countdown"], to_decode, countdown_tokenizer(), programs=list(RENDERINGS))

    def evaluate(decoder: Decoder) -> dict[str, float]:
        return teacher(decoder) | (decode(decoder) if to_decode else {})

    loop, store, decoder = LoopConfig(**config.loop), build_store(config, samples, workdir), initial_decoder(config)
    held = held_workdir(workdir, settings_of(config), _ALLOW_CHANGES.value)
    with held as keep_settings, cli.profile(), progress(optimizer.num_steps) as (on_step, on_record):

        def made(step: int) -> None:
            keep_settings()
            on_step(step)

        decoder = train(
            decoder,
            store,
            workdir,
            optimizer,
            loop,
            evaluate=evaluate,
            on_record=on_record,
            on_step=made,
            token_weights=jnp.ones(len(vocabulary())).at[PIECE_IDS[MATCH]].set(config.match_weight),
        )
        export_countdown(workdir / "model", decoder)
    print(f"trained {decoder.num_params:,} parameters for {optimizer.num_steps:,} steps")


if __name__ == "__main__":
    cli.run(main)
