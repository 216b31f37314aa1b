"""Tokenizers: exact round trips, nothing dropped, pieces that decode like the whole."""

import json
import random

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from apr_jax.testing import byte_tokenizer
from apr_jax.tokenizers import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer

TAGS = ["<Path>", "</Path>", "</Goal>", "1:", "▁53"]
TEXTS = [
    "<Path>1: 53 + 4 = 57</Path>",
    " 53 leads with a space",
    "53",
    "line one\n  indented <Path></Path>",
    "café 試 🙂 end",
]
CORPUS = [
    "the quick brown fox 53 + 4 = 57\n",
    "line one indented leads with a space end",
    "left and right 1: 2 * 7",
] * 8


@pytest.fixture(scope="module")
def sentencepiece_models(tmp_path_factory):
    """Vocabularies that keep a text as it is, put a space before it (Llama 2), or know few characters."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    corpus = directory / "corpus.txt"
    corpus.write_text("\n".join(CORPUS))
    for name, prefix, byte_fallback in (
        ("plain", False, True),
        ("prefixed", True, True),
        ("bounded", False, False),
    ):
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(directory / name),
            vocab_size=330 if byte_fallback else 64,
            model_type="bpe",
            hard_vocab_limit=False,
            user_defined_symbols=[*TAGS, "\n"],
            byte_fallback=byte_fallback,
            add_dummy_prefix=prefix,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            minloglevel=2,
        )
    return directory


def huggingface_file(directory, kind):
    """A small tokenizer.json of the Llama 3 / Qwen kind (byte level) or of the Llama 2 / Mistral kind."""
    special = ["<|begin|>", "<|end|>", "<Path>", "</Path>"]
    if kind == "byte_level":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = ["<unk>", *special]
        alphabet = []
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


def assert_pieces_decode_like_the_whole(tokenizer, ids):
    for cut in range(len(ids) + 1):
        together = tokenizer.decode(ids)
        apart = tokenizer.decode(ids[:cut]) + tokenizer.decode(ids[cut:])
        assert apart == together or "�" in apart  # the cut fell inside a character


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_round_trip(sentencepiece_models, text):
    plain = SentencePieceTokenizer(sentencepiece_models / "plain.model")
    ids = plain.encode(text)
    assert plain.decode(ids) == text
    assert plain.encode(text, continuation=True) == ids
    assert_pieces_decode_like_the_whole(plain, ids)

    prefixed = SentencePieceTokenizer(sentencepiece_models / "prefixed.model")
    own = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_models / "prefixed.model"))
    assert prefixed.encode(text) == own.encode(text)
    assert prefixed.decode(prefixed.encode(text)) == " " + text
    assert prefixed.decode(prefixed.encode(text, continuation=True)) == text
    assert_pieces_decode_like_the_whole(prefixed, prefixed.encode(text))


def test_sentencepiece_symbols_are_one_token_each(sentencepiece_models):
    tokenizer = SentencePieceTokenizer(sentencepiece_models / "plain.model")
    for symbol in ("<Path>", "</Goal>", "1:", "▁53", " 53"):
        assert tokenizer.encode(symbol.replace("▁", " ")) == [tokenizer.token_id(symbol)]
    assert tokenizer.token_id("<Nothing>") is None
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.token_id("1:"), *tokenizer.eos_ids]) == "1:"


def test_sentencepiece_names_what_it_cannot_represent(sentencepiece_models):
    tokenizer = SentencePieceTokenizer(sentencepiece_models / "bounded.model")
    assert tokenizer.decode(tokenizer.encode("brown fox")) == "brown fox"
    with pytest.raises(ValueError, match="no token for '試' in the text 'fox 試'"):
        tokenizer.encode("fox 試")
    with pytest.raises(ValueError, match="token id 9999 is not in"):
        tokenizer.decode([9999])


def test_sentencepiece_tokens_added_beyond_the_model(sentencepiece_models, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_models / "plain.model").read_bytes())
    size = SentencePieceTokenizer(tmp_path / "tokenizer.model").vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<Parallel>": size, "<s>": 1}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == size + 1
    ids = tokenizer.encode("53 <Parallel> 53")
    assert ids[ids.index(size) :] == [size, tokenizer.token_id("▁53")]
    assert tokenizer.decode(ids) == "53 <Parallel> 53"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_huggingface_round_trip(tmp_path, kind, text):
    path = huggingface_file(tmp_path, kind)
    tokenizer = HuggingFaceTokenizer(path)
    if kind == "metaspace" and "é" in text:
        with pytest.raises(ValueError, match="no token for 'é'"):
            tokenizer.encode(text)
        return
    own = tokenizers.Tokenizer.from_file(str(path))
    assert tokenizer.encode(text) == own.encode(text, add_special_tokens=False).ids
    ids = tokenizer.encode(text, continuation=True)
    assert tokenizer.decode(ids) == text
    assert_pieces_decode_like_the_whole(tokenizer, ids)
    assert tokenizer.token_id("<Path>") == own.token_to_id("<Path>")


def test_huggingface_does_not_drop_characters(tmp_path):
    """Without an unknown token the library's BPE leaves them out in silence."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=80))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no token for 'Z' in the text 'the Zoo'"):
        load_tokenizer(tmp_path).encode("the Zoo")


def test_huggingface_begin_and_end(tmp_path):
    """The begin token is the one that the files put before a text, not any that they name."""
    huggingface_file(tmp_path, "byte_level")
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 3]}))
    assert (load_tokenizer(tmp_path).bos_id, load_tokenizer(tmp_path).eos_ids) == (None, (1, 3))
    own = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    first, end = own.id_to_token(0), {"content": "<|end|>"}
    for says_so, bos_id in ((True, 0), (False, None)):
        names = {"bos_token": first, "add_bos_token": says_so, "eos_token": end}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
        assert (load_tokenizer(tmp_path).bos_id, load_tokenizer(tmp_path).eos_ids) == (bos_id, (1,))
    own.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 0)])
    own.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).bos_id == 0


def test_bytes_round_trip(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(rng.choices(["<Path>", "</Path>", "<Pa", "é", "🙂", " ", "x", "\n"], k=12))
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == ids and loaded.decode(ids) == text
    assert tokenizer.encode("<Path>a") == [tokenizer.token_id("<Path>"), ord("a")]
    assert tokenizer.token_id("ab") is None
    assert ByteTokenizer(["<a", "<ab"]).encode("<ab<a") == [259, 258]


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer in .*: expected tokenizer.json, tokenizer.model or"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"tiktoken, say")
    with pytest.raises(ValueError, match="is no sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
        load_tokenizer(tmp_path)
