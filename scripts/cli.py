"""What every script shares: flags parsed once, one line and exit code 2 for bad input, `--profile_dir`."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import app, flags, logging

from apr_jax.types import OutOfPages

_PROFILE_DIR = flags.DEFINE_string(
    "profile_dir", None, "Write a JAX profiler trace of the run into this directory (open it with xprof)."
)


def run(main: Callable[[], None]) -> None:
    """Parses the flags, calls main and exits: 0 when done, 2 with one line on stderr for bad input.

    Bad input is an unknown or ill-typed flag, a positional argument, and any ValueError, OSError or
    OutOfPages that main raises; `--verbosity=1` shows where. Any other exception is a bug and
    keeps its traceback.
    """
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["profile_dir"])
    logging.get_absl_handler().addFilter(_is_worth_reading)

    def guarded(argv: list[str]) -> int:
        try:
            if len(argv) > 1:
                raise ValueError(f"unexpected argument {argv[1]!r}: give values as --flag=value")
            main()
        except (ValueError, OSError, OutOfPages) as error:
            logging.debug("raised here:", exc_info=True)
            return _fail(error)
        return 0

    app.run(guarded, flags_parser=_parse)


@contextlib.contextmanager
def profile() -> Iterator[None]:
    """Traces what runs inside into `--profile_dir`; does nothing without the flag."""
    if _PROFILE_DIR.value is None:
        yield
        return
    with jax.profiler.trace(_PROFILE_DIR.value):
        yield


def _is_worth_reading(record) -> bool:
    """Drops what JAX and orbax tell of every step, and orbax's log of errors that it raises as well."""
    silenced = {"/jax/": ("INFO",), "/orbax/": ("INFO", "ERROR")}
    return not any(part in record.pathname and record.levelname in levels for part, levels in silenced.items())


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(tuple(argv))
    except AttributeError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if "ml_collections" not in frame.f_code.co_filename:
            raise  # a bug in a config's file
        raise SystemExit(_fail(ValueError(f"--config has no field {error}"))) from None
    except flags.Error as error:
        raise SystemExit(_fail(error)) from None
    except SystemExit:  # --help was asked for and printed: that is success, though absl exits with 1
        raise SystemExit(0) from None


def _fail(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
