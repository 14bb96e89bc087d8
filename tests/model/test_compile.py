"""`torch.compile` without graph breaks and `torch.export`, in inference and training."""

import pytest
import torch
from transformers import StaticCache

from tests.model.agreement import assert_same, assert_same_gradients, recompute_activations
from tests.models import tiny_model, tokens


KINDS = {
    "squared-distance-learned-projections": {
        "attention_score": "squared_distance",
        "position_embedding_type": "learned",
        "embedding_size": 24,
        "output_bias": True,
        "gated_mlp": True,
        "hidden_act": "silu",
    },
    "distance-frequencies-untied": {
        "attention_score": "distance",
        "rotary_learned_frequencies": True,
        "tie_word_embeddings": False,
    },
}
MORE = {
    "dot-learned": {"position_embedding_type": "learned", "attention_bias": True},
    "squared-distance-rotary": {"attention_score": "squared_distance", "qk_norm": True, "embedding_norm": True},
    "dot-rotary": {"qk_norm": True, "value_embedding_period": 1},
    "dot-frequencies": {"rotary_learned_frequencies": True},
    "squared-distance-learned": {"attention_score": "squared_distance", "position_embedding_type": "learned"},
    "distance-learned": {"attention_score": "distance", "position_embedding_type": "learned"},
}
FIRST, SECOND = KINDS


def over_kinds(default: str):
    """One kind by default, as a graph costs seconds; all in the long form."""
    kinds = (KINDS | MORE).items()
    return pytest.mark.parametrize(
        "options", [pytest.param(kind, marks=[pytest.mark.full] * (name != default), id=name) for name, kind in kinds]
    )


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@over_kinds(FIRST)
def test_compiled_training_step_without_graph_breaks(options):
    options = options | {"num_hidden_layers": 2}
    expected, model = (tiny_model(**options).train() for _ in range(2))
    mask = torch.ones_like(tokens(2, 9))
    mask[0, 5:] = 0
    inputs = {
        "input_ids": tokens(2, 9),
        "attention_mask": mask,
        "position_ids": torch.arange(9)[None],
        "labels": tokens(2, 9, seed=1),
        "use_cache": False,
    }
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output, reference = compiled(**inputs), expected(**inputs)
    assert_same(output.loss, reference.loss.to(output.loss.dtype))
    assert_same(output.logits[mask.bool()], reference.logits[mask.bool()])
    output.loss.backward()
    reference.loss.backward()
    scale = max(parameter.grad.abs().max() for parameter in expected.parameters())
    for (name, a), (_, b) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 2e-6 * scale, name  # the library's compiled loss is in float32


@over_kinds(SECOND)
@pytest.mark.full
def test_a_compiled_static_cache(options):
    """As compiled generation does: prefill, then one token at a time."""
    model = tiny_model(**(options | {"num_hidden_layers": 2}))
    input_ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(input_ids).logits
        cache = StaticCache(config=model.config, max_cache_len=12)
        model(input_ids[:, :6], past_key_values=cache, position_ids=torch.arange(6)[None])
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        for position in (6, 7, 8):
            step = compiled(
                input_ids[:, position : position + 1],
                past_key_values=cache,
                position_ids=torch.tensor([[position]]),
            )
            assert_same(step.logits[:, 0], expected[:, position])


@over_kinds(SECOND)
@pytest.mark.full
def test_gradient_checkpointing_compiles(options):
    expected, model = (tiny_model(**(options | {"num_hidden_layers": 2})).train() for _ in range(2))
    recompute_activations(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for each in (compiled, expected):
        each(tokens(2, 9), use_cache=False).logits.square().mean().backward()
    assert_same_gradients(model, expected)


@over_kinds(FIRST)
@pytest.mark.full
def test_export_with_any_batch_and_length(options):
    model = tiny_model(**(options | {"num_hidden_layers": 2}))
    model.config.use_cache = False
    example = {"input_ids": tokens(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    free = {name: dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for name in example}
    program = torch.export.export(model, (), example, dynamic_shapes=free, strict=False)
    for shape in ((2, 9), (3, 13)):
        inputs = {"input_ids": tokens(*shape), "attention_mask": torch.ones(shape, dtype=torch.long)}
        assert_same(program.module()(**inputs).logits, model(**inputs).logits)
