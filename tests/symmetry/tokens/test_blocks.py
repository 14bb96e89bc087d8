"""A symmetric model in blocks is the same function, and only a symmetric one is."""

import pytest
import torch

from rigpt_hf.frames import table_of
from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.symmetry.tokens import Representation, TokenSymmetry, in_blocks, symmetrize
from rigpt_hf.symmetry.tokens.blocks import BlockLinear, irreducible_coordinates
from tests.models import COVER, over, tiny_model, tokens
from tests.symmetry.options import generator
from tests.symmetry.tokens.groups import SYMMETRIES, VOCABULARY
from tests.symmetry.tokens.test_representation import ALL, PAIRED, represented
from tests.tolerances import SYMMETRY


TOLERANCE = SYMMETRY[torch.float64]
BLOCKED = {
    option: values
    for option, values in ALL.items()
    if not {"local_frames", "post_norm"} & values.keys()
    and values.get("depth_interpolation", "constant") == "constant"
}


def symmetric(option: str, name: str, kind: str = "irreducible"):
    """A symmetric model, and its representation."""
    model = tiny_model(**ALL[option])
    representation = Representation.choose(model.config, SYMMETRIES[name](), kind=kind)
    return symmetrize(model, representation).eval(), representation


def difference(blocks, model, ids) -> float:
    """The largest difference of logits, relative to the largest."""
    logits, expected = (one(input_ids=ids, use_cache=False).logits for one in (blocks, model))
    return float((logits - expected).abs().max() / expected.abs().max())


def maps(model) -> list[BlockLinear]:
    return [module for module in model.modules() if isinstance(module, BlockLinear)]


def stored(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
@over([option for option in COVER if option in BLOCKED], BLOCKED)
def test_blocks_compute_the_same(option):
    for kind in ("irreducible", "permutation"):
        model, representation = symmetric(option, PAIRED.get(option, "symmetric"), kind)
        blocks = in_blocks(model, representation)
        assert difference(blocks, model, tokens(2, 12)) < TOLERANCE
        assert len(maps(blocks)) >= 6 * model.config.num_hidden_layers and stored(blocks) < 0.7 * stored(model)


@torch.no_grad()
@pytest.mark.parametrize("name", SYMMETRIES)
@pytest.mark.by_default(2)
def test_every_kind_of_irreducible_has_its_blocks(name):
    """Real, complex and quaternionic ones, at odd lengths, in the frame of the representation and in any other."""
    model, representation = symmetric("learned-untied-projected", name)
    h = GaugeTransformation.random(model.config, generator(3), "all")
    for one, carried in ((model, representation), (h(model), representation.conjugated(h))):
        blocks = in_blocks(one, carried)
        assert difference(blocks, model, tokens(1, 1)) < TOLERANCE
        assert difference(blocks, model, tokens(3, 7)) < TOLERANCE
        for block in (block for module in maps(blocks) for block in module.blocks):
            block.mul_(1 + 1e-6)
        assert difference(blocks, model, tokens(3, 7)) > 1e-8, "the blocks are not what is computed with"


@torch.no_grad()
def test_generation_and_dtypes_are_those_of_the_model():
    model, representation = symmetric("learned", "cyclic")
    ids = tokens(2, 5)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(in_blocks(model).generate(ids, **settings), model.generate(ids, **settings))
    blocks = in_blocks(model.float())
    assert {parameter.dtype for parameter in blocks.parameters()} == {torch.float32}
    assert difference(blocks, model, ids) < SYMMETRY[torch.float32]
    assert not any(parameter.requires_grad for parameter in blocks.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters()) and not maps(model)
    assert representation.distance(model) < SYMMETRY[torch.float32] and model.config.token_symmetry is not None


def test_blocks_of_other_weights_are_refused(tmp_path):
    model, representation = represented("learned", "symmetric")
    with pytest.raises(ValueError, match=r"`model` must have the symmetry, got weights that are 0\.\d+ of their norm"):
        in_blocks(model, representation)
    with pytest.raises(ValueError, match="must have a `token_symmetry` in its config.json"):
        in_blocks(model)
    by_hand = Representation(representation.symmetry, representation.transformations)
    symmetric_model = symmetrize(model, representation)
    with pytest.raises(ValueError, match="`representation` must be made of parts, of a group that can be listed"):
        in_blocks(symmetric_model, by_hand)
    with pytest.raises(ValueError, match="A model in blocks is not saved. Save the model that it was made of"):
        in_blocks(symmetric_model).save_pretrained(tmp_path)
    symmetric_model.config.quantization_config = {"quant_method": "any"}
    with pytest.raises(ValueError, match="`model` must have plain weights, got quantized ones"):
        in_blocks(symmetric_model, representation)


def test_models_whose_maps_have_no_blocks_are_refused():
    interpolated = tiny_model(depth_solver="rk4", depth_interpolation="linear")
    representation = Representation.trivial(interpolated.config, SYMMETRIES["cyclic"]())
    with pytest.raises(ValueError, match="Running in blocks needs layers with frames of their own"):
        in_blocks(interpolated, representation)
    model = tiny_model(**ALL["learned"])
    large = TokenSymmetry.named("symmetric", [range(5, 13)], VOCABULARY)
    representation = Representation.choose(model.config, large, kind="permutation")
    with pytest.raises(ValueError, match="of a group that can be listed"):
        in_blocks(symmetrize(model, representation), representation)


def test_no_frame_is_forgotten():
    """All frames that a representation turns are brought to irreducible coordinates, so none has a basis there."""
    model, representation = symmetric("learned-untied-projected", "conjugations", "permutation")
    turn, there = irreducible_coordinates(representation)
    assert there.distance(turn(model)) < TOLERANCE < 0.1 < there.distance(model)
    turned = {key for key, frame in table_of(model.config).frames.items() if frame.group.represents == "matrices"}
    assert {str(key) for key in turned} == set(turn.elements) and len(turned) > 3
