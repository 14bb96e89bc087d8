"""Earlier place of `rigpt_hf.checkpoints.folder`."""

from ..checkpoints.folder import check_output, publish, temporary_sibling


__all__ = ["check_output", "publish", "temporary_sibling"]
