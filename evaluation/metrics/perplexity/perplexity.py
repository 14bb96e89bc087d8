"""Perplexity per token, word and byte, with its protocol as arguments."""

from rigpt_hf.evaluation.measures.perplexity import perplexity
from rigpt_hf.evaluation.metrics import base


DESCRIPTION = """
Perplexity of a causal language model: the exponential of its mean negative log-likelihood, per token of its own, per
word and per byte of the text. Dimensionless; losses in nats, bits_per_byte in bits. Windows, overlap, the beginning-
of-sequence token and the undoing of a corpus's tokenisation are arguments and part of the result, because published
numbers differ by nothing else. Protocol of GPT-2: Radford et al. 2019, section 3.1.
"""
INPUTS = """
context, stride: tokens of a window, and how far windows lie apart.
bos: whether texts begin with the beginning-of-sequence token.
detokenizer: "none" or "wikitext".
separator: joins all texts into one.
batch_size, padding_side: change nothing but speed.
Returns loss, perplexity, tokens, and for texts word_perplexity, byte_perplexity, bits_per_byte, words, bytes; samples
(nats, tokens, bytes of each text) and protocol.
"""


class Perplexity(base.TextMeasurement):
    """See `rigpt_hf.evaluation.measures.perplexity`."""

    description_of, inputs_of, measure = DESCRIPTION, INPUTS, staticmethod(perplexity)
