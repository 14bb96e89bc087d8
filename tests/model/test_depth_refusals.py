"""A flow through layers beside adapters, mixed precision, other caches: it works or says why not."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rigpt_hf import RiGPTForCausalLM
from tests.model.agreement import assert_same
from tests.models import tiny_model, tokens


def test_adapters_bring_no_dropout_and_no_products_into_a_flow():
    dropping = get_peft_model(tiny_model(depth_solver="rk4"), LoraConfig(lora_dropout=0.5, r=2)).train()
    with pytest.raises(ValueError, match="`dropout` must be 0 to train with `depth_solver='rk4'`.*got 0.5"):
        dropping(tokens(2, 5))
    assert dropping.eval()(tokens(2, 5)).logits.isfinite().all()
    linear = get_peft_model(tiny_model(depth_solver="rk4", depth_interpolation="linear"), LoraConfig(r=2)).eval()
    with pytest.raises(ValueError, match="`depth_interpolation='linear'` must not meet adapters"):
        linear(tokens(2, 5))


def test_steps_are_not_chosen_in_mixed_precision():
    model = tiny_model(depth_solver="dopri5", dtype=torch.float32)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="`depth_solver='dopri5'` needs at least single .* got torch.bfloat16"),
    ):
        model(tokens(2, 5))


def test_a_model_may_be_loaded_without_its_solver(tmp_path):
    model = tiny_model(depth_solver="rk4", depth_steps=2, depth_adjoint=True)
    model.save_pretrained(tmp_path)
    plain = RiGPTForCausalLM.from_pretrained(tmp_path, depth_solver=None, dtype=torch.float64)
    assert plain.config.depth_steps == 1 and not plain.config.depth_adjoint
    assert_same(plain(tokens(2, 5)).logits, tiny_model()(tokens(2, 5)).logits)
