"""APR: a search calls sub-searches in words, and reads their results in words. Spawn and splice.

    root      ... Generated Node #0,1: 27:[26, 31, 31] Operation: 53-22=31
    call        <Calling Sub Searches>
                <Start Sub Search 0 at level 1> Moving to Node #0,0
                <Start Sub Search 1 at level 1> Moving to Node #0,1
                <End Calling Sub Searches>
    search        Moving to Node #0,1
                  Current State: 27:[26, 31, 31], Operations: ['53-22=31'] ...     a context of its own, one a line
    root      <Sub Searches>
              <No Solution in Sub Search 0 at level 1 at Node #0,0>
              <Goal Reached in Sub Search 1 at level 1 at Node #0,1>
              Moving to Node #0,1 ...                                              the winning path only
              <End Sub Searches>
              ...

The call is a thread of its own: it goes on from the root's context, spawns the searches, and ends when they have; its
place in the root's text is taken by the results. So whatever was sampled is in some thread, behind the context that
it was sampled from, and the root never sees a call again. Positions are sequential everywhere.

Where the root writes `<Sub Searches>` itself, it means to call: that is replaced by `<Calling Sub Searches>`.

Source: Pan et al. 2025, Learning Adaptive Parallel Reasoning with Language Models (arXiv 2504.15466).
"""

import dataclasses
import re
from collections.abc import Sequence

from apr_jax.engine.thread import Stop, Thread
from apr_jax.reasoning.grammar import UNBOUNDED
from apr_jax.reasoning.program import Append, Finish, Fork, Join, Program, Request, Spawn, Wait
from apr_jax.reasoning.tags import ForkTags, Tags
from apr_jax.tokenizers import Tokenizer
from apr_jax.types import SamplingParams

CALLING, END_CALLING = "<Calling Sub Searches>", "<End Calling Sub Searches>"
RESULTS, END_RESULTS = "<Sub Searches>", "<End Sub Searches>"
GOAL = "Goal Reached"
OUTCOMES = ("No Solution", GOAL)
STATE = re.compile(r"Moving to Node #([\d,]+) *\nCurrent State: *(\d+):\[([^\]\n]*)\], Operations: \[([^\]\n]*)\]")
GENERATED = re.compile(r"Generated Node #([\d,]+): *(\d+):\[([^\]\n]*)\] *Operation: *(\S+)")
CALL = re.compile(r"<Start Sub Search [^>\n]*> Moving to Node #([\d,]+)")


@dataclasses.dataclass(frozen=True)
class Node:
    """A state of the search: what is left, and how it was made."""

    name: str
    target: int
    numbers: tuple[int, ...]
    operations: tuple[str, ...]

    def __str__(self) -> str:
        """The prompt of a search from here."""
        state = f"{self.target}:{[*self.numbers]}, Operations: {[*self.operations]}"
        return f"Moving to Node #{self.name}\nCurrent State: {state}"


def read_nodes(text: str) -> dict[str, Node]:
    """All nodes that a text visits or generates, by name; a generated one needs its parent before it."""
    nodes: dict[str, Node] = {}
    for name, target, numbers, operations in STATE.findall(text):
        nodes[name] = Node(name, int(target), _numbers(numbers), tuple(re.findall("'([^']*)'", operations)))
    for name, target, numbers, operation in GENERATED.findall(text):
        parent = nodes.get(name.rpartition(",")[0])
        if name not in nodes and parent is not None:
            nodes[name] = Node(name, int(target), _numbers(numbers), (*parent.operations, operation))
    return nodes


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def winning_path(trace: str) -> str | None:
    """What a search returns: the path that it repeats once it has reached the goal; None if it has not."""
    parts = trace.split(GOAL)
    return GOAL.join(parts[-2:]).strip() if len(parts) > 2 else None


def _line(outcome: str, index: int, node: Node) -> str:
    """What the root reads of a search."""
    return f"\n<{outcome} in Sub Search {index} at level 1 at Node #{node.name}>"


