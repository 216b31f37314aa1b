import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "reasoning"))  # scripted threads are written down there

from browser import browser as started
from browser import missing


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; tests that want one are skipped where there is none."""
    if reason := missing():
        pytest.skip(reason)
    with started() as each:
        yield each
