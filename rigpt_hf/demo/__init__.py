"""`rigpt demo`: a stock GPT-2 becomes a RiGPT, is proven equal, rotated, and saved, with a report to look at."""

from .run import DemoOptions, run_demo


__all__ = ["DemoOptions", "run_demo"]
