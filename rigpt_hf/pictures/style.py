"""The one style of all pictures: colours, panels of one size, and files that appear whole or not at all."""

import functools
import io
import textwrap
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ..checkpoints.folder import named_file
from ..extras import needs


if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # Matplotlib is imported when something is drawn

# Told apart by people who see few colours: Okabe and Ito, "Color Universal Design" (2008), without their yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, BLACK = COLOURS
# The model that turns along with the hidden space, and the one that does not.
INVARIANT, STOCK = BLUE, ORANGE
STYLE: dict[str, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.dpi": 110,
    "figure.titlesize": 12,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
# Letters of a title in an inch, and panels that can be read beside each other on a page of 700 pixels.
LETTERS, BESIDE = 10, 2
FORMATS = (".png", ".svg", ".pdf")
# Metadata that would differ between two files of one picture.
UNDATED = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
P = ParamSpec("P")
R = TypeVar("R")


def use_style() -> None:
    """Draw in the style of this package from now on."""
    with needs("pictures"):
        import matplotlib as mpl
        from cycler import cycler

    settings: Any = STYLE | {"axes.prop_cycle": cycler(color=COLOURS)}
    mpl.rcdefaults()
    mpl.rcParams.update(settings)


def picture(draw: Callable[P, R]) -> Callable[P, R]:
    """A function that draws, in the style of this package whatever the user's settings of Matplotlib are."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        with needs("pictures"):
            import matplotlib as mpl

        with mpl.rc_context():
            use_style()
            return draw(*args, **kwargs)

    return styled


@picture
def figure(
    columns: int = 1,
    rows: int = 1,
    *,
    title: str = "",
    width: float = 4.6,
    height: float = 3.8,
    solid: Collection[int] = (),
    **options: Any,
) -> tuple[Figure, list[Any]]:
    """
    A figure of `columns` times `rows` panels; in one row there are two at most, and the others come below.

    Args:
        columns, rows: Numbers of panels.
        title: What is seen, over all panels; in as many lines as it takes.
        width, height: Of one panel, in inches.
        solid: Panels of three dimensions, counted along the rows from 0.
        options: For `Figure.subplot_mosaic`, such as `sharey=True` and `width_ratios`.

    Returns:
        The `Figure`, and its axes row by row.
    """
    from matplotlib.figure import Figure

    count = columns * rows
    if rows == 1:
        columns, rows = min(columns, BESIDE), -(-columns // BESIDE)
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    cells = [*range(count), *["."] * (columns * rows - count)]
    places = [cells[columns * row :][:columns] for row in range(rows)]
    kinds = {place: {"projection": "3d"} for place in solid}
    panels = made.subplot_mosaic(places, per_subplot_kw=kinds, **options)  # type: ignore[arg-type]
    if title:
        made.suptitle(textwrap.fill(title, int(LETTERS * width * columns)))
    return made, [panels[place] for place in range(count)]


def encoded(drawn: Figure, picture_format: str = "png") -> bytes:
    """A figure as a file of `picture_format` (png, svg or pdf): equal bytes for equal figures, for one Matplotlib."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "rigpt"}):
        drawn.savefig(buffer, format=picture_format, facecolor="white", metadata=UNDATED.get(picture_format))
    return buffer.getvalue()


def check_format(path: Path, argument: str) -> None:
    """A `ValueError` if the name of a picture ends in none of `FORMATS`."""
    if path.suffix not in FORMATS:
        raise ValueError(f"`{argument}` must end in one of {', '.join(FORMATS)}, got {str(path)!r}.")


def save(drawn: Figure, path: str | Path, picture_format: str | None = None) -> Path:
    """
    Write a figure to a file, whole or not at all.

    Args:
        drawn: The figure.
        path: Of the file; an earlier one is replaced if this program wrote it.
        picture_format: Such as png, svg or pdf; by the suffix of `path` if not given, and png if it has none.

    Returns:
        The path.
    """
    path = Path(path)
    with named_file(path) as temporary:
        temporary.write_bytes(encoded(drawn, picture_format or path.suffix[1:] or "png"))
    return path


def draw_image(panel: Any, image: Any, scale: float, **labels: Any) -> Any:
    """A matrix in a panel, red below 0 and blue above, from `-scale` to `scale`; `labels` as for `Axes.set`."""
    panel.spines[:].set_visible(False)
    panel.set(**labels)
    return panel.imshow(image, cmap="RdBu", vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest")
