"""Checkpoints: what is saved comes back; what was interrupted or did not fit leaves nothing that loads."""

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from apr_jax.config import RopeConfig
from apr_jax.models import atomic, checkpoint
from apr_jax.models.checkpoint import load_checkpoint, load_decoder, save_checkpoint
from apr_jax.models.hf import export_hf
from apr_jax.models.params import build_decoder, named_params
from apr_jax.testing import byte_tokenizer, tiny_config, tiny_decoder

CONFIG = {
    "qk_norm": True,
    "rope": RopeConfig(kind="yarn", factor=4.0, original_max_position=16, mscale=0.7, truncate=False),
    "eos_ids": (257, 3),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tmp_path, dtype):
    decoder = tiny_decoder(tiny_config(**CONFIG), dtype=dtype)
    save_checkpoint(tmp_path / "new" / "model", decoder, byte_tokenizer())
    config, loaded, tokenizer = load_checkpoint(tmp_path / "new" / "model")
    assert (config, loaded.config, loaded.dtype) == (decoder.config, decoder.config, decoder.dtype)
    assert tokenizer.encode("<Path>") == byte_tokenizer().encode("<Path>")
    for name, array in named_params(decoder).items():
        assert named_params(loaded)[name].dtype == dtype
        assert (named_params(loaded)[name] == array).all(), name
    assert load_decoder(tmp_path / "new" / "model", jnp.float32).embedding[...].dtype == jnp.float32
    # The tokenizer's files go along when a checkpoint is exported, and a Hugging Face directory loads too.
    export_hf(tmp_path / "hf", tiny_decoder(), tmp_path / "new" / "model")
    assert load_checkpoint(str(tmp_path / "hf"))[2].vocab_size == byte_tokenizer().vocab_size


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint 'nothing': expected a directory or an embedded model \("):
        load_checkpoint("nothing")
    with pytest.raises(ValueError, match=r"is no checkpoint: it holds neither model_config.json nor config.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "model_config.json").write_text(json.dumps({"format": "apr_jax/9"}))
    with pytest.raises(ValueError, match="format is 'apr_jax/9', expected 'apr_jax/1'"):
        load_checkpoint(tmp_path)


def test_damaged_checkpoints(tmp_path):
    path = tmp_path / "model"
    save_checkpoint(path, tiny_decoder(), byte_tokenizer())
    settings = json.loads((path / "model_config.json").read_text())
    for field, value, message in (
        ("d_ff", 64, r"parameter layers.0.mlp.down.kernel has shape \[48, 32\], expected \[64, 32\]"),
        ("qk_norm", True, r"parameter layers.0.attention.k_norm.scale is missing, expected shape \[16\]"),
        ("num_layers", 1, r"parameter layers\.1\.\S+ of shape \[.*\] is unexpected"),
        ("vocab_size", 100, r"parameter embedding has shape \[268, 32\], expected \[100, 32\]"),
    ):
        changed = settings | {"config": settings["config"] | {field: value}}
        (path / "model_config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path)
    (path / "model_config.json").write_text(json.dumps(settings))
    data = max(path.glob("params/**/d/*"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match="params is damaged"):
        load_checkpoint(path)
    shutil.rmtree(path / "params")
    with pytest.raises(ValueError, match="params is no orbax checkpoint"):
        load_checkpoint(path)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    save_checkpoint(tmp_path / "model", tiny_decoder(tiny_config(vocab_size=267)), byte_tokenizer())
    with pytest.raises(ValueError, match="the tokenizer has 268 ids, the model 267"):
        load_checkpoint(tmp_path / "model")


def test_existing_output_is_refused_and_kept(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("data")
    for write in (save_checkpoint, export_hf):
        with pytest.raises(FileExistsError, match="exists and is not empty"):
            write(tmp_path / "model", tiny_decoder())
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "precious"]


@pytest.mark.parametrize("write", [save_checkpoint, export_hf])
def test_values_that_overflow_are_refused(tmp_path, write):
    decoder = tiny_decoder()
    decoder.embedding[...] = decoder.embedding[...].at[3, :2].set(1e5)
    half = build_decoder(decoder.config, jnp.float16, lambda name: named_params(decoder)[name].astype(jnp.float16))
    with pytest.raises(ValueError, match=r"^2 of 8,\d+ values of embedding are not finite"):
        write(tmp_path / "model", half)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [save_checkpoint, export_hf])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, write):
    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device")  # as tensorstore says it

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[write.__module__], "copy_tokenizer", fail)
        message = r"the disk is full: .*model needs [\d,]+ bytes, [\d,]+ are free"
        with pytest.raises(OSError, match=message) as caught:
            write(tmp_path / "model", tiny_decoder())
        assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="1,000 are free; nothing was written"):
        write(tmp_path / "model", tiny_decoder())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["checkpoint.copy_tokenizer", "atomic.os.rename"])
def test_a_killed_save_leaves_no_checkpoint(tmp_path, moment):
    """Killed between the parameters and the settings, and just before the directory appears."""
    script = f"""
import os, signal
from apr_jax.models import atomic, checkpoint
from apr_jax.testing import byte_tokenizer, tiny_decoder
{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_checkpoint("{tmp_path}/model", tiny_decoder(), byte_tokenizer())
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    left = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert left  # it did get as far as writing
    for directory in [tmp_path / "model", *left]:
        with pytest.raises(ValueError, match="no checkpoint"):
            load_checkpoint(directory)
    save_checkpoint(tmp_path / "model", tiny_decoder(), byte_tokenizer())
    load_checkpoint(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_embedded_models_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_ASSETS", tmp_path)
    export_hf(tmp_path / "small", tiny_decoder(), byte_tokenizer())
    assert checkpoint.embedded_names() == ["small"]
    assert checkpoint.checkpoint_directory("small") == Path(tmp_path / "small")
    with pytest.raises(ValueError, match=r"no checkpoint 'large': expected a directory or an embedded model \(small\)"):
        load_checkpoint("large")
