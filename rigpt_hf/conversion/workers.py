"""Earlier place of `rigpt_hf.checkpoints.workers`."""

from ..checkpoints.workers import AccelerateWorkers


__all__ = ["AccelerateWorkers"]
