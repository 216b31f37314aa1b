"""sentencepiece `.model` files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from apr_jax.tokenizers.pieces import AddedPieces, join_bytes, shortened


class SentencePieceTokenizer:
    """A sentencepiece `.model` file.

    Args:
      path: the file.
      added: pieces beyond the model's own, and their ids; matched before anything else.
    """

    def __init__(self, path: str | Path, added: Mapping[str, int] | None = None):
        proto = Path(path).read_bytes()
        self._start = read_model(proto, path)
        # Appended fields override earlier ones: normalizer_spec.add_dummy_prefix and
        # .remove_extra_whitespaces become false.
        self._continuation = read_model(proto + b"\x1a\x04\x18\x00\x20\x00", path)
        self._added = AddedPieces(added or {})
        num_pieces = self._start.get_piece_size()
        self._texts = {i: _piece_bytes(self._start, i) for i in range(num_pieces)}
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
            raise ValueError(f"no token for {unknown!r} in the text {shortened(text)}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return join_bytes(self._texts, ids)

    def token_id(self, piece: str) -> int | None:
        if piece in self._added.ids:
            return self._added.ids[piece]
        piece_id = self._start.piece_to_id(piece.replace(" ", "▁"))
        return None if self._start.is_unknown(piece_id) else piece_id


def read_model(proto: bytes, path: str | Path) -> Any:
    """The processor of a serialized model; path is for the message. Raises ValueError if it is none."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
    except RuntimeError as error:
        raise ValueError(f"{path} is no sentencepiece model") from error
    return processor


def _piece_bytes(processor: Any, piece_id: int) -> bytes:
    """What a piece adds to the text."""
    piece = processor.id_to_piece(piece_id)
    if processor.is_control(piece_id) or processor.is_unused(piece_id):
        return b""
    if processor.is_byte(piece_id):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
