"""Multiverse: siblings share the prefix, do not see each other, and are stitched at the join.

    <Parallel><Goal><Outline>1: ...</Outline><Outline>2: ...</Outline></Goal>
    <Path>1: ...</Path><Path>2: ...</Path><Conclusion>...</Conclusion></Parallel>

Every path starts at the position behind `</Goal>`, the conclusion behind the longest path. (No line break
between the tags; the one above is for the eye.)

Source: Yang et al. 2025, Multiverse (arXiv 2506.09991).
"""

from apr_jax.reasoning.grammars.declaration import CONCLUSION_MARKER, Grammar

MULTIVERSE = Grammar(
    name="multiverse",
    block=("<Parallel>", "</Parallel>"),
    plan="<Goal>",
    trigger="</Goal>",
    outline=r"<Outline>(?:\s*([0-9]+(?:\.[0-9]+)*)\s*:)?",
    header="<Path>{label}:",
    closer="</Path>",
    after_join="<Conclusion>",
    conclusion_marker=CONCLUSION_MARKER,
)
