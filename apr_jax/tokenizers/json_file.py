"""JSON files that may be missing."""

import json
from pathlib import Path


def read_json(path: Path) -> dict:
    """The object in a file; empty if there is no such file.

    Raises:
      ValueError: it is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
