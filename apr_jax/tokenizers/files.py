"""Which tokenizer the files of a directory make."""

from pathlib import Path

from apr_jax.tokenizers.byte_level import BYTE_TOKENIZER_FILE, ByteTokenizer
from apr_jax.tokenizers.hugging_face import HuggingFaceTokenizer
from apr_jax.tokenizers.interface import Tokenizer
from apr_jax.tokenizers.json_file import read_json
from apr_jax.tokenizers.sentencepiece_model import SentencePieceTokenizer, read_model

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    BYTE_TOKENIZER_FILE,
)


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a directory holds a file that `load_tokenizer` reads."""
    names = ("tokenizer.json", "tokenizer.model", BYTE_TOKENIZER_FILE)
    return any((Path(directory) / name).is_file() for name in names)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer whose files lie in a directory: `tokenizer.json`, else `tokenizer.model`, else bytes.

    Raises:
      ValueError: there is none, or a file is not what its name says.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        tokenizer = HuggingFaceTokenizer(directory / "tokenizer.json")
        tokenizer.bos_id, tokenizer.eos_ids = _begin_and_end(directory, tokenizer)
        return tokenizer
    if (directory / "tokenizer.model").is_file():
        return SentencePieceTokenizer(directory / "tokenizer.model", _added_pieces(directory))
    if (directory / BYTE_TOKENIZER_FILE).is_file():
        return ByteTokenizer(read_json(directory / BYTE_TOKENIZER_FILE)["special_pieces"])
    expected = f"tokenizer.json, tokenizer.model or {BYTE_TOKENIZER_FILE}"
    raise ValueError(f"no tokenizer in {directory}: expected {expected}")


def _begin_and_end(directory: Path, tokenizer: HuggingFaceTokenizer) -> tuple[int | None, tuple[int, ...]]:
    """The token put before a text, if these files put one there, and the tokens that end it.

    A text begins as tokenizer.json's post-processor has it, or with tokenizer_config.json's bos_token if that says
    `add_bos_token`: Qwen2 names a bos in config.json that its texts do not begin with. The end is
    tokenizer_config.json's eos_token, else config.json's eos_token_id.
    """
    tokenizer_config = read_json(directory / "tokenizer_config.json")

    def named(name: str) -> int | None:
        token = tokenizer_config.get(name)
        return tokenizer.token_id(token["content"] if isinstance(token, dict) else token or "")

    bos_id = tokenizer.prefix_id()
    if bos_id is None and tokenizer_config.get("add_bos_token"):
        bos_id = named("bos_token")
    eos_id = named("eos_token")
    found = read_json(directory / "config.json").get("eos_token_id") if eos_id is None else eos_id
    return bos_id, tuple(found) if isinstance(found, list) else () if found is None else (found,)


def _added_pieces(directory: Path) -> dict[str, int]:
    """Tokens that Hugging Face files put beyond a sentencepiece vocabulary."""
    added = dict(read_json(directory / "added_tokens.json"))
    for token_id, token in read_json(directory / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        added.setdefault(token["content"], int(token_id))
    path = directory / "tokenizer.model"
    num_pieces = read_model(path.read_bytes(), path).get_piece_size()
    return {piece: token_id for piece, token_id in added.items() if token_id >= num_pieces}
