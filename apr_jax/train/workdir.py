"""The directory of a run: one process trains in it at a time, under the settings that it was begun with.

DIR/settings.json   what the run was begun with
DIR/.lock           held by the process that trains
"""

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

SETTINGS_FILE = "settings.json"


@contextlib.contextmanager
def held_workdir(
    workdir: Path, settings: Mapping[str, Any], allow_changes: bool = False
) -> Iterator[Callable[[], None]]:
    """Holds a run's directory while it trains; makes it if it is not there.

    Gives what writes the settings down: to be called once a step is made, so that what was refused leaves none.

    Args:
      settings: plain JSON values, nested by name: all that the run's weights depend on.
      allow_changes: the run goes on under other settings than it was begun with; they take their place.

    Raises:
      BlockingIOError: another process trains in it.
      ValueError: see `check_settings`.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"another process trains in {workdir}") from error
        if not allow_changes:
            check_settings(workdir, settings)
        yield lambda: _write(workdir / SETTINGS_FILE, settings)


def check_settings(workdir: Path, settings: Mapping[str, Any]) -> None:
    """Refuses settings other than those of the run that has a checkpoint here, if there is one.

    Raises:
      ValueError: names the first that differs, what it was and what is asked for.
    """
    path = workdir / SETTINGS_FILE
    if not path.exists() or not any((workdir / "checkpoints").glob("[0-9]*")):
        return
    before, now = _flat(json.loads(path.read_text(encoding="utf-8"))), _flat(json.loads(json.dumps(settings)))
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            raise ValueError(f"{workdir} was begun with {name} = {before.get(name)!r}, asked for is {now.get(name)!r}")


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    content = json.dumps(settings, indent=2) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != content:
        partial = path.with_suffix(".partial")
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return flat
