"""`convert_model`: a stock model in memory becomes a RiGPT."""

from typing import Any

import torch

from ..checkpoints.weights import Weights
from ..modeling_rigpt import RiGPTForCausalLM
from .assemble import assemble
from .families import architecture_of, refuse_adapter
from .plan import make_plan


def convert_model(
    hf_model: Any, *, dtype: torch.dtype | None = None, dropout: str = "vector", qk_gain: str = "vector"
) -> RiGPTForCausalLM:
    """
    The RiGPT that computes the same function as a stock model, exactly up to rounding.

    The algebra runs in float64 and is cast once. The source is not changed and shares no weights with the result.

    Args:
        hf_model (`PreTrainedModel`):
            The source, of one of the classes in `rigpt_hf.conversion.families.ARCHITECTURES`.
        dtype (`torch.dtype`, *optional*):
            Of the result; the source's if not given.
        dropout (`str`, defaults to `"vector"`):
            What becomes of options such as GPT-2's `resid_pdrop` and `embd_pdrop`, which drop single coordinates of
            the stream and have no invariant form. `"vector"`: whole vectors are dropped with the same probability,
            and a warning says so. `"none"`: nothing is dropped. `"refuse"`: a `ValueError` if one is not 0.
        qk_gain (`str`, defaults to `"vector"`):
            What becomes of gains behind the normalisation of queries and keys, as Qwen3 has them: see `qk_norm_gain`
            of [`RiGPTConfig`]. `"vector"`: the same gains, in a preferred basis of the heads. `"metric"`: maps in
            their place, which free the heads' frames for more parameters (1.8 % of Qwen3-0.6B) and time; where a gain
            is 0, or less than a 1000th of the largest of its norm, they stay vectors, and a warning says so.

    Returns:
        `RiGPTForCausalLM`, on the source's device and in its mode (training or evaluation), with its generation
        config.

    Raises:
        ValueError: if the source's class, an option or a weight of it has no exact counterpart; the message names it.
    """
    refuse_adapter(hf_model, "hf_model")
    architecture = architecture_of(hf_model.config, type(hf_model).__name__)
    state_dict = hf_model.state_dict()
    if any(tensor.is_meta for tensor in state_dict.values()):
        raise ValueError(
            "`hf_model` must have its weights in memory, got some on the meta device. Load it without offloading, or "
            "use `convert_checkpoint`, which needs no model in memory."
        )
    buffers = dict(hf_model.named_buffers())
    plan = make_plan(architecture, hf_model.config, Weights(state_dict), dropout, hf_model.device, buffers, qk_gain)
    dtype = dtype or plan.source_dtype
    tensors = {entry.name: entry.make(dtype) for entry in plan.entries}
    # Untouched tables come out as they went in; the result must not share them.
    storages = {tensor.untyped_storage().data_ptr() for tensor in state_dict.values()}
    for name, tensor in tensors.items():
        if tensor.untyped_storage().data_ptr() in storages:
            tensors[name] = tensor.clone()
    return assemble(RiGPTForCausalLM, plan.config, tensors, dtype, hf_model, hf_model.config._attn_implementation)
