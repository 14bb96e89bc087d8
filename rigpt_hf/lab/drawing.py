"""What the figures of the course have in common."""

from typing import Any

from matplotlib.figure import Figure


# Told apart by people who see few colours: Okabe and Ito, "Color Universal Design" (2008), without their yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def panels(
    count: int, title: str, height: float = 3.8, width: float = 4.6, **options: Any
) -> tuple[Figure, list[Any]]:
    """
    A figure with `count` panels side by side.

    Args:
        count: Of panels.
        title: Says what is seen.
        height, width: Of one panel, in inches.
        options: For `Figure.subplots`, such as `sharey=True`.

    Returns:
        The figure and its axes.
    """
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False, **options)[0])
    figure.suptitle(title, fontsize=11)
    for panel in axes:
        if not hasattr(panel, "zaxis"):
            panel.spines[["top", "right"]].set_visible(False)
        panel.set_prop_cycle(color=COLOURS)
    return figure, axes
