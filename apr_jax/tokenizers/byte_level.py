"""Bytes as tokens: needs no file, and any text has tokens."""

import json
from collections.abc import Sequence
from pathlib import Path

from apr_jax.config import check
from apr_jax.tokenizers.pieces import AddedPieces, join_bytes

BYTE_TOKENIZER_FILE = "byte_tokenizer.json"


class ByteTokenizer:
    """Ids 0..255 are bytes of UTF-8, 256 begins a text, 257 ends it; then come the special pieces."""

    def __init__(self, special_pieces: Sequence[str] = ()):
        check(len(set(special_pieces)) == len(special_pieces), f"special pieces repeat: {list(special_pieces)}")
        self.special_pieces = tuple(special_pieces)
        self.bos_id: int | None = 256
        self.eos_ids: tuple[int, ...] = (257,)
        self._added = AddedPieces({piece: 258 + i for i, piece in enumerate(special_pieces)})
        self._texts = {i: bytes([i]) for i in range(256)} | {256: b"", 257: b""}
        self._texts.update({i: piece.encode() for piece, i in self._added.ids.items()})
        self.vocab_size = len(self._texts)

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        ids: list[int] = []
        for part in self._added.split(text):
            ids.extend([part] if isinstance(part, int) else part.encode())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return join_bytes(self._texts, ids)

    def token_id(self, piece: str) -> int | None:
        ids = self.encode(piece)
        return ids[0] if len(ids) == 1 else None

    def save(self, directory: str | Path) -> None:
        """Writes what `load_tokenizer` reads this tokenizer back from."""
        content = json.dumps({"special_pieces": self.special_pieces}, indent=2)
        (Path(directory) / BYTE_TOKENIZER_FILE).write_text(content + "\n", encoding="utf-8")
