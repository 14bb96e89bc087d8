"""Tiny models for tests, with nothing left at a value that would hide a mistake (gain 1, bias 0, layers alike)."""

import copy
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.configuration_rigpt import ADAPTIVE_SOLVERS, FIXED_STEP_SOLVERS
from rigpt_hf.layers_rigpt import FULL, SLIDING
from rigpt_hf.symmetry import GaugeTransformation, haar, to_local_frames


LISTS = ("layer_types", "no_rope_layers")
TOGETHER = {"qk_norm": True, "qk_norm_over": "all"}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "gated_mlp": True,
    "hidden_act": "silu",
}
SHARED_EXPERT = EXPERTS | {"norm_topk_prob": True, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]}
GAIN_VECTOR, GAIN_PER_HEAD, GAIN_METRIC = (
    {"qk_norm": True, "qk_norm_gain": form} for form in ("vector", "vector_per_head", "metric")
)
NORM_BIAS = {"qk_norm": True, "qk_norm_bias": True}
CLAMPED = {"gated_mlp": True, "swiglu_limit": 0.6, "swiglu_alpha": 1.7}
SINKS = {"attention_sinks": True}
ALIBI = {"position_embedding_type": "alibi"}
MAPPED = {"embedding_norm": True, "embedding_norm_map": True}
PARTIAL = {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}

