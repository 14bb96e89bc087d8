"""Muon for matrices with AdamW for the rest, and the kinds of models that it trains."""

import pytest
import torch

from rigpt_hf.optim import EquivariantOptimizer
from rigpt_hf.training.muon import muon_param_groups
from tests.models import tiny_model
from tests.training.runs import pretrain


def test_muon_moves_matrices_and_adamw_the_rest():
    model, twin = (tiny_model(dtype=torch.float32, tie_word_embeddings=False) for _ in range(2))
    groups = muon_param_groups(model, lr=0.01, weight_decay=0.1)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    matrices, others, vectors = [], [], []
    for name, parameter in twin.named_parameters():
        table = name in ("model.embed_tokens.weight", "lm_head.weight")
        (vectors if parameter.dim() < 2 else others if table else matrices).append(parameter)
    assert matrices and len(others) == 2 and vectors
    ours = EquivariantOptimizer(groups, 0.01)
    theirs = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": others, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.01,
            betas=(0.9, 0.95),
        ),
    ]
    start = [parameter.detach().clone() for parameter in twin.parameters()]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in (ours, *theirs):
            optimizer.step()
    known = {id(parameter) for parameter in matrices}
    for a, b, before in zip(model.parameters(), twin.parameters(), start, strict=True):
        # Muon iterates in bfloat16, so the two agree to its rounding; AdamW to that of float32.
        tolerance = 0.03 if id(b) in known else 1e-4
        assert (a - b).norm() <= tolerance * (b - before).norm()
        assert (b - before).norm() > 0


@pytest.mark.parametrize("kind", ["stock-gpt2", "rigpt"])
@pytest.mark.by_default(1)
def test_it_trains_and_comes_back(kind, data, tmp_path):
    config = {"n_embd": 16, "n_layer": 2, "n_head": 2}
    optimizer = {"optim": "muon", "learning_rate": 0.01, "max_steps": 20}
    if kind == "rigpt":
        config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    else:
        optimizer["lr_multipliers"] = {"wte": 0.5}
    report = pretrain(data, tmp_path / "run", model_kind=kind, config_overrides=config, **optimizer)
    assert report.losses[-1] < report.losses[0] - 0.3
    more = {"model_kind": kind, "init_from": str(report.model_folder), "config_overrides": {}}
    again = pretrain(data, tmp_path / "more", **more, **optimizer | {"max_steps": 2, "warmup_steps": 1})
    assert again.losses[0] < report.losses[0] - 0.3
