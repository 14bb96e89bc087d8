"""
All pictures of the package but those of an evaluation, in one style.

`style` has the colours, the panels and the saving. Every other module draws one subject and returns a Matplotlib
`Figure`, which [`save`] writes whole or not at all. Matplotlib is imported when a picture is drawn, and draws without
a display.
"""

from .style import COLOURS, encoded, figure, picture, save


__all__ = ["COLOURS", "encoded", "figure", "picture", "save"]
