"""Runs a script as a person does."""

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(script: str, *args) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    command = [sys.executable, SCRIPTS / script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr
