"""The notebook beside a published model: it loads the model, lets it write, and turns its hidden space."""

import json
from typing import Any

from ..version import package


# What models are asked to go on from where people see them first.
PROMPT = "The capital of France is"
NOTEBOOK = "rigpt.ipynb"
# The cell that says where the model is.
LOADING = 2
ABOUT = """# A GPT with no preferred basis

The hidden space of this model may be turned by any rotation, each head's space too: what it says stays the same."""
LOAD = """REPO = {repo!r}

import rigpt_hf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(REPO).eval()
tokenizer = AutoTokenizer.from_pretrained(REPO)
f"{{model.num_parameters():,}} parameters\""""
WRITE = """prompt = {prompt!r}
inputs = tokenizer(prompt, return_tensors="pt")
tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0])"""
TURNING = (
    """Every frame is turned at random: all matrices become others, and every logit stays the same up to rounding."""
)
TURN = """from rigpt_hf.symmetry import GaugeTransformation

turned = GaugeTransformation.random(model.config, torch.Generator().manual_seed(0))(model)
with torch.no_grad():
    before, after = (each(**inputs).logits for each in (model, turned))
matrices = [each.model.layers[0].self_attn.q_proj.weight for each in (model, turned)]
moved = (matrices[1] - matrices[0]).norm() / matrices[0].norm()
error = (after - before).abs().max() / before.abs().max()
f"The queries of layer 0 moved by {{moved:.2f}} of their norm, the logits by {{error:.1e}} of the largest\""""


def notebook(repo_id: str, *, turns: bool = True) -> bytes:
    """
    A notebook of Jupyter, without outputs.

    Args:
        repo_id (`str`): Where the model is.
        turns (`bool`): Whether its frames can be turned, which is not so once its weights are codes.
    """
    cells = [
        _cell("markdown", ABOUT),
        _cell("code", f'%pip install -q "{package()}"'),
        _cell("code", LOAD.format(repo=repo_id)),
        _cell("code", WRITE.format(prompt=PROMPT)),
    ]
    if turns:
        cells += [_cell("markdown", TURNING), _cell("code", TURN.format())]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}
    return (json.dumps(whole, indent=1) + "\n").encode()


def for_place(content: bytes, repo_id: str) -> bytes:
    """A notebook that loads the model from `repo_id`."""
    whole = json.loads(content)
    whole["cells"][LOADING] = _cell("code", LOAD.format(repo=repo_id))
    return (json.dumps(whole, indent=1) + "\n").encode()


def _cell(kind: str, source: str) -> dict[str, Any]:
    more: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": source.splitlines(keepends=True)} | more
