"""Tiny models for tests, with nothing left at a value that would hide a mistake (gain 1, bias 0, layers alike)."""

import copy

import torch
from torch import nn

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.configuration_rigpt import ADAPTIVE_SOLVERS, FIXED_STEP_SOLVERS
from rigpt_hf.symmetry import haar, to_local_frames


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
    "squared-distance": {"attention_score": "squared_distance", "position_embedding_type": "learned"},
    "squared-distance-rotary": {"attention_score": "squared_distance", "qk_norm": True},
    "distance": {"attention_score": "distance", "rotary_learned_frequencies": True},
    "multi-head": {"num_key_value_heads": 4},
    "relu2": {"hidden_act": "relu2"},
    "gelu": {"hidden_act": "gelu"},
    "gated": {"gated_mlp": True, "hidden_act": "silu", "intermediate_size": 48},
    "embedding-norm": {"embedding_norm": True, "position_embedding_type": "learned"},
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
    "one-key-value-head": {"num_key_value_heads": 1},
    "head-dim": {"head_dim": 12},
    "relu": {"hidden_act": "relu"},
    "gated-relu": {"gated_mlp": True, "hidden_act": "relu", "intermediate_size": 48},
    "depth-midpoint": {"depth_solver": "midpoint"},
    "gated-relu2": {"gated_mlp": True, "hidden_act": "relu2", "intermediate_size": 48},
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
    return RiGPTConfig(**(defaults | options))


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
