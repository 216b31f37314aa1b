"""What a request gave: text, threads, costs."""

import dataclasses
from collections.abc import Callable

from apr_jax.engine.thread import Thread
from apr_jax.reasoning.metrics import Metrics, measure
from apr_jax.reasoning.run import Run
from apr_jax.reasoning.text import find_blocks, flatten
from apr_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreadOutput:
    """One thread.

    Attributes:
      parent: the parent's id, None for the root. Ids count a request's threads from 0, the root, in fork
        order.
      status: "finished" or "cancelled".
      token_ids: its own tokens, forced ones included; text: of these.
      start_position: the position of its first token, for the root of the prompt's first.
    """

    id: int
    parent: int | None
    status: str
    token_ids: list[int]
    text: str
    start_position: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What a request gave.

    Attributes:
      text: the whole answer in the program's published format, joined threads in their places; tokens that
        end a sequence are left out at the end, and at the ends of joined threads.
      answer: what the extractor finds in the text; without one, what the program reads from it.
      token_ids: what the root generated, forced tokens included, without the prompt and its children's
        tokens.
      text_ids: the token ids of the text, those of joined children included.
      threads: the root and all its descendants, oldest first.
      degraded: what did not go as the format wants.
      finish_reason: why the root ended: `eos`, `length`, `context`, `pages`, `wall_clock`, `stop_id`, `stop_string`,
        `cancelled`; `steps`: a search took its last one; `unclosed`: a thread had no closer, and the format ends
        there; `stalled`: the program waited for nothing; `error`: the program raised.
    """

    text: str
    answer: str | None
    token_ids: list[int]
    text_ids: list[int]
    threads: list[ThreadOutput]
    metrics: Metrics
    program: str
    degraded: list[str]
    finish_reason: str


class GenerateError(RuntimeError):
    """Some requests of a call failed; the others were answered.

    Attributes:
      outputs: of all requests, in order; a failed one's holds what it gave until then, and ends with `error`.
      errors: what each failed request raised, by its place in `outputs`.
    """

    def __init__(self, outputs: list[Output], errors: dict[int, Exception]):
        place, first = next(iter(errors.items()))
        what = f"{len(errors)} of {len(outputs)} requests failed, the first is number {place}"
        super().__init__(f"{what}: {type(first).__name__}: {first}")
        self.outputs = outputs
        self.errors = errors


def collect(
    run: Run,
    tokenizer: Tokenizer,
    eos_ids: tuple[int, ...] = (),
    extract_answer: Callable[[str], str | None] | None = None,
) -> Output:
    """The output of a request that has ended."""
    assert run.finish_reason is not None, "the request still runs"
    root, program, block = run.root, run.program, run.program.block
    numbers = {thread.id: number for number, thread in enumerate(root.family.threads)}
    text_ids = flatten(root)
    shown = text_ids[:-1] if text_ids and text_ids[-1] in eos_ids else text_ids
    if root.joins:  # joined threads have their own
        shown = [token for token in shown if token not in eos_ids]
    text = tokenizer.decode(shown)
    answer = (extract_answer or program.read_answer)(text)
    spans = find_blocks(root, tokenizer, block) if block else []
    return Output(
        text=text,
        answer=answer,
        token_ids=list(root.token_ids),
        text_ids=text_ids,
        threads=[_thread_output(thread, numbers, tokenizer) for thread in root.family.threads],
        metrics=measure(root, wall_s=run.wall_s, block_spans=spans),
        program=program.name,
        degraded=[f"thread {numbers[thread.id]}: {reason}" for thread, reason in run.degraded],
        finish_reason=run.finish_reason,
    )


def _thread_output(thread: Thread, numbers: dict[int, int], tokenizer: Tokenizer) -> ThreadOutput:
    return ThreadOutput(
        id=numbers[thread.id],
        parent=None if thread.parent is None else numbers[thread.parent.id],
        status=thread.status.value,
        token_ids=list(thread.token_ids),
        text=tokenizer.decode(thread.token_ids),
        start_position=thread.start_position,
    )