# Every option of the config in combinations that are allowed together; keys are the ids of tests.
OPTIONS: dict[str, dict] = {
    "learned": {"position_embedding_type": "learned"},
    "learned-projected": {"position_embedding_type": "learned", "embedding_size": 24, "output_bias": True},
    "untied-projected": {"embedding_size": 40, "output_bias": True, "tie_word_embeddings": False},
    "untied": {"tie_word_embeddings": False},
    "rotary": {},
    "rotary-partial": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "rotary-learned": {"rotary_learned_frequencies": True},
    "rotary-yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "qk-norm": {"qk_norm": True},
    "gain-vector": GAIN_VECTOR,
    "gain-metric": GAIN_METRIC,
    "gain-per-head": GAIN_PER_HEAD,
    "norm-bias": NORM_BIAS,
    "together": TOGETHER,
    "together-vector": TOGETHER | GAIN_VECTOR,
    "together-metric": TOGETHER | GAIN_METRIC,
    "squared-distance": {"attention_score": "squared_distance", "position_embedding_type": "learned"},
    "squared-distance-rotary": {"attention_score": "squared_distance", "qk_norm": True},
    "distance": {"attention_score": "distance", "rotary_learned_frequencies": True},
    "multi-head": {"num_key_value_heads": 4},
    "relu2": {"hidden_act": "relu2"},
    "gelu": {"hidden_act": "gelu"},
    "gated": {"gated_mlp": True, "hidden_act": "silu", "intermediate_size": 48},
    "embedding-norm": {"embedding_norm": True, "position_embedding_type": "learned"},
    "embedding-map": MAPPED,
    "embedding-map-untied": MAPPED | {"tie_word_embeddings": False, "position_embedding_type": "learned"},
    "alibi": ALIBI,
    "alibi-window": ALIBI | {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 5, "num_key_value_heads": 4},
    "alibi-bloom": ALIBI | MAPPED | {"embedding_size": 24, "output_bias": True, "num_key_value_heads": 4},
    "value-embeddings": {"value_embedding_period": 2},
    "local-frames": {"local_frames": True},
    "local-frames-projected": {"local_frames": True, "embedding_size": 24, "position_embedding_type": "learned"},
    "recipe": {
        "embedding_norm": True,
        "value_embedding_period": 1,
        "tie_word_embeddings": False,
        "qk_norm": True,
        "hidden_act": "relu2",
    },
    "depth": {"depth_solver": "euler"},
    "sliding": {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 5},
    "unturned": {"no_rope_layers": [1, 0, 1]},
    "rope-by-type": {
        "layer_types": [FULL, SLIDING, SLIDING],
        "sliding_window": 6,
        "no_rope_layers": [1, 1, 0],
        "rope_parameters": {
            FULL: {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0},
            SLIDING: {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        },
    },
    "post-norm": {"post_norm": True},
    "post-norm-alone": {"post_norm": True, "pre_norm": False},
    "soft-caps": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    "experts": EXPERTS,
    "experts-shared": SHARED_EXPERT,
    "experts-clamped": EXPERTS | CLAMPED | SINKS | {"norm_topk_prob": True},
    "clamped": CLAMPED | {"hidden_act": "silu"},
    "sinks": SINKS,
    "sinks-learned": SINKS | {"position_embedding_type": "learned", "num_key_value_heads": 4},
    "parallel": {"use_parallel_residual": True},
    "no-biases": {"attention_bias": False, "attention_output_bias": False, "mlp_bias": False},
}

# More of them for what depends on nothing but the table of frames.
SYMMETRIES: dict[str, dict] = OPTIONS | {
    "learned-untied": {"position_embedding_type": "learned", "tie_word_embeddings": False},
    "learned-untied-projected": {
        "position_embedding_type": "learned",
        "tie_word_embeddings": False,
        "embedding_size": 24,
        "output_bias": True,
    },
    "rotary-zero-frequencies": {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
    "squared-distance-partial": {
        "attention_score": "squared_distance",
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
    },
    "squared-distance-learned-frequencies": {
        "attention_score": "squared_distance",
        "rotary_learned_frequencies": True,
    },
    "distance-learned": {"attention_score": "distance", "position_embedding_type": "learned"},
    "qk-norm-learned": {"qk_norm": True, "position_embedding_type": "learned"},
    "gain-vector-learned": GAIN_VECTOR | {"position_embedding_type": "learned"},
    "gain-vector-partial": GAIN_VECTOR | PARTIAL,
    "gain-vector-frequencies": GAIN_VECTOR | {"rotary_learned_frequencies": True},
    "gain-vector-squared": GAIN_VECTOR | PARTIAL | {"attention_score": "squared_distance"},
    "gain-vector-distance": GAIN_VECTOR | {"attention_score": "distance"},
    "together-vector-learned": TOGETHER | GAIN_VECTOR | {"position_embedding_type": "learned"},
    "together-vector-squared": TOGETHER | GAIN_VECTOR | PARTIAL | {"attention_score": "squared_distance"},
    "together-vector-distance": TOGETHER | GAIN_VECTOR | {"attention_score": "distance"},
    "together-metric-partial": TOGETHER | GAIN_METRIC | PARTIAL,
    "gain-per-head-learned": GAIN_PER_HEAD | {"position_embedding_type": "learned"},
    "gain-per-head-squared": GAIN_PER_HEAD | PARTIAL | {"attention_score": "squared_distance"},
    "norm-bias-partial": NORM_BIAS | PARTIAL | {"attention_bias": False},
    "norm-bias-frequencies": NORM_BIAS | GAIN_METRIC | {"rotary_learned_frequencies": True},
    "norm-bias-vector": NORM_BIAS | GAIN_VECTOR | PARTIAL,
    "norm-bias-squared": NORM_BIAS | GAIN_PER_HEAD | PARTIAL | {"attention_score": "squared_distance"},
    "norm-bias-distance": NORM_BIAS | GAIN_VECTOR | {"attention_score": "distance"},
    "norm-bias-metric": NORM_BIAS
    | GAIN_METRIC
    | {"position_embedding_type": "learned", "attention_score": "squared_distance"},
    "norm-bias-together": NORM_BIAS | TOGETHER | GAIN_VECTOR | PARTIAL,
    "gain-metric-learned": GAIN_METRIC | {"position_embedding_type": "learned"},
    "gain-metric-partial": GAIN_METRIC | PARTIAL,
    "gain-metric-frequencies": GAIN_METRIC | {"rotary_learned_frequencies": True},
    "gain-metric-squared": GAIN_METRIC | PARTIAL | {"attention_score": "squared_distance"},
    "gain-metric-distance": GAIN_METRIC | {"attention_score": "distance"},
    "alibi-squared": ALIBI | {"attention_score": "squared_distance", "depth_solver": "midpoint"},
    "alibi-distance": ALIBI | GAIN_VECTOR | {"attention_score": "distance", "attn_logit_softcapping": 2.0},
    "alibi-between": ALIBI | {"depth_solver": "euler", "depth_interpolation": "linear", "num_key_value_heads": 4},
    "one-key-value-head": {"num_key_value_heads": 1},
    "head-dim": {"head_dim": 12},
    "relu": {"hidden_act": "relu"},
    "gated-relu": {"gated_mlp": True, "hidden_act": "relu", "intermediate_size": 48},
    "depth-midpoint": {"depth_solver": "midpoint"},
    "experts-relu2": EXPERTS | {"gated_mlp": False, "hidden_act": "relu2", "norm_topk_prob": True, "mlp_bias": False},
    "experts-local": EXPERTS | {"local_frames": True, "num_experts_per_tok": 1},
    "experts-parallel": EXPERTS | {"norm_topk_prob": True, "use_parallel_residual": True},
    "experts-no-biases": EXPERTS | {"mlp_bias": False},
    "sinks-squared": SINKS | {"attention_score": "squared_distance", "position_embedding_type": "learned"},
    "sinks-distance": SINKS | ALIBI | {"attention_score": "distance"},
    "gated-relu2": {"gated_mlp": True, "hidden_act": "relu2", "intermediate_size": 48},
    "parallel-local-projected": {
        "use_parallel_residual": True,
        "local_frames": True,
        "embedding_size": 24,
        "position_embedding_type": "learned",
    },
    "parallel-mlp-bias": {"use_parallel_residual": True, "attention_output_bias": False},
    "parallel-no-mlp-bias": {"use_parallel_residual": True, "mlp_bias": False},
}

# Every way to read depth as time; apart from interpolation, the table of frames does not know them.
FLOWS: dict[str, dict] = {
    **{solver: {"depth_solver": solver} for solver in (*FIXED_STEP_SOLVERS, *ADAPTIVE_SOLVERS)},
    "steps": {"depth_solver": "midpoint", "depth_steps": 3},
    "linear": {"depth_solver": "rk4", "depth_interpolation": "linear"},
    "linear-dopri5": {"depth_solver": "dopri5", "depth_interpolation": "linear"},
    "adjoint": {"depth_solver": "rk4", "depth_steps": 2, "depth_adjoint": True},
    "adjoint-dopri5": {"depth_solver": "dopri5", "depth_adjoint": True},
    "adjoint-linear-bosh3": {"depth_solver": "bosh3", "depth_interpolation": "linear", "depth_adjoint": True},
}

# The options that change the function, as axes that are independent but for what the config refuses together.
AXES: dict[str, dict[str, dict]] = {
    "positions": {
        "learned": {"position_embedding_type": "learned"},
        "rotary": {},
        "partial": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "moving": {"rotary_learned_frequencies": True},
    },
    "score": {
        "dot": {},
        "squared": {"attention_score": "squared_distance"},
        "distance": {"attention_score": "distance"},
    },
    "norm": {
        "plain": {},
        "gain": GAIN_VECTOR,
        "each": GAIN_PER_HEAD,
        "metric": GAIN_METRIC,
    },
    "lengths": {"one": {}, "all": TOGETHER},
    "ends": {"stream": {}, "narrow": {"embedding_size": 24, "output_bias": True}, "wide": {"embedding_size": 40}},
    "head": {"tied": {}, "untied": {"tie_word_embeddings": False}},
    "heads": {
        "grouped": {},
        "multi": {"num_key_value_heads": 4},
        "single": {"num_key_value_heads": 1, "head_dim": 12},
    },
    "mlp": {
        "gelu": {},
        "relu2": {"hidden_act": "relu2"},
        "gated": {"gated_mlp": True, "hidden_act": "silu", "intermediate_size": 48},
        "moe": SHARED_EXPERT,
    },
    "biases": {
        "all": {},
        "none": {"attention_bias": False, "attention_output_bias": False, "mlp_bias": False},
        "last": NORM_BIAS,
    },
    "start": {"raw": {}, "normed": {"embedding_norm": True}, "mapped": MAPPED},
    "norms": {"before": {}, "both": {"post_norm": True}, "after": {"post_norm": True, "pre_norm": False}},
    "caps": {"none": {}, "capped": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}},
    "sight": {
        "full": {},
        "past": {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 5},
        "nope": {"no_rope_layers": [1, 0, 1]},
    },
    "layers": {"alike": {}, "values": {"value_embedding_period": 2}, "local": {"local_frames": True}},
    "depth": {
        "layered": {},
        "steps": {"depth_solver": "euler", "depth_steps": 2},
        "between": {"depth_solver": "midpoint", "depth_interpolation": "linear"},
    },
    "eps": {"small": {}, "large": {"rms_norm_eps": 0.05}},
    "residual": {"serial": {}, "side": {"use_parallel_residual": True}},
    "sinks": {"keys": {}, "sink": SINKS},
    "neurons": {"free": {}, "cut": CLAMPED},
}

# A pairwise covering array: any two values of any two axes, unless they refuse each other, meet in one of the rows.
_ROWS = """
learned squared gain all wide untied multi relu2 last normed both none full alike between small serial keys free
rotary squared plain all wide untied grouped moe none normed before capped full local layered small serial keys free
learned squared each one narrow untied grouped gated last raw before capped past local layered small side sink cut
rotary dot gain one stream untied multi gated last mapped after none past values steps large side sink free
rotary dot each one stream tied single gelu all normed both none full alike between large serial keys free
partial squared gain all narrow untied single gelu last mapped before capped nope local steps large serial sink cut
learned dot metric one wide tied grouped gelu none mapped after none past values layered small serial keys free
moving squared metric all stream tied single gated all normed after capped nope values steps small serial keys cut
moving distance each one wide untied grouped moe all mapped both capped nope alike layered large side sink free
partial distance metric one wide untied grouped gated none mapped before capped full alike between small side sink cut
partial dot each one narrow tied multi relu2 none normed after capped full values steps small side keys free
partial dot plain all wide tied single gated none raw both none nope alike steps large side keys free
learned dot metric all narrow tied single moe last raw both none past values layered large serial sink cut
moving distance plain one narrow untied multi gelu last raw after capped full alike between small side sink cut
moving dot gain all stream tied grouped relu2 none raw before none past local steps small serial sink cut
rotary distance metric one narrow tied multi relu2 all raw before capped nope local layered large side keys cut
learned distance plain all stream tied single relu2 all mapped before capped past values steps large serial keys free
partial distance gain all stream untied multi moe all normed after none past alike layered small serial sink cut
"""


def _merged(row: list[str]) -> dict:
    merged: dict = {}
    for values, value in zip(AXES.values(), row, strict=True):
        merged |= values[value]
    return merged


COVER: dict[str, dict] = {"-".join(line.split()): _merged(line.split()) for line in _ROWS.split("\n") if line}
ALL: dict[str, dict] = SYMMETRIES | FLOWS | COVER


def _each() -> dict[str, dict]:
    """Rows of the cover, each time the one with the most values that none before it has, until there is no more."""
    rows, kept, met = {name: set(enumerate(name.split("-"))) for name in COVER}, [], set()
    while best := max(rows, key=lambda name: len(rows[name] - met)) if set().union(*rows.values()) - met else None:
        kept.append(best)
        met |= rows[best]
    return {name: COVER[name] for name in kept}


# Every value of every axis, for what does not depend on how options meet.
EACH = _each()


def over(quick: Iterable[str] = COVER, full: Iterable[str] = OPTIONS) -> pytest.MarkDecorator:
    """
    A test for each `option`, a key of `ALL`.

    Args:
        quick: Always; by default a cover of all pairs of options. `EACH` has every option, not every pair.
        full: Besides, where tests marked `full` run: `make test-all`.
    """
    # By name, which is too long for what pytest does by itself.
    always = [pytest.param(name, id=name) for name in quick]
    rest = [pytest.param(name, id=name, marks=pytest.mark.full) for name in full if name not in quick]
    return pytest.mark.parametrize("option", [*always, *rest])


def backends(options: dict) -> tuple[str, ...]:
    """The attention backends that can be compared without a GPU for these options."""
    plain = options.get("attention_score") != "distance" and not {"attn_logit_softcapping", *SINKS} & set(options)
    return ("eager", "sdpa") if plain else ("eager",)


# Rounding is the subject of few tests; the others look at it where tests marked `full` run.
DTYPES = [torch.float64, pytest.param(torch.float32, marks=pytest.mark.full)]


class Pair(NamedTuple):
    """A model and what a random element of its whole gauge group makes of it."""

    model: RiGPTForCausalLM
    turned: RiGPTForCausalLM
    g: GaugeTransformation


def turned_pair(option: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Pair:
    """The tiny model of `ALL[option]` and an equal one, turned in every frame."""
    model = tiny_model(dtype=dtype, **ALL[option])
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(seed + 3000), "all")
    return Pair(model, g(model), g)


def contents(model: nn.Module) -> tuple:
    """The parts of a model that a test must leave alone, as others look at it: weights, gradients, mode, config."""
    weights = tuple(
        (name, zlib.crc32(tensor.detach().numpy().tobytes()), tensor.requires_grad, tensor.grad is None)
        for name, tensor in model.named_parameters()
    )
    return weights, model.training, model.config._attn_implementation, str(model.config.to_dict())


def tiny_config(**options) -> RiGPTConfig:
    """A config of 3 layers and 32 dimensions with grouped queries and all biases, changed by `options`."""
    defaults = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    merged = defaults | options
    # Lists of layers are those of three, as many as a test wants of them.
    merged |= {name: merged[name][: merged["num_hidden_layers"]] for name in LISTS if merged.get(name)}
    if layers := merged.get("mlp_only_layers"):
        merged["mlp_only_layers"] = [layer for layer in layers if layer < merged["num_hidden_layers"]]
    return RiGPTConfig(**merged)


def learned(model: nn.Module) -> list[nn.Parameter]:
    """All parameters but what is frozen: the orthogonal maps between local frames."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def randomise_(model: nn.Module, seed: int, scale: float = 0.2) -> nn.Module:
    """Add Gaussian noise to every parameter that is learned, in place, so that none keeps its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in learned(model):
        parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
    return model


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> RiGPTForCausalLM:
    """A randomised model of `tiny_config(**options)` in evaluation mode."""
    torch.manual_seed(seed)
    model = randomise_(RiGPTForCausalLM(tiny_config(**options)).to(torch.float64), seed)
    if model.config.local_frames:
        generator = torch.Generator().manual_seed(seed + 1000)
        layers, size = model.config.num_hidden_layers, model.config.hidden_size
        model = to_local_frames(model, torch.stack([haar(size, generator) for _ in range(layers)]))
    return model.to(dtype).eval()


@torch.no_grad()
def noisy(model: nn.Module, size: float, seed: int = 0) -> nn.Module:
    """A copy with Gaussian noise on every parameter, `size` relative to its root mean square, as after fine-tuning."""
    # Not the numbers that `randomise_` added: noise along the weights would be no more than a factor.
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed + 2000)
    for parameter in learned(model):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter += size * parameter.square().mean().sqrt() * noise.to(parameter.dtype)
    return model


def tokens(*shape: int, vocab_size: int = 61, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them padding."""
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
