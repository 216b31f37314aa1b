"""Beam search over steps, and diverse verifier tree search: the same in subtrees that do not compete.

Source: Snell et al. 2024, arXiv 2408.03314; Beeching et al. 2024, "Scaling test-time compute with open models".
"""

from apr_jax.reasoning.strategies.tree_search import Leaf, Search, TreeSearch


class BeamSearch(TreeSearch):
    """After each step the `beam_width` best candidates go on, those that are complete counted."""

    name = "beam_search"

    def choose(self, search: Search) -> tuple[list[Leaf], list[Leaf]]:
        kept = sorted(search.leaves.values(), key=Leaf.key, reverse=True)[: self.options.beam_width]
        return kept, [leaf for leaf in kept if not leaf.complete]


class DiverseVerifierTreeSearch(TreeSearch):
    """`beam_width` subtrees, each of which goes on with its own best candidate; at the end the best of all wins.

    The first candidates are dealt to the subtrees in order.
    """

    name = "diverse_verifier_tree_search"

    def choose(self, search: Search) -> tuple[list[Leaf], list[Leaf]]:
        best: dict[int, Leaf] = {}
        for leaf in sorted(search.leaves.values(), key=Leaf.key):
            best[leaf.branch // self.options.expansion] = leaf
        kept = sorted(best.values(), key=lambda leaf: leaf.order)
        return kept, [leaf for leaf in kept if not leaf.complete]
