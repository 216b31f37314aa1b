"""Stop strings that are no single token: matched on the host, after a dispatch."""

from collections.abc import Callable, Sequence


def find_stop(
    decode: Callable[[Sequence[int]], str], token_ids: Sequence[int], first_new: int, strings: Sequence[str]
) -> tuple[int, str] | None:
    """The earliest stop string in a thread's text that ends in a new token.

    Args:
      decode: token ids to text.
      token_ids: the thread's tokens that may hold a match.
      first_new: index of the first token that was not looked at before.
      strings: what to look for; the longest wins where several end in the same token.

    Returns:
      (number of tokens up to and with the one in which the string is complete, the string), or None.
    """
    if not strings:
        return None
    # A string of n bytes begins at most n tokens back if every token holds a byte; special tokens may hold none,
    # hence the slack.
    window = 2 * max(len(string.encode()) for string in strings) + 8
    for end in range(first_new + 1, len(token_ids) + 1):
        start = max(0, end - window)
        text, before = decode(token_ids[start:end]), decode(token_ids[start : end - 1])
        num_known = len(before.rstrip("\ufffd"))  # what a character's first bytes decode to is not known yet
        found = [s for s in strings if s in text[max(0, num_known - len(s) + 1) :]]
        if found:
            return end, max(found, key=len)
    return None
