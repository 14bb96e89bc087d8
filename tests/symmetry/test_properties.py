"""Properties of the group over random architectures, frames and dtypes, with what lies outside of it as a control."""

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.symmetry import GaugeTransformation, MatrixGroup, gauge_error, haar, table_of
from tests.models import tiny_config, tiny_model, tokens
from tests.tolerances import SYMMETRY


# The same cases on every run and every machine.
examples = settings(
    derandomize=True, max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
POSITIONS = {
    "learned": {"position_embedding_type": "learned"},
    "rotary": {},
    "partial": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "resting": {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
    "alibi": {"position_embedding_type": "alibi"},
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
    # From three heads on, a permutation need not be its own inverse.
    heads, repeats = draw(st.sampled_from([1, 2, 3, 4, 5])), draw(st.integers(1, 3))
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
        "use_parallel_residual": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["gelu", "relu", "relu2", "silu"])),
        "gated_mlp": draw(st.booleans()),
    } | copy.deepcopy(POSITIONS[positions])  # configs fill in what rotary parameters leave out


@st.composite
def cases(draw, dtypes: tuple[torch.dtype, ...] = tuple(SYMMETRY), special: bool | None = None) -> Case:
    options = draw(architectures())
    known = sorted(table_of(tiny_config(**options)).kinds)
    return Case(
        options=options,
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 999)),
        frames=tuple(draw(st.lists(st.sampled_from(known), min_size=1, unique=True) | st.just(known))),
        special=draw(st.booleans()) if special is None else special,
    )


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """`max |a - b|` relative to the largest entry of `b`."""
    return ((a - b).abs().max() / b.abs().max()).item()


def apart(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """The largest difference of two models' parameters, each relative to its largest entry."""
    return max(relative(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def does_nothing(g: GaugeTransformation) -> bool:
    """Whether a draw is the identity, as permutations of one thing are and, with `special`, all permutations."""
    return all(torch.equal(element, frame.group.identity(frame.copies)) for _, frame, element in g.items())


def moved(case: Case, g: GaugeTransformation) -> bool:
    """Whether `g` changes parameters visibly; fails if they stay where they should not."""
    model = case.model()
    visibly = apart(g(model), model) > 0.01
    assert visibly != does_nothing(g), "parameters did not move"
    return visibly


@examples
@given(cases())
def test_logits_and_loss_are_invariant_and_hidden_states_turn_along(case):
    model, g, inputs = case.model(), case.transformation(), case.inputs()
    before, after = (m(inputs, labels=inputs, output_hidden_states=True) for m in (model, g(model)))
    assert relative(after.logits, before.logits) <= case.tolerance
    assert relative(after.loss, before.loss) <= case.tolerance
    assert moved(case, g) or case.special or len(case.frames) < 3
    # The loss depends on the logits, the logits on the input.
    assert relative(model(inputs.flip(1), labels=inputs).loss, before.loss) > 1e-4
    assert len(before.hidden_states) == case.options["num_hidden_layers"] + 1
    size = case.options["hidden_size"]
    rotation = g.elements.get("stream", torch.eye(size, dtype=torch.float64)[None])[0].to(case.dtype)
    for x, y in zip(before.hidden_states, after.hidden_states, strict=True):
        assert relative(y, x @ rotation.T) <= case.tolerance
        assert (relative(y, x) > 0.01) == ("stream" in case.frames)


@examples
@given(cases(special=False))
def test_products_and_inverses_act_as_they_should(case):
    model, g, h = case.model(), case.transformation(), case.transformation(1)
    turned, identity = g(model), GaugeTransformation.identity(model.config)
    in_turn = h(turned)
    assert apart((h @ g)(model), in_turn) <= case.tolerance
    assert apart(((g @ h) @ g)(model), (g @ (h @ g))(model)) <= case.tolerance
    assert apart(g.inverse()(turned), model) <= case.tolerance
    assert apart(g(g.inverse()(model)), model) <= case.tolerance
    assert apart((h @ g).inverse()(in_turn), model) <= case.tolerance
    for neutral in (g @ identity, identity @ g):
        assert apart(neutral(model), turned) == 0
    moved(case, g)
    if "stream" in case.frames:
        assert apart((g @ h)(model), in_turn) > 0.01, "the order of factors does not matter"


@examples
@given(cases(special=True), st.floats(-0.5, 1.5))
@pytest.mark.full
def test_all_of_the_path_is_in_the_group(case, t):
    model, g = case.model(), case.transformation()
    assert gauge_error(model, g.at(t), case.inputs()) <= case.tolerance
    assert apart(g.at(0.0)(model), model) <= case.tolerance
    assert apart(g.at(1.0)(model), g(model)) <= case.tolerance
    assert moved(case, g.at(0.5)) == moved(case, g)


@examples
@given(case=cases())
@pytest.mark.full
def test_state_dicts_transform_like_models_and_transformations_survive_saving(tmp_path_factory, case):
    model, g = case.model(), case.transformation()
    turned, before = g(model), model.state_dict()
    expected, after = turned.state_dict(), g.state_dict(before)
    assert after.keys() == expected.keys()
    for name, tensor in after.items():
        assert tensor.dtype == case.dtype
        assert torch.equal(tensor, expected[name]), name
    tied = case.options["tie_word_embeddings"]
    assert (turned.lm_head.weight is turned.model.embed_tokens.weight) == tied
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"]) == tied
    in_place = case.model()
    assert g.apply_(in_place) is in_place and apart(in_place, turned) == 0

    path = tmp_path_factory.mktemp("gauge") / "g.safetensors"
    g.save(path)
    loaded = GaugeTransformation.load(path, tiny_config(**case.options))
    assert loaded.elements.keys() == g.elements.keys() != set()
    for key, element in g.elements.items():
        assert torch.equal(loaded.elements[key], element) and loaded.elements[key].dtype == element.dtype
        assert torch.equal(case.transformation().elements[key], element), "a draw repeats with its generator"
    # To rounding, as the elements may lie in memory in another order of axes.
    assert apart(loaded(model), turned) <= case.tolerance
    moved(case, g)


def outside(group: MatrixGroup, copies: int, seed: int) -> torch.Tensor:
    """Invertible matrices `[copies, n, n]` that stretch, shear and heed no plane."""
    generator = torch.Generator().manual_seed(seed)
    stretches = torch.logspace(-0.3, 0.3, group.n, dtype=torch.float64)
    return torch.stack([(haar(group.n, generator) * stretches) @ haar(group.n, generator) for _ in range(copies)])


@examples
@given(cases(dtypes=(torch.float64,)))
def test_what_is_outside_of_the_group_is_detected(case):
    model, g, inputs = case.model(), case.transformation(), case.inputs()
    assert gauge_error(model, g, inputs) <= case.tolerance
    checked = []
    for key, frame in g.table.frames.items():
        group = frame.group
        if not isinstance(group, MatrixGroup) or (group.stretch == "free" and not group.planes):
            continue
        wrong = GaugeTransformation(model.config, {key: outside(group, frame.copies, case.seed)})
        assert gauge_error(model, g @ wrong, inputs) > 1e-4, key
        checked.append(key.kind)
    assert "stream" in checked
