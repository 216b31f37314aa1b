r"""ThreadWeaver: threads are written side by side, then read one after another: joined by a second prefill.

    <Parallel>
    <Outlines>
    <Outline>1: ...</Outline><Outline>2: ...</Outline></Outlines>
    <Thread>
    1:...</Thread><Thread>
    2:...</Thread>
    <Conclusion>...</Conclusion>
    </Parallel>

A thread starts behind the prefix and `\n<Thread>\n{i}:`; no line break between threads. The first thread's pages
are an exact prefix and stay; the others are computed again. A block inside a thread is text. Generation ends
behind a plan without outlines, and behind a thread without its closer.

Source: Lian et al. 2025, ThreadWeaver (arXiv 2512.07843).
"""

from apr_jax.reasoning.grammars.declaration import CONCLUSION_MARKER, Grammar

THREADWEAVER = Grammar(
    name="threadweaver",
    block=("<Parallel>", "</Parallel>"),
    plan="<Outlines>",
    trigger="</Outlines>",
    outline=r"<Outline>(?:\s*([0-9]+(?:\.[0-9]+)*)\s*:)?",
    before_fork="\n",
    header="<Thread>\n{label}:",
    closer="</Thread>",
    after_join="\n",
    conclusion_marker=CONCLUSION_MARKER,
    join="prefill",
    nested=False,
    max_rounds=32,
    without_outlines="stop",
    unclosed="stop",
)
