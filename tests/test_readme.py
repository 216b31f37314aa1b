"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest


@pytest.mark.slow
def test_python_examples_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
        assert names["out"].metrics.num_threads > 1 and "= 27" in names["out"].text
        assert not names["engine"].scheduler.families  # all was released
