"""Tags that threads stop at: by id where the tokenizer has the tag as one token, by string where not."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from apr_jax.engine.thread import Stop
from apr_jax.tokenizers import Tokenizer
from apr_jax.types import SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForkTags:
    """What a model writes where it wants to fork.

    Attributes:
      openers: tags that it may begin with.
      inside: tags that it writes then, up to the fork; without any, the program forks at an opener itself.
      closer: where a forked thread ends: out of place in a thread that was not forked.
      end: where the block ends: out of place where there is none.
      nested: whether forked threads may fork.
    """

    openers: tuple[str, ...]
    inside: tuple[str, ...] = ()
    closer: str
    end: str
    nested: bool = True

    def __iter__(self) -> Iterator[str]:
        return iter((*self.openers, *self.inside, self.closer, self.end))


class Tags:
    """The tags of one program.

    Args:
      tags: all that its threads may stop at.
    """

    def __init__(self, tokenizer: Tokenizer, tags: Sequence[str]):
        self.ids = {tag: tokenizer.token_id(tag) for tag in tags}

    def at(self, stop: Stop) -> str | None:
        """The tag that a thread has stopped at, if any."""
        if stop.reason == "stop_string":
            return stop.string if stop.string in self.ids else None
        by_id = {tag_id: tag for tag, tag_id in self.ids.items() if tag_id is not None}
        return by_id.get(stop.token_id) if stop.reason == "stop_id" and stop.token_id is not None else None

    def of(self, tags: Iterable[str]) -> list[int]:
        """The ids of those of these tags that are one token."""
        return [tag_id for tag in tags if (tag_id := self.ids[tag]) is not None]

    def also(self, sampling: SamplingParams, tags: Sequence[str]) -> SamplingParams:
        """The parameters with these tags as stops besides all others."""
        strings = [tag for tag in tags if self.ids[tag] is None]
        return dataclasses.replace(
            sampling,
            stop_ids=tuple(dict.fromkeys((*sampling.stop_ids, *self.of(tags)))),
            stop=tuple(dict.fromkeys((*sampling.stop, *strings))),
        )

    def only(self, sampling: SamplingParams, tags: Sequence[str]) -> SamplingParams:
        """The parameters with the request's own stops and these tags, no others of the program."""
        mine = set(self.ids.values())
        wanted = [self.ids[tag] for tag in tags]
        stop_ids = [*(i for i in sampling.stop_ids if i not in mine), *(i for i in wanted if i is not None)]
        strings = [s for s in sampling.stop if s not in self.ids]
        strings += [tag for tag, tag_id in zip(tags, wanted, strict=True) if tag_id is None]
        return dataclasses.replace(
            sampling, stop_ids=tuple(dict.fromkeys(stop_ids)), stop=tuple(dict.fromkeys(strings))
        )
