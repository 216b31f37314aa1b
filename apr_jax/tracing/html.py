"""A trace as one page that needs nothing else: no network, no server, no library."""

import base64
import dataclasses
import hashlib
import html
import json
from importlib import resources
from typing import Any

from apr_jax.tracing.trace import Trace

SCRIPTS = ("model.js", "scale.js", "occupancy.js", "timeline.js", "tree.js", "details.js", "main.js")


def as_html(trace: Trace) -> str:
    """The page's text. Its content policy forbids it to load or to send anything."""
    files = resources.files("apr_jax.tracing") / "page"
    style, page = ((files / name).read_text(encoding="utf-8") for name in ("style.css", "page.html"))
    script = "\n".join((files / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{script}\n}})();\n'
    values = {
        "policy": f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
        "title": html.escape(trace.title),
        "style": style,
        "data": as_json(dataclasses.asdict(trace)),
        "script": script,
    }
    parts = page.split("%%")  # text, name, text, name, ..., text: no value is looked into again
    assert len(parts) % 2 == 1, "a place for a value is not closed"
    return "".join(values[part] if place % 2 else part for place, part in enumerate(parts))


def as_json(content: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be written into a file
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
