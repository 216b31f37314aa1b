"""What tokenizers share: strings that are one token each, and text from the bytes of tokens."""

import re
from collections.abc import Mapping, Sequence


class AddedPieces:
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


def join_bytes(texts: Mapping[int, bytes], ids: Sequence[int]) -> str:
    """The text of ids whose bytes are texts[id]. Raises ValueError for an id without any."""
    try:
        return b"".join([texts[int(i)] for i in ids]).decode("utf-8", errors="replace")
    except KeyError as error:
        raise ValueError(f"token id {error.args[0]} is not in [0, {max(texts)}]") from None


def shortened(text: str) -> str:
    """A text for an error message."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
