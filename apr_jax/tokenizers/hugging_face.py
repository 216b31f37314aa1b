"""Hugging Face `tokenizer.json` files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from apr_jax.tokenizers.json_file import read_json
from apr_jax.tokenizers.pieces import shortened


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`, read by the `tokenizers` library.

    Args:
      path: the file.
      bos_id, eos_ids: which of its tokens begin and end a text; the file itself does not say.

    Raises:
      ValueError: the file is something else.
    """

    def __init__(self, path: str | Path, *, bos_id: int | None = None, eos_ids: tuple[int, ...] = ()):
        definition = read_json(Path(path))
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
                raise ValueError(f"no token for {text[start:stop]!r} in the text {shortened(text)}")
            covered[start:stop] = b"\x01" * (stop - start)
        if any(not done and not text[i].isspace() for i, done in enumerate(covered)):
            # A BPE without an unknown token drops characters silently, and the others' offsets move up.
            encode_one = self._continuation.encode
            dropped = [c for c in text if not c.isspace() and not encode_one(c, add_special_tokens=False).ids]
            raise ValueError(f"no token for {''.join(dropped[:1])!r} in the text {shortened(text)}")
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
