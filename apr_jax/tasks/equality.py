"""Whether two mathematical answers are equal, by `math-verify` in a process of its own, within a time limit.

math-verify limits its time by signals, which only reach the main thread between bytecodes, and an expression may keep
sympy busy for hours. A process can be killed wherever it is, from any thread.
"""

import contextlib
import importlib.util
import json
import queue
import subprocess
import sys
import threading
import weakref
from typing import IO

from apr_jax.config import check

START_S = 120.0  # to load sympy, on a machine that is busy


def missing() -> str | None:
    """Why answers cannot be compared here; None if they can."""
    if importlib.util.find_spec("math_verify") is None:
        return 'answers are compared by math-verify, which is not installed (pip install -e ".[math]")'
    return None


class Verifier:
    """Compares answers. The process starts with the first pair that differs as text, and ends with this one.

    Args:
      limit_s: seconds a pair; what takes longer counts as different, and the process is started anew.

    Raises:
      ValueError: math-verify is not installed.
    """

    def __init__(self, limit_s: float = 5.0):
        reason = missing()
        check(reason is None, reason or "")
        self.limit_s = limit_s
        self._process: subprocess.Popen[str] | None = None
        self._ending: weakref.finalize | None = None
        self._replies: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()

    def is_equal(self, gold: str, answer: str) -> bool:
        """Whether they mean the same: numbers, fractions, decimals, expressions, sets, tuples, intervals."""
        if gold.strip() == answer.strip():
            return True
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([gold, answer]) + "\n")
                process.stdin.flush()
                reply = self._replies.get(timeout=self.limit_s)
            except (queue.Empty, OSError):
                self._stop()
                return False
            if not reply:  # it died of the pair: recursion beyond the stack, or memory
                self._stop()
            return reply.strip() == "true"

    def close(self) -> None:
        """Ends the process; the next comparison starts another."""
        with self._lock:
            self._stop()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        command = [sys.executable, "-m", "apr_jax.tasks.equality_worker"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._process, self._replies = process, queue.Queue()
        self._ending = weakref.finalize(self, _end, process)
        assert process.stdout is not None
        threading.Thread(target=_read, args=(process.stdout, self._replies), daemon=True).start()
        try:
            ready = self._replies.get(timeout=START_S)
        except queue.Empty:
            ready = ""
        if ready.strip() != "ready":
            self._stop()
            raise RuntimeError(f"math-verify did not start: {' '.join(command)}")
        return process

    def _stop(self) -> None:
        self._process = None
        if self._ending is not None:
            self._ending()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _read(pipe: IO[str], replies: "queue.Queue[str]") -> None:
    """Hands on the lines of a process, and an empty one at its end."""
    with contextlib.suppress(ValueError):  # closed meanwhile
        for line in pipe:
            replies.put(line)
    replies.put("")
