"""JSON files that may be missing."""

import json
from pathlib import Path


def read_json(path: Path) -> dict:
    """The object in a file; empty if there is no such file.

    Raises:
      ValueError: it is not JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
