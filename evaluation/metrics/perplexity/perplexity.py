"""Perplexity per token, word and byte, with its protocol as arguments."""

from typing import Any

import datasets
import evaluate

from rigpt_hf.evaluation.measures.perplexity import perplexity


DESCRIPTION = """
Perplexity of a causal language model: the exponential of its mean negative log-likelihood, per token of its own, per
word and per byte of the text. Dimensionless; losses in nats, bits_per_byte in bits. Windows, overlap, the beginning-
of-sequence token and the undoing of a corpus's tokenisation are arguments and part of the result, because published
numbers differ by nothing else. Protocol of GPT-2: Radford et al. 2019, section 3.1.
"""

INPUTS = """
predictions: texts, or rows of token ids.
model: a causal language model, or the folder or Hub id of one.
tokenizer: its tokenizer, or the folder or Hub id of one; not needed for token ids, nor where it lies beside the model.
context, stride: tokens of a window, and how far windows lie apart.
bos: whether texts begin with the beginning-of-sequence token.
detokenizer: "none" or "wikitext".
separator: joins all texts into one.
batch_size, padding_side: change nothing but speed.
Returns loss, perplexity, tokens, and for texts word_perplexity, byte_perplexity, bits_per_byte, words, bytes; samples
(nats, tokens, bytes of each text) and protocol.
"""

CITATION = ""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Perplexity(evaluate.Measurement):
    """See `rigpt_hf.evaluation.measures.perplexity`."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        return evaluate.MeasurementInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=[
                datasets.Features({"predictions": datasets.Value("string")}),
                datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
            ],
        )

    def _compute(self, predictions: Any, model: Any, tokenizer: Any = None, **options: Any) -> dict[str, Any]:
        return perplexity(model, predictions, tokenizer, **options)
