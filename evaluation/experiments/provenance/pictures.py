"""The ROC of every statistic, with false accusations on a logarithmic scale."""

from collections.abc import Mapping, Sequence
from typing import Any

from rigpt_hf.pictures import figure, picture

from .rates import Scored, auc, roc


@picture
def draw_roc(scored: Mapping[str, Sequence[Scored]]) -> Any:
    """
    A figure: shares of derived pairs that are found by shares of independent pairs that are accused.

    Args:
        scored: The pairs by the name of the statistic.
    """
    drawn, panels = figure(2, title=_said(scored), height=4.8, sharey=True)
    for panel, disguised in zip(panels, (False, True), strict=True):
        for name, pairs in scored.items():
            independent = [pair.score for pair in pairs if pair.independent]
            derived = [pair.score for pair in pairs if not pair.independent and pair.disguised == disguised]
            least = 0.5 / len(independent)  # where none is accused, which a logarithm has no place for
            points = [(max(accused, least), found) for _, accused, found in roc(derived, independent)]
            label = f"{name}: AUC {auc(derived, independent):.4f}"
            panel.step(*zip((least, 0.0), *points, (1.0, points[-1][1]), strict=True), where="post", label=label)
        panel.set(
            xscale="log",
            ylim=(-0.02, 1.02),
            xlabel="fraction of independent pairs accused (left: none)",
            title=f"{len(derived):,} derived pairs"
            + (", then disguised" if disguised else "")
            + f",\n{len(independent):,} independent pairs",
        )
        # Below the panel, where no curve is.
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
    panels[0].set_ylabel("fraction of derived pairs found")
    return drawn


def _said(scored: Mapping[str, Sequence[Scored]]) -> str:
    """The title: it names the statistics whose AUC stays highest under disguise."""
    least = {
        name: min(
            auc(
                [pair.score for pair in pairs if not pair.independent and pair.disguised == disguised],
                [pair.score for pair in pairs if pair.independent],
            )
            for disguised in (False, True)
        )
        for name, pairs in scored.items()
    }
    best = max(least, key=lambda name: least[name])
    return f"Was B made from A? The {best} tells best, disguised or not: AUC {least[best]:.4f} or more"
