"""Dropout drops whole vectors, keeps the mean, and is off in evaluation."""

import torch

from rigpt_hf.decoder_rigpt import RiGPTVectorDropout
from tests.model.agreement import assert_different, assert_same
from tests.models import tiny_model, tokens


def test_whole_vectors_are_dropped_and_the_others_scaled():
    torch.manual_seed(0)
    vectors = torch.randn(40, 50, 8)
    dropped = RiGPTVectorDropout(0.25).train()(vectors)
    kept = dropped.abs().sum(-1) > 0
    assert 0.7 < kept.float().mean() < 0.8
    assert_same(dropped[kept], vectors[kept] / 0.75)
    assert (dropped[~kept] == 0).all()
    coordinates = torch.nn.functional.dropout(vectors, 0.25)
    partly = (coordinates == 0).any(-1) & (coordinates != 0).any(-1)
    assert partly.any(), "the check would not see coordinate dropout"


def test_dropout_is_on_in_training_and_off_in_evaluation():
    for name in ("attention_dropout", "residual_dropout", "embedding_dropout"):
        model, plain = tiny_model(**{name: 0.5}), tiny_model()
        assert torch.equal(model(tokens(2, 7)).logits, plain(tokens(2, 7)).logits)
        torch.manual_seed(0)
        assert_different(model.train()(tokens(2, 7)).logits, plain(tokens(2, 7)).logits)


def test_a_dropped_block_leaves_the_token_as_it_was():
    torch.manual_seed(0)
    model = tiny_model(residual_dropout=0.999).train()
    output = model(tokens(2, 7), output_hidden_states=True)
    unchanged = (output.hidden_states[1] == output.hidden_states[0]).all(-1)
    assert unchanged.float().mean() > 0.9
