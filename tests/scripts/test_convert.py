"""convert_hf.py and export_hf.py as a person runs them."""

import pytest
from command import run

from apr_jax.models.checkpoint import load_checkpoint, load_decoder
from apr_jax.models.hf import export_hf, load_hf
from apr_jax.models.params import named_params
from apr_jax.testing import byte_tokenizer, tiny_config, tiny_decoder
from apr_jax.tokenizers import BYTE_TOKENIZER_FILE


@pytest.fixture
def source(tmp_path):
    export_hf(
        tmp_path / "hf",
        tiny_decoder(tiny_config(qk_norm=True, architecture="Qwen3ForCausalLM")),
        byte_tokenizer(),
    )
    return tmp_path / "hf"


def test_there_and_back(tmp_path, source):
    code, out, err = run("convert_hf.py", f"--source={source}", f"--output={tmp_path / 'own'}", "--dtype=bfloat16")
    expected = f"{tmp_path / 'own'}: Qwen3ForCausalLM, 38,880 parameters, bfloat16\n"
    assert (code, out, err) == (0, expected, "")
    config, decoder, tokenizer = load_checkpoint(tmp_path / "own")
    assert tokenizer.token_id("<Path>") == byte_tokenizer().token_id("<Path>")
    assert config == load_hf(source).config

    code, out, err = run("export_hf.py", f"--source={tmp_path / 'own'}", f"--output={tmp_path / 'back'}")
    assert code == 0, err
    returned = named_params(load_hf(tmp_path / "back"))
    for name, array in named_params(decoder).items():
        assert returned[name].dtype == array.dtype and (returned[name] == array).all()
    assert {path.name for path in (tmp_path / "back").iterdir()} == {path.name for path in source.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "own"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "flag --output=None: Flag --output must have a value"),
        (("--source=missing", "--output=own"), "--source=missing is no directory"),
        (("--source=hf", "--output=full"), "full exists and is not empty: name a new directory"),
        (("--source=full", "--output=own"), "full holds no config.json"),
        (("--source=damaged", "--output=own"), "damaged/tokenizer.model is no sentencepiece model"),
        (
            ("--source=hf", "--output=own", "--dtype=int8"),
            "flag --dtype=int8: value should be one of <bfloat16|",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, source, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / BYTE_TOKENIZER_FILE).write_text('{"special_pieces": []}')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.model").write_text("data")
    code, out, err = run("convert_hf.py", *args)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "full", "hf"]


def test_a_source_without_tokenizer_converts_with_a_note(tmp_path):
    export_hf(tmp_path / "hf", tiny_decoder())
    code, _, err = run("convert_hf.py", f"--source={tmp_path / 'hf'}", f"--output={tmp_path / 'own'}")
    assert code == 0 and err == f"note: no tokenizer in {tmp_path / 'hf'}, so the checkpoint has none\n"
    assert load_decoder(tmp_path / "own").config == tiny_config()
    with pytest.raises(ValueError, match="no tokenizer in"):
        load_checkpoint(tmp_path / "own")


def test_help_shows_examples_and_flags():
    for script in ("convert_hf.py", "export_hf.py"):
        code, out, _ = run(script, "--help")
        assert code == 0
        for part in ("Examples:", f"python scripts/{script} --source=", "--dtype", "--profile_dir"):
            assert part in out
