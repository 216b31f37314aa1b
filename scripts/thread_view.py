"""Threads as they grow: a live tree in a terminal, plain lines elsewhere. Both listen to the engine's
events.
"""

import dataclasses
import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from apr_jax.engine import events
from apr_jax.tokenizers import Tokenizer

REFRESH_S = 1 / 12
MIN_PANEL_WIDTH = 30
LIVE_LINES = 5  # of each thread, while it grows
STYLES = {"running": "green", "waiting": "yellow", "joined": "cyan", "done": "white", "cancelled": "red"}


@dataclasses.dataclass
class ThreadState:
    """A thread as the view knows it.

    Attributes:
      number: counts the request's threads from 0.
      parts: texts, and between them groups of children, in the order in which they came.
    """

    number: int
    parts: "list[str | list[ThreadState]]" = dataclasses.field(default_factory=lambda: [""])
    status: str = "waiting"
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, text: str) -> None:
        if isinstance(self.parts[-1], list):
            self.parts.append("")
        self.parts[-1] += text  # type: ignore[operator]


class ThreadView:
    """Keeps the tree of threads of every request that it hears of.

    Args:
      tokenizer: turns tokens into text, piece by piece.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.roots: list[ThreadState] = []
        self._decode = tokenizer.decode
        self._threads: dict[int, ThreadState] = {}
        self._counts: dict[int, int] = {}

    def __call__(self, event: events.Event) -> None:
        """Takes an event in."""
        state = self._threads.get(event.thread_id)
        match event:
            case events.SubmitEvent():
                self.roots.append(self._add(event.family_id, event.thread_id))
            case events.TokenEvent() if state is not None:
                state.status = "running"
                state.add(self._decode(event.token_ids))
            case events.ForkEvent() if state is not None:
                state.status = "waiting"
                state.parts.append([self._add(event.family_id, child_id) for child_id in event.child_ids])
            case events.JoinEvent() if state is not None:
                for child_id in event.child_ids:
                    self._threads[child_id].status = "joined"
            case events.StopEvent() if state is not None:
                state.status = "waiting" if event.reason == "held" else "done"
            case events.FinishEvent() if state is not None and event.cancelled:
                state.status = "cancelled"
            case events.DegradeEvent() if state is not None:
                state.notes.append(event.reason)

    def render(self, width: int, max_lines: int | None = None) -> RenderableType:
        """All requests, children side by side below the text that they forked from.

        Args:
          width: of the terminal, in characters.
          max_lines: of each text, the last ones; None shows all.
        """
        return Group(*(_panel(root, width, max_lines) for root in self.roots))

    def _add(self, family_id: int, thread_id: int) -> ThreadState:
        number = self._counts.get(family_id, 0)
        self._counts[family_id] = number + 1
        self._threads[thread_id] = ThreadState(number)
        return self._threads[thread_id]


def _panel(state: ThreadState, width: int, max_lines: int | None) -> Panel:
    style = STYLES[state.status]
    inner = width - 4
    parts: list[RenderableType] = []
    for part in state.parts:
        if isinstance(part, list):
            parts.append(_side_by_side(part, inner, max_lines))
        elif part:
            parts.append(Text(_last_lines(part, inner, max_lines)))
    parts += [Text(note, style="italic yellow") for note in state.notes]
    title = f"thread {state.number} · {state.status}"
    return Panel(Group(*parts), title=title, title_align="left", border_style=style, width=width)


def _side_by_side(children: list[ThreadState], width: int, max_lines: int | None) -> Table:
    columns = max(1, min(len(children), width // MIN_PANEL_WIDTH))
    rows = -(-len(children) // columns)
    columns = -(-len(children) // rows)  # even rows
    table = Table.grid()
    for start in range(0, len(children), columns):
        table.add_row(*(_panel(c, width // columns, max_lines) for c in children[start : start + columns]))
    return table


def _last_lines(text: str, width: int, max_lines: int | None) -> str:
    room = None if max_lines is None else max_lines * max(1, width)
    return text if room is None or len(text) <= room else "…" + text[1 - room :]


class LiveView:
    """Shows a ThreadView in a terminal while it is entered; `update()` is cheap and may be called at any
    rate.
    """

    def __init__(self, view: ThreadView, console: Console):
        self._view = view
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._shown_s = 0.0

    def __enter__(self) -> "LiveView":
        self._live.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._live.__exit__(*exception)
        if self._view.roots:
            self._console.print(self._view.render(self._console.width))

    def update(self) -> None:
        now = time.perf_counter()
        if now - self._shown_s >= REFRESH_S:
            self._shown_s = now
            self._live.update(self._view.render(self._console.width, LIVE_LINES), refresh=True)


class PlainView:
    """Tells the same in lines: a thread's text where it stops, forks, joins, and what degraded.

    Args:
      write: takes one line.
    """

    def __init__(self, view: ThreadView, write: Callable[[str], None]):
        self._view = view
        self._write = write
        self._told: dict[int, int] = {}

    def __call__(self, event: events.Event) -> None:
        """Takes an event in; call it after the ThreadView."""
        state = self._view._threads.get(event.thread_id)
        if state is None:
            return
        prefix = f"thread {state.number}"
        if len(self._view.roots) > 1:
            prefix = f"sample {list(self._view._counts).index(event.family_id)} {prefix}"
        match event:
            case events.StopEvent():
                text = "".join(part for part in state.parts if isinstance(part, str))
                new = text[self._told.get(event.thread_id, 0) :]
                self._told[event.thread_id] = len(text)
                if new:
                    self._write(f"{prefix}: {new}")
            case events.ForkEvent():
                self._write(f"{prefix} forks into {self._numbers(event.child_ids)}")
            case events.JoinEvent():
                self._write(f"{prefix} joins {self._numbers(event.child_ids)} ({event.mode})")
            case events.DegradeEvent():
                self._write(f"{prefix} degrades: {event.reason}")

    def _numbers(self, thread_ids: tuple[int, ...]) -> str:
        return ", ".join(str(self._view._threads[thread_id].number) for thread_id in thread_ids)
