"""How tensor and pipeline parallelism may cut a RiGPT, by its configuration."""

from typing import Any

from .layers_rigpt import is_sparse
from .norms_rigpt import gain_vectors
from .scores_rigpt import SCORES


def tensor_parallel_plan(config: Any) -> dict[str, str]:
    """How tensor parallelism shards the base model: by heads and by neurons; only what this config has."""
    plan: dict[str, str] = {}
    sparse = [is_sparse(config, layer) for layer in range(config.num_hidden_layers)]
    mlps = ["mlp"] if not all(sparse) or not sparse else []
    if any(sparse) and config.shared_expert_intermediate_size is not None:
        mlps.append("mlp.shared_expert")
    # Every process has all experts: which of their neurons are silent is known of the whole map alone.
    for mlp in mlps:
        plan |= {f"layers.*.{mlp}.up_proj": "colwise", f"layers.*.{mlp}.down_proj": "rowwise"}
        if config.gated_mlp:
            plan[f"layers.*.{mlp}.gate_proj"] = "colwise"
    maps = [f"layers.*.self_attn.{of}_proj" for of in "qkv"]
    # A length of all heads is known where all of them are; and what all share and what each has is not cut alike.
    if config.qk_norm_over == "all" or (config.qk_norm_bias and gain_vectors(config) == "shared"):
        plan["layers.*.self_attn.o_proj"] = "rowwise_split_input"
        return plan | dict.fromkeys(maps, "colwise_gather_output")
    plan |= dict.fromkeys(maps, "colwise") | {"layers.*.self_attn.o_proj": "rowwise"}
    if SCORES[config.attention_score].weighted:
        plan["layers.*.self_attn.distance_weight"] = "colwise"
    if config.position_embedding_type == "alibi":
        plan["layers.*.self_attn.alibi.weight"] = "colwise"
    if config.attention_sinks:
        plan["layers.*.self_attn.sinks"] = "colwise"
    for norm in ("q_norm", "k_norm"):
        if gain_vectors(config) == "shared":  # by the heads of all processes
            plan[f"layers.*.self_attn.{norm}"] = "replicated_with_grad_allreduce"
        elif config.qk_norm_gain is not None:
            plan[f"layers.*.self_attn.{norm}.weight"] = "colwise"
        if config.qk_norm_bias:
            plan[f"layers.*.self_attn.{norm}.bias"] = "colwise"
    if config.value_embedding_period is not None:
        plan["layers.*.self_attn.value_embedding"] = "embedding_colwise"
        plan["layers.*.self_attn.value_gate"] = "colwise"
    if config.rotary_learned_frequencies:
        plan["layers.*.self_attn.rotary_frequencies"] = "colwise"
    return plan


def pipeline_parallel_plan(config: Any) -> dict[str, tuple[list[str], list[str]]] | None:
    """
    The stages that pipeline parallelism may cut between, with their inputs and outputs; none where later layers
    read the beginning again, or need the weights of the next or of the whole model.
    """
    if config.value_embedding_period is not None or config.depth_interpolation == "linear" or config.post_norm:
        return None
    plan = {"embed_tokens": (["input_ids"], ["inputs_embeds"])}
    if config.embedding_size is not None:
        plan["project_in"] = (["inputs_embeds"], ["hidden_states"])
    if config.position_embedding_type == "learned":
        plan["embed_positions"] = (["position_ids"], ["position_vectors"])
    if config.embedding_norm_map:
        plan["embedding_map"] = (["hidden_states"], ["hidden_states"])
    plan["layers"] = (["hidden_states", "attention_mask"], ["hidden_states"])
    if config.local_frames:
        plan["transport"] = (["hidden_states"], ["hidden_states"])
    plan["norm"] = (["hidden_states"], ["hidden_states"])
    if config.embedding_size is not None:
        plan["project_out"] = (["hidden_states"], ["hidden_states"])
    return plan
