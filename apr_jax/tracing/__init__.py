"""What happened in an engine, as a page to look at or a trace for Perfetto."""

from apr_jax.tracing.html import as_html
from apr_jax.tracing.perfetto import as_chrome_trace
from apr_jax.tracing.recorder import Limits, Recorder
from apr_jax.tracing.trace import Trace

__all__ = ["Limits", "Recorder", "Trace", "as_chrome_trace", "as_html"]
