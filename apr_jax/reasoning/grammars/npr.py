"""Native Parallel Reasoner: Multiverse's join under other tags, with a mild repetition penalty inside branches.

    <guideline>
    <plan>1: ...</plan>
    <plan>2: ...</plan>
    </guideline>
    <step>
    1: ...</step><step>
    2: ...</step><takeaway>
    ... </takeaway>

At most five plans; no fork below five others. Every step starts behind the line break after `</guideline>`, the
takeaway behind the longest step.

Source: github.com/bigai-nlco/Native-Parallel-Reasoner (MIT); its client stops at `</guideline>` and `</step>`.
"""

from apr_jax.reasoning.grammars.declaration import CONCLUSION_MARKER, Grammar

NPR = Grammar(
    name="npr",
    block=("<guideline>", "</takeaway>"),
    plan="<guideline>",
    trigger="</guideline>",
    outline=r"<plan>(?:\s*([0-9]+(?:\.[0-9]+)*)\s*:)?",
    before_fork="\n",
    header="<step>\n{label}:",
    closer="</step>",
    after_join="<takeaway>\n",
    conclusion_marker=CONCLUSION_MARKER,
    max_depth=5,
    max_children=5,
    child_sampling={"repetition_penalty": 1.02},
)
