"""Earlier place of `rigpt_hf.checkpoints.companions`."""

from ..checkpoints.companions import TEMPLATE_FILES, TOKENIZER_FILES, VOCABULARY_FILES


__all__ = ["TEMPLATE_FILES", "TOKENIZER_FILES", "VOCABULARY_FILES"]
