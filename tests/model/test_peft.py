"""PEFT attaches without being told where, trains, and merges."""

import pytest
import torch

from tests.model.agreement import assert_different, assert_same, recompute_activations
from tests.models import tiny_model, tokens


peft = pytest.importorskip("peft")
ADAPTERS = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=4),
    "dora": peft.LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True),
}


DISTANCE = {"embedding_size": 24, "attention_score": "distance"}


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        ("lora", DISTANCE),
        ("dora", {}),
        pytest.param("lora", {}, marks=pytest.mark.full),
        pytest.param("dora", DISTANCE, marks=pytest.mark.full),
    ],
)
def test_an_adapter_attaches_trains_and_merges(adapter, options, tmp_path):
    base = tiny_model(dtype=torch.float32, **options)
    expected = base(tokens(2, 9)).logits.detach()
    model = peft.get_peft_model(base, ADAPTERS[adapter])
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A.default" in name}
    assert adapted == {"q_proj", "v_proj"}
    assert_same(model.eval()(tokens(2, 9)).logits, expected, "with a fresh adapter")

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(25):
        loss = model(tokens(4, 9), labels=tokens(4, 9)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert all(p.grad is None for n, p in model.named_parameters() if "lora" not in n)
    trained = model(tokens(2, 9)).logits.detach()
    assert_different(trained, expected)

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(dtype=torch.float32, **options), tmp_path)
    assert_same(again.eval()(tokens(2, 9)).logits, trained, "loaded")
    merged = model.merge_and_unload()
    assert type(merged).__name__ == "RiGPTForCausalLM"
    assert_same(merged(tokens(2, 9)).logits, trained, "merged")


def test_adapters_train_with_recomputed_activations():
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model(), config).train()
        if recompute:
            recompute_activations(model.base_model.model)
            model.enable_input_require_grads()
        model(tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if "lora_B" in n})
    assert len(gradients[0]) == 6
    for name, gradient in gradients[0].items():
        assert_same(gradients[1][name], gradient, name)
