"""Text to token ids and back: sentencepiece models, Hugging Face `tokenizer.json`, bytes; one interface.

Three things differ from what the tokenizers' own libraries do, because threads are read piece by piece:
- decode keeps the space that a continuation begins with: decode(a + b) == decode(a) + decode(b), unless the
  cut falls inside a character of several bytes. A model that puts a space before every text (Llama 2)
  therefore gives it back; encode(text, continuation=True) leaves it out, and decode(encode(text)) is text.
- encode raises where text has no token; it never drops characters or returns an unknown token.
- special tokens stay visible in decode (`</Path>` is one in many models), except sentencepiece's and the byte
  tokenizer's own control tokens, which have no text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from apr_jax.config import check

BYTE_TOKENIZER_FILE = "byte_tokenizer.json"
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


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
      vocab_size: one more than the largest id.
      bos_id: the token that begins a text, or None; encode does not add it.
      eos_ids: tokens that end a text.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        """Token ids of text. A continuation gets no leading space of the tokenizer's own.

        Raises:
          ValueError: part of the text has no token; the message names it.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; pieces decoded one after another give the same text as decoded together."""
        ...

    def token_id(self, piece: str) -> int | None:
        """The id, if that string is exactly one token."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece `.model` file.

    Args:
      path: the file.
      added: pieces beyond the model's own, and their ids; matched before anything else.
    """

    def __init__(self, path: str | Path, added: Mapping[str, int] | None = None):
        proto = Path(path).read_bytes()
        self._start = _sentencepiece(proto, path)
        # Appended fields override earlier ones: normalizer_spec.add_dummy_prefix and
        # .remove_extra_whitespaces become false.
        self._continuation = _sentencepiece(proto + b"\x1a\x04\x18\x00\x20\x00", path)
        self._added = _AddedPieces(added or {})
        num_pieces = self._start.get_piece_size()
        self._texts = {i: _sentencepiece_bytes(self._start, i) for i in range(num_pieces)}
        self._texts.update({i: piece.encode() for piece, i in (added or {}).items()})
        self.vocab_size = max(self._texts) + 1
        self.bos_id = self._start.bos_id() if self._start.bos_id() >= 0 else None
        self.eos_ids = (self._start.eos_id(),) if self._start.eos_id() >= 0 else ()

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        ids: list[int] = []
        for part in self._added.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._encode_plain(part, self._continuation if continuation or ids else self._start))
        return ids

    def _encode_plain(self, text: str, processor) -> list[int]:
        ids = processor.encode(text)
        if processor.unk_id() in ids:
            unknown = processor.encode(text, out_type=str)[ids.index(processor.unk_id())]
            raise ValueError(f"no token for {unknown!r} in the text {_shortened(text)}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return _join_bytes(self._texts, ids)

    def token_id(self, piece: str) -> int | None:
        if piece in self._added.ids:
            return self._added.ids[piece]
        piece_id = self._start.piece_to_id(piece.replace(" ", "▁"))
        return None if self._start.is_unknown(piece_id) else piece_id


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`, read by the `tokenizers` library.

    Args:
      path: the file.
      bos_id, eos_ids: which of its tokens begin and end a text; the file itself does not say.

    Raises:
      ValueError: the file is something else.
    """

    def __init__(self, path: str | Path, *, bos_id: int | None = None, eos_ids: tuple[int, ...] = ()):
        definition = _read_json(Path(path))
        try:
            self._start = tokenizers.Tokenizer.from_str(json.dumps(definition))
            self._continuation = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(definition)))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} is no tokenizer.json: {error}") from error
        for tokenizer in (self._start, self._continuation):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self.vocab_size = max(self._start.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, self.eos_ids = bos_id, eos_ids
        model = definition["model"]
        self._unk_id = model.get("unk_id", self._start.token_to_id(model.get("unk_token") or ""))
        # Some decoders strip the space that a text begins with: nothing is stripped behind another token.
        self._anchor = next((i for i in map(self._start.token_to_id, "a0.A!") if i is not None), 0)
        self._anchor_text = self._start.decode([self._anchor], skip_special_tokens=False)

    def prefix_id(self) -> int | None:
        """The token that the post-processor puts before a text, if any."""
        around = self._start.encode(self._anchor_text, add_special_tokens=True)
        special = around.special_tokens_mask
        return around.ids[0] if special and special[0] else None

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        encoding = (self._continuation if continuation else self._start).encode(text, add_special_tokens=False)
        covered = bytearray(len(text))
        for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id == self._unk_id and text[start:stop] != self._start.id_to_token(token_id):
                raise ValueError(f"no token for {text[start:stop]!r} in the text {_shortened(text)}")
            covered[start:stop] = b"\x01" * (stop - start)
        if any(not done and not text[i].isspace() for i, done in enumerate(covered)):
            # A BPE without an unknown token drops characters silently, and the others' offsets move up.
            encode_one = self._continuation.encode
            dropped = [c for c in text if not c.isspace() and not encode_one(c, add_special_tokens=False).ids]
            raise ValueError(f"no token for {''.join(dropped[:1])!r} in the text {_shortened(text)}")
        return encoding.ids

    def decode(self, ids: Sequence[int]) -> str:
        text = self._start.decode([self._anchor, *ids], skip_special_tokens=False)
        return text.removeprefix(self._anchor_text)

    def token_id(self, piece: str) -> int | None:
        piece_id = self._start.token_to_id(piece)
        if piece_id is not None:
            return piece_id
        ids = self._continuation.encode(piece, add_special_tokens=False).ids
        return ids[0] if len(ids) == 1 and ids[0] != self._unk_id and self.decode(ids) == piece else None


class ByteTokenizer:
    """Ids 0..255 are bytes of UTF-8, 256 begins a text, 257 ends it; then come the special pieces."""

    def __init__(self, special_pieces: Sequence[str] = ()):
        check(len(set(special_pieces)) == len(special_pieces), f"special pieces repeat: {list(special_pieces)}")
        self.special_pieces = tuple(special_pieces)
        self.bos_id: int | None = 256
        self.eos_ids: tuple[int, ...] = (257,)
        self._added = _AddedPieces({piece: 258 + i for i, piece in enumerate(special_pieces)})
        self._texts = {i: bytes([i]) for i in range(256)} | {256: b"", 257: b""}
        self._texts.update({i: piece.encode() for piece, i in self._added.ids.items()})
        self.vocab_size = len(self._texts)

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        ids: list[int] = []
        for part in self._added.split(text):
            ids.extend([part] if isinstance(part, int) else part.encode())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return _join_bytes(self._texts, ids)

    def token_id(self, piece: str) -> int | None:
        ids = self.encode(piece)
        return ids[0] if len(ids) == 1 else None

    def save(self, directory: str | Path) -> None:
        """Writes what `load_tokenizer` reads this tokenizer back from."""
        content = json.dumps({"special_pieces": self.special_pieces}, indent=2)
        (Path(directory) / BYTE_TOKENIZER_FILE).write_text(content + "\n", encoding="utf-8")


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
        return ByteTokenizer(_read_json(directory / BYTE_TOKENIZER_FILE)["special_pieces"])
    expected = f"tokenizer.json, tokenizer.model or {BYTE_TOKENIZER_FILE}"
    raise ValueError(f"no tokenizer in {directory}: expected {expected}")


class _AddedPieces:
    """Strings that are one token each, cut out of a text before it is tokenized; the longest match wins."""

    def __init__(self, ids: Mapping[str, int]):
        self.ids = dict(ids)
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if self.ids else None

    def split(self, text: str) -> list[str | int]:
        """Runs of plain text, and the ids of the pieces between them."""
        if self._pattern is None:
            return [text] if text else []
        parts: list[str | int] = []
        end = 0
        for match in self._pattern.finditer(text):
            parts += [text[end : match.start()], self.ids[match.group()]]
            end = match.end()
        return [part for part in [*parts, text[end:]] if part != ""]


def _sentencepiece(proto: bytes, path: str | Path) -> Any:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
    except RuntimeError as error:
        raise ValueError(f"{path} is no sentencepiece model") from error
    return processor


def _sentencepiece_bytes(processor: Any, piece_id: int) -> bytes:
    """What a piece adds to the text."""
    piece = processor.id_to_piece(piece_id)
    if processor.is_control(piece_id) or processor.is_unused(piece_id):
        return b""
    if processor.is_byte(piece_id):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _join_bytes(texts: Mapping[int, bytes], ids: Sequence[int]) -> str:
    try:
        return b"".join([texts[int(i)] for i in ids]).decode("utf-8", errors="replace")
    except KeyError as error:
        raise ValueError(f"token id {error.args[0]} is not in [0, {max(texts)}]") from None


def _without_prefix(definition: Any) -> Any:
    """A tokenizer.json that puts no space of its own before a text."""
    if isinstance(definition, list):
        return [_without_prefix(part) for part in definition]
    if not isinstance(definition, dict):
        return definition
    kind = definition.get("type")
    if kind == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    definition = {
        key: _without_prefix(part) if key in ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers") else part
        for key, part in definition.items()
    }
    if kind == "Metaspace":
        definition |= {"prepend_scheme": "never", "add_prefix_space": False}
    if kind == "ByteLevel":
        definition["add_prefix_space"] = False
    return definition


def _begin_and_end(directory: Path, tokenizer: "HuggingFaceTokenizer") -> tuple[int | None, tuple[int, ...]]:
    """The token put before a text, if these files put one there, and the tokens that end it.

    A text begins as tokenizer.json's post-processor has it, or with tokenizer_config.json's bos_token if that says
    `add_bos_token`: Qwen2 names a bos in config.json that its texts do not begin with. The end is
    tokenizer_config.json's eos_token, else config.json's eos_token_id.
    """
    tokenizer_config = _read_json(directory / "tokenizer_config.json")

    def named(name: str) -> int | None:
        token = tokenizer_config.get(name)
        return tokenizer.token_id(token["content"] if isinstance(token, dict) else token or "")

    bos_id = tokenizer.prefix_id()
    if bos_id is None and tokenizer_config.get("add_bos_token"):
        bos_id = named("bos_token")
    eos_id = named("eos_token")
    found = _read_json(directory / "config.json").get("eos_token_id") if eos_id is None else eos_id
    return bos_id, tuple(found) if isinstance(found, list) else () if found is None else (found,)


def _added_pieces(directory: Path) -> dict[str, int]:
    """Tokens that Hugging Face files put beyond a sentencepiece vocabulary."""
    added = dict(_read_json(directory / "added_tokens.json"))
    for token_id, token in _read_json(directory / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        added.setdefault(token["content"], int(token_id))
    path = directory / "tokenizer.model"
    num_pieces = _sentencepiece(path.read_bytes(), path).get_piece_size()
    return {piece: token_id for piece, token_id in added.items() if token_id >= num_pieces}


def _read_json(path: Path) -> dict:
    """The object in a file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
