"""Numbers as people read them."""

import math


# Where a number's unit says nothing about its size, so many digits are shown.
DIGITS = 4


def number(value: float | None, unit: str = "") -> str:
    """A number for a table."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    if value == 0:
        return "0"
    if abs(value) >= 10**DIGITS or abs(value) < 1e-3:
        return f"{value:,.0f}" if abs(value) >= 10**DIGITS else f"{value:.1e}"
    return f"{value:.{max(0, DIGITS - 1 - math.floor(math.log10(abs(value))))}f}"


def plain(value: float) -> str:
    """A number for a tick: what arithmetic leaves of 0.1 + 0.2 is no digit of it."""
    return f"{round(value, 10) or value:,.7g}".replace("-", "−")
