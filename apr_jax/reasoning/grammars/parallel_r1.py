r"""Parallel-R1: no plan; where the model opens a block, two paths are sampled, then summed up.

    <Parallel><Path>...</Path><Path>...</Path></Parallel>
    <Summary>...</Summary>

Both paths start behind the same tokens: they differ because they are sampled, at temperature 1 whatever the
request's. They are written back one after another and computed again.

Source: github.com/zhengkid/Parallel-R1 (MIT), its rollout.
"""

from apr_jax.reasoning.grammars.declaration import CONCLUSION_MARKER, Grammar

PARALLEL_R1 = Grammar(
    name="parallel_r1",
    block=("<Parallel>", "</Summary>"),
    trigger="<Parallel>",
    num_paths=2,
    header="<Path>",
    closer="</Path>",
    after_join="</Parallel>\n<Summary>",
    conclusion_marker=CONCLUSION_MARKER,
    join="prefill",
    nested=False,
    max_child_tokens=4096,
    child_sampling={"temperature": 1.0},
)
