"""Properties of the group over random architectures, frames and dtypes, with what lies outside of it as a control."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.symmetry import GaugeTransformation, MatrixGroup, frames, gauge_error, haar
from rigpt_hf.symmetry.frames import kind_of
from tests.models import tiny_config, tiny_model, tokens
from tests.tolerances import SYMMETRY


# The same cases on every run and every machine.
examples = settings(
    derandomize=True, max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
POSITIONS = {
    "learned": {"position_embedding_type": "learned"},
    "rotary": {},
    "partial": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "resting": {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
    "learned-frequencies": {"rotary_learned_frequencies": True},
    "partial-learned-frequencies": {
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
        "rotary_learned_frequencies": True,
    },
}


@dataclass(frozen=True)
class Case:
    """An architecture, a dtype, a number that seeds all weights and elements, and some of the frames."""

    options: dict
    dtype: torch.dtype
    seed: int
    frames: tuple[str, ...]
    special: bool

    def model(self, dtype: torch.dtype | None = None) -> RiGPTForCausalLM:
        return tiny_model(self.seed, dtype or self.dtype, **self.options)

    def transformation(self, number: int = 0, special: bool | None = None) -> GaugeTransformation:
        generator = torch.Generator().manual_seed(self.seed + 1000 * number)
        special = self.special if special is None else special
        return GaugeTransformation.random(tiny_config(**self.options), generator, self.frames, special=special)

    def inputs(self) -> torch.Tensor:
        return tokens(2, 7, seed=self.seed)

    @property
    def tolerance(self) -> float:
        return SYMMETRY[self.dtype]


@st.composite
def architectures(draw) -> dict:
    """Options of `tiny_config` in any combination that is allowed."""
    embedding_size = draw(st.none() | st.integers(3, 22))
    positions = draw(st.sampled_from(sorted(POSITIONS)))
    halved = "rope_parameters" in POSITIONS[positions]
    heads, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "hidden_size": draw(st.integers(4, 20)),
        "embedding_size": embedding_size,
        "num_key_value_heads": heads,
        "num_attention_heads": heads * repeats,
        "head_dim": draw(st.sampled_from([4, 8] if halved else [2, 4, 6])),
        "intermediate_size": draw(st.integers(3, 15)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "attention_output_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "output_bias": embedding_size is not None and draw(st.booleans()),
        "attention_score": draw(st.sampled_from(["dot", "squared_distance", "distance"])),
        "qk_norm": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["gelu", "relu", "relu2", "silu"])),
        "gated_mlp": draw(st.booleans()),
    } | POSITIONS[positions]


@st.composite
def cases(draw, dtypes: tuple[torch.dtype, ...] = tuple(SYMMETRY), special: bool | None = None) -> Case:
    options = draw(architectures())
    known = sorted(frames(tiny_config(**options)))
    return Case(
        options=options,
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 999)),
        frames=tuple(draw(st.lists(st.sampled_from(known), min_size=1, unique=True) | st.just(known))),
        special=draw(st.booleans()) if special is None else special,
    )


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """`max |a - b|` relative to the largest entry of `b`."""
    return ((a - b).abs().max() / b.abs().max()).item()


def apart(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """The largest difference between two models' parameters, each relative to its size."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(difference(x, y) for x, y in pairs)


def moves_nothing(g: GaugeTransformation) -> bool:
    """Whether a draw is the identity: permutations of one thing or with `special`, translations of nothing."""
    return all(
        torch.equal(element, g.frames[key].group.identity(g.frames[key].copies)) for key, element in g.elements.items()
    )