class AprProgram(Program):
    """Follows APR's protocol. Holds no state; a root calls, a call spawns, a search only searches.

    What does not follow the protocol degrades, with a reason: a call of an unknown node or of one that it called
    already is dropped; a call that names none, or that is refused, stays in the root's text, which goes on; a call
    that breaks off ends the request; a search that breaks off has found nothing; a call inside a search is text.
    """

    name = "apr"
    block = (CALLING, END_RESULTS)  # a call is not in the root's text: blocks begin where results are spliced
    fork_tags = ForkTags(openers=(CALLING, RESULTS), closer=END_CALLING, end=END_RESULTS, nested=False)

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tags = Tags(tokenizer, (CALLING, RESULTS, END_CALLING))
        self._line_break = tokenizer.encode("\n", continuation=True)
        tokenizer.encode(CALLING + END_CALLING, continuation=True)  # raises here, not in the middle of a search

    def start(self, request: Request) -> Append:
        return Append(sampling=self._tags.only(request.sampling, (CALLING, RESULTS)))

    def on_stop(self, thread: Thread, stop: Stop) -> Append | Fork | Spawn | Finish:
        tag = self._tags.at(stop)
        if thread.parent is None:
            return self._open_call(thread, tag) if tag is not None else Finish(stop.reason)
        if not thread.prompt_ids:
            return self._spawn(thread) if tag == END_CALLING else Finish(stop.reason)
        degraded = [] if stop.reason == "eos" else [f"a search ended without an end of sequence ({stop.reason})"]
        if CALLING in self._tokenizer.decode(thread.token_ids):
            degraded.append(f"{CALLING} inside a search is text: {self.name} does not nest")
        return Finish(stop.reason, degraded=tuple(degraded))

    def on_child(self, parent: Thread, ended: Sequence[Thread], running: Sequence[Thread]) -> Join | Wait | Finish:
        if running:
            return Wait()
        everything = dataclasses.replace(parent.sampling, max_new_tokens=UNBOUNDED)
        if parent.parent is not None:  # a call, all of whose searches have ended
            return Join(ended, "splice", self._line_break, dataclasses.replace(everything, max_new_tokens=0))
        if not ended:
            return Finish("cancelled", degraded=("the call was cancelled",))
        (call,) = ended
        assert call.stop is not None
        if call.joins:
            return Join([call], "splice", self._results(call), everything)
        if self._tags.at(call.stop) == END_CALLING:  # nothing was called: the root goes on behind it
            return Join([call], "select", self._line_break, everything)
        return Finish(call.stop.reason, degraded=(f"a call ended without {END_CALLING} ({call.stop.reason})",))

    def on_refused(self, thread: Thread, reason: str) -> Append | Finish:
        return Append() if thread.parent is None else Finish("refused")

    def _open_call(self, root: Thread, tag: str) -> Fork:
        """The tag goes over to a thread of its own, with what its first token holds before it."""
        count, text = 0, ""
        while tag not in text:
            count += 1
            text = self._tokenizer.decode(root.token_ids[-count:])
        tokens = self._tokenizer.encode(text.partition(tag)[0] + CALLING, continuation=True)
        return Fork([tokens], self._only(root, (END_CALLING,)), joining_len=1, drop=count)

    def _spawn(self, call: Thread) -> Spawn | Finish:
        prompts, degraded = self._called(call)
        if not prompts:
            return Finish("nothing called", degraded=(*degraded, f"{END_CALLING} without calls: no search"))
        root, bos_id = call.family.root, self._tokenizer.bos_id
        begin = [bos_id] if bos_id is not None and root.prompt_ids[0] == bos_id else []
        begun = [[*begin, *ids] for ids in prompts.values()]
        return Spawn(begun, self._only(call, ()), joining_len=len(self._line_break), degraded=tuple(degraded))

    def _called(self, call: Thread) -> tuple[dict[Node, list[int]], list[str]]:
        """The nodes to search from, each once, with their prompts, and what was wrong with the call."""
        text = self._tokenizer.decode(call.token_ids)
        known = read_nodes(self._tokenizer.decode([*call.family.root.prompt_ids, *call.family.root.token_ids]) + text)
        prompts: dict[Node, list[int]] = {}
        degraded: list[str] = []
        for name in CALL.findall(text):
            if name not in known:
                degraded.append(f"a search from node #{name}, which was not generated: dropped")
            elif known[name] in prompts:
                degraded.append(f"a search from node #{name} is called twice: dropped")
            else:
                try:  # a small vocabulary may write a node and not its prompt, or not what became of it
                    prompt = self._tokenizer.encode(str(known[name]))
                    for outcome in OUTCOMES:
                        self._tokenizer.encode(_line(outcome, len(prompts), known[name]), continuation=True)
                    prompts[known[name]] = prompt
                except ValueError as error:
                    degraded.append(f"a search from node #{name}, which cannot be written ({error}): dropped")
        return prompts, degraded

    def _results(self, call: Thread) -> list[int]:
        """What the root reads in place of the call."""
        header = self._tokenizer.decode(call.token_ids).partition(CALLING)[0]
        lines = [header + RESULTS]
        searches = [thread for thread in call.family.threads if thread.parent is call]  # cancelled ones too
        for i, (node, search) in enumerate(zip(self._called(call)[0], searches, strict=False)):
            path = winning_path(self._trace(search)) if search in call.joins[-1].children else None
            lines.append(_line(OUTCOMES[path is not None], i, node) + ("" if path is None else f"\n{path}"))
        return self._tokenizer.encode("".join([*lines, f"\n{END_RESULTS}\n"]), continuation=True)

    def _trace(self, search: Thread) -> str:
        """A search's prompt and what it wrote."""
        assert search.stop is not None
        ended = search.stop.reason == "eos"
        ids = search.token_ids[:-1] if ended else search.token_ids
        return self._tokenizer.decode([*search.prompt_ids, *ids])

    def _only(self, thread: Thread, tags: Sequence[str]) -> SamplingParams:
        return dataclasses.replace(self._tags.only(thread.sampling, tags), max_new_tokens=UNBOUNDED)
