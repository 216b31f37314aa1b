"""Text to token ids and back: sentencepiece models, Hugging Face `tokenizer.json`, bytes; one interface.

Three things differ from what the tokenizers' own libraries do, because threads are read piece by piece:
- decode keeps the space that a continuation begins with: decode(a + b) == decode(a) + decode(b), unless the
  cut falls inside a character of several bytes. A model that puts a space before every text (Llama 2)
  therefore gives it back; encode(text, continuation=True) leaves it out, and decode(encode(text)) is text.
- encode raises where text has no token; it never drops characters or returns an unknown token.
- special tokens stay visible in decode (`</Path>` is one in many models), except sentencepiece's and the byte
  tokenizer's own control tokens, which have no text.
"""

from collections.abc import Sequence
from typing import Protocol


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
