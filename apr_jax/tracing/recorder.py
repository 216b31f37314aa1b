"""Listens to an engine and keeps what a trace needs, within bounds of memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from apr_jax.config import check
from apr_jax.engine import events
from apr_jax.tokenizers import Tokenizer
from apr_jax.tracing.sharing import Sharing
from apr_jax.tracing.text import Transcript, critical_path
from apr_jax.tracing.trace import Fork, Join, Request, Run, Sample, ThreadTrace, Trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a recorder keeps at most. Beyond, a trace goes on without, and says so.

    Attributes:
      max_tokens: of all threads' texts and prompts. max_threads: later ones are left out with all below them.
      max_runs: of all threads; beyond, gaps between a thread's runs are filled.
      max_samples: of occupancy; beyond, two in a row become one, again and again.
    """

    max_tokens: int = 2_000_000
    max_threads: int = 20_000
    max_runs: int = 200_000
    max_samples: int = 4_096

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check(value >= 2, f"{field.name} is {value}, must be >= 2")


class Traced(Protocol):
    """What a recorder wants of an engine."""

    listeners: list[events.Listener]
    tells_contexts: bool
    cache: Any
    config: Any
    tokenizer: Tokenizer


class Recorder:
    """Records everything that runs in an engine from now on, until it is detached.

    Use as a context manager, or `detach` it: telling of contexts costs the engine host time.
    """

    def __init__(self, engine: Traced, limits: Limits = Limits()):
        self._engine = engine
        self._limits = limits
        self._threads: list[ThreadTrace] = []
        self._said: list[Transcript] = []
        self._numbers: dict[int, int] = {}  # the engine's thread ids -> places in _threads
        self._requests: dict[int, Request] = {}
        self._counts: dict[int, int] = {}  # threads of a family, left out ones too
        self._samples: list[Sample] = []
        self._stride = 1
        self._sharing = Sharing(self._is_ancestor)
        self._tokens_left, self._num_runs, self._num_left_out = limits.max_tokens, 0, 0
        self._first_step: int | None = None
        self._start_s = self._last_s = 0.0
        self._last_step = 0
        engine.listeners.append(self)
        engine.tells_contexts = True

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Hears nothing any more. What was recorded stays."""
        if self in self._engine.listeners:
            self._engine.listeners.remove(self)
            self._engine.tells_contexts = any(isinstance(each, Recorder) for each in self._engine.listeners)

    def __call__(self, event: events.Event) -> None:
        """Takes an event in."""
        if self._first_step is None:
            self._first_step, self._start_s = event.step, event.time_s
        self._last_step, self._last_s = event.step - self._first_step, event.time_s
        if isinstance(event, events.StepEvent):
            self._step(event)
        elif isinstance(event, events.SubmitEvent):
            self._submit(event)
        elif event.thread_id in self._numbers:
            self._of_thread(self._numbers[event.thread_id], event)

    def trace(self, title: str, metrics: Mapping[int, Mapping[str, float]] | None = None) -> Trace:
        """What was recorded up to now.

        Args:
          metrics: of requests, by family id.
        """
        for number, thread in enumerate(self._threads):
            thread.pieces = self._said[number].pieces(self._engine.tokenizer.decode)
            if thread.ended is None:
                thread.segments = self._sharing.uses(number)
        critical_path(self._threads, [request.root for request in self._requests.values()])
        for family_id, values in (metrics or {}).items():
            if family_id in self._requests:
                self._requests[family_id].metrics = dict(values)
        return Trace(
            title=title,
            page_size=self._engine.cache.page_size,
            num_pages=self._engine.cache.pool.total,
            num_slots=self._engine.config.max_threads,
            requests=list(self._requests.values()),
            threads=self._threads,
            samples=self._samples,
            num_steps=self._last_step,
            duration_ms=self._ms(self._last_s),
            incomplete=self._incomplete(),
        )

    # Threads.

    def _submit(self, event: events.SubmitEvent) -> None:
        number = self._add(event, event.thread_id, None, event.prompt_ids)
        if number is not None:
            prompt = self._threads[number].prompt
            self._requests[event.family_id] = Request(root=number, prompt=prompt, metrics={})

    def _add(self, event: events.Event, thread_id: int, parent: int | None, prompt: tuple[int, ...]) -> int | None:
        in_family = self._counts.get(event.family_id, 0)
        self._counts[event.family_id] = in_family + 1
        if len(self._threads) == self._limits.max_threads:
            self._num_left_out += 1
            return None
        number = len(self._threads)
        prompt = prompt[: self._tokens_left]
        self._tokens_left -= len(prompt)
        self._numbers[thread_id] = number
        above = None if parent is None else self._threads[parent]
        thread = ThreadTrace(
            id=number,
            request=len(self._requests) if above is None else above.request,
            parent=parent,
            label=str(in_family),
            depth=0 if above is None else above.depth + 1,
            prompt=self._engine.tokenizer.decode(prompt),
            began=self._last_step,
            began_ms=self._ms(event.time_s),
        )
        self._threads.append(thread)
        self._said.append(Transcript())
        return number

    def _of_thread(self, number: int, event: events.Event) -> None:
        thread, step, ms = self._threads[number], self._last_step, self._ms(event.time_s)
        match event:
            case events.TokenEvent():
                self._gain(number, event)
            case events.RewindEvent():
                thread.num_sampled -= self._said[number].rewind(event.num_tokens)
                thread.num_tokens -= event.num_tokens
                thread.num_dropped += event.num_tokens
            case events.KeysEvent():
                self._run(thread, event)
            case events.MarkEvent():
                thread.marks.append(step)
            case events.ForkEvent():
                prompts = event.prompts or ((),) * len(event.child_ids)
                added = [self._add(event, i, number, p) for i, p in zip(event.child_ids, prompts, strict=True)]
                children = [child for child in added if child is not None]
                self._said[number].place(["fork", len(thread.forks)])
                thread.forks.append(Fork(step, ms, children, bool(event.prompts), event.max_width))
                thread.status = "forked"
            case events.JoinEvent():
                self._join(thread, event)
            case events.StopEvent():
                thread.stops.append([step, event.reason])
                thread.status = "waiting" if event.reason == "held" else "stopped"
            case events.PreemptEvent():
                self._preempt(thread, event)
            case events.DegradeEvent():
                thread.notes.append(event.reason)
            case events.ContextEvent():
                self._sharing.hold(number, event.segments)
            case events.FinishEvent():
                thread.segments = self._sharing.release(number)
                thread.status = "cancelled" if event.cancelled else "finished"
                thread.ended, thread.ended_ms = step, ms
                _come_back(thread, step)

    def _gain(self, number: int, event: events.TokenEvent) -> None:
        thread = self._threads[number]
        thread.num_dropped += event.num_dropped
        thread.num_tokens += len(event.token_ids)
        thread.num_sampled += sum(event.sampled)
        self._said[number].say(event.token_ids, event.sampled, self._tokens_left)
        self._tokens_left = max(0, self._tokens_left - len(event.token_ids))

    def _join(self, thread: ThreadTrace, event: events.JoinEvent) -> None:
        joined = [self._numbers[i] for i in event.child_ids if i in self._numbers]
        for child in thread.forks[-1].children:
            self._threads[child].status = "joined" if child in joined else "dropped"
        self._said[thread.id].place(["join", len(thread.joins)])
        ms = self._ms(event.time_s)
        thread.joins.append(Join(self._last_step, ms, joined, event.mode, event.num_segments, event.seconds * 1e3))
        thread.status = "waiting"

    def _run(self, thread: ThreadTrace, event: events.KeysEvent) -> None:
        """Adds to the thread's last run, or begins another."""
        if event.reason not in ("prefill", "decode", "flush"):
            return
        flush = event.reason == "flush"
        start, end = self._last_step, self._last_step + (not flush)
        last = thread.runs[-1] if thread.runs else None
        alike = last is not None and (last.kind, last.slot) == (event.reason, event.slot) and last.end >= start
        crowded = last is not None and self._num_runs >= self._limits.max_runs
        if last is not None and (alike or crowded):
            last.end, last.num_fed = max(last.end, end), last.num_fed + event.num_tokens
        else:
            self._num_runs += 1
            thread.runs.append(Run(start, end, None if flush else event.slot, event.reason, event.num_tokens))
        if not flush:
            thread.status = "running"
            _come_back(thread, start)

    def _preempt(self, thread: ThreadTrace, event: events.PreemptEvent) -> None:
        """Notes who waits for pages in host memory; who runs again has come back."""
        if event.resumed:
            _come_back(thread, self._last_step)
            return
        whole = [each for each in self._threads if each.request == thread.request and each.ended is None]
        for each in whole if event.whole_family else [thread]:
            if not each.preempted or each.preempted[-1][1] is not None:
                each.preempted.append([self._last_step, None])

    def _is_ancestor(self, above: int, below: int) -> bool:
        at: int | None = below
        while at is not None and at > above:  # parents come first
            at = self._threads[at].parent
        return at == above and above != below

    # Steps.

    def _step(self, event: events.StepEvent) -> None:
        private, shared, joined = self._sharing.num_pages()
        step = self._last_step
        sample = Sample(
            start=step - 1,
            end=step,
            start_ms=self._ms(event.started_s),
            end_ms=self._ms(event.time_s),
            num_running=event.num_running,
            num_waiting=event.num_waiting,
            private=private,
            shared=shared,
            joined=joined,
            cached=event.cached_pages,
            free=event.free_pages,
        )
        last = self._samples[-1] if self._samples else None
        if last is not None and last.end - last.start < self._stride:
            self._samples[-1] = _merged(last, sample)
        else:
            self._samples.append(sample)
        if len(self._samples) > self._limits.max_samples:
            self._stride *= 2
            even, odd = self._samples[::2], self._samples[1::2]
            rest = even[len(odd) :]
            self._samples = [_merged(a, b) for a, b in zip(even, odd, strict=False)] + rest

    def _ms(self, time_s: float) -> float:
        return round((time_s - self._start_s) * 1e3, 4)

    def _incomplete(self) -> list[str]:
        limits, said = self._limits, []
        if self._tokens_left == 0:
            said.append(f"texts end after {limits.max_tokens:,} tokens in all")
        if self._num_left_out:
            said.append(f"{self._num_left_out:,} threads beyond the first {limits.max_threads:,} are left out")
        if self._num_runs >= limits.max_runs:
            said.append(f"gaps between runs are filled beyond {limits.max_runs:,} runs")
        if self._stride > 1:
            said.append(f"occupancy is that of the fullest of {self._stride} steps in a row")
        return said


def _merged(a: Sample, b: Sample) -> Sample:
    fullest = min(a, b, key=lambda sample: sample.free)
    return dataclasses.replace(fullest, start=a.start, end=b.end, start_ms=a.start_ms, end_ms=b.end_ms)


def _come_back(thread: ThreadTrace, step: int) -> None:
    if thread.preempted and thread.preempted[-1][1] is None:
        thread.preempted[-1][1] = step
