"""The models that tests share: a cover of all pairs of options that knows every option, and a guard."""

from itertools import combinations, product

import pytest
import torch

from rigpt_hf import RiGPTConfig
from tests.conftest import shared
from tests.models import ALL, AXES, COVER, EACH, tiny_config


# Fields of the config that change no function: sizes, the start of training, its randomness, what a tokenizer says.
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
SIZES |= {"max_position_embeddings"}
TRAINING = {"initializer_range", "attention_dropout", "residual_dropout", "embedding_dropout", "depth_adjoint"}
TRAINING |= {"output_router_logits", "router_aux_loss_coef"}
USE = {"use_cache", "token_symmetry", "converted_from", "bos_token_id", "eos_token_id", "pad_token_id"}
# Tolerances of solvers that are no part of the cover, as later tokens then bear on earlier ones: `FLOWS` has them.
TOLERANCES = {"depth_rtol", "depth_atol"}


def pairs_of(rows) -> set:
    return {pair for row in rows for pair in combinations(zip(AXES, row.split("-"), strict=True), 2)}


def possible_pairs() -> tuple[set, list]:
    possible, refused = set(), []
    for (a, values), (b, others) in combinations(AXES.items(), 2):
        for value, other in product(values, others):
            try:
                tiny_config(**(values[value] | others[other]))
            except ValueError:
                refused.append((value, other))
            else:
                possible.add(((a, value), (b, other)))
    return possible, refused


def test_every_pair_of_options_meets_in_a_model():
    possible, refused = possible_pairs()
    unlike = [(value, "between") for value in ("past", "nope", "values", "local")]
    jumping = [("moe", depth) for depth in ("steps", "between")]
    ends = [("learned", "nope"), ("each", "all"), *jumping, ("both", "local"), ("after", "local")]
    assert refused == [*ends, *unlike]
    assert pairs_of(COVER) == possible and len(COVER) == 18
    for row in COVER:
        assert pairs_of(set(COVER) - {row}) != possible, f"{row} is not needed"


def test_every_option_is_in_a_model_of_the_short_cover():
    values = {pair for row in EACH for pair in zip(AXES, row.split("-"), strict=True)}
    assert values == {(axis, value) for axis, options in AXES.items() for value in options} and len(EACH) == 7
    assert set(EACH) < set(COVER)


def test_every_option_that_changes_the_function_is_among_them():
    """A new option belongs on an axis, or in one of the lists above."""
    varied = {field for values in AXES.values() for options in values.values() for field in options}
    others = SIZES | TRAINING | USE | TOLERANCES
    assert varied - {"intermediate_size"} == set(RiGPTConfig.__annotations__) - others


@pytest.mark.parametrize("option", COVER)
def test_the_models_are_what_their_names_say(option):
    config, values = tiny_config(**ALL[option]), dict(zip(AXES, option.split("-"), strict=True))
    for axis, value in values.items():
        for field, wanted in AXES[axis][value].items():
            found = getattr(config, field)
            assert found == wanted or (field == "rope_parameters" and wanted.items() <= found.items()), field


@pytest.mark.parametrize("change", ["weight", "gradient", "mode", "config"])
def test_a_change_to_a_shared_model_is_noticed(change):
    pairs: dict = {}
    use = shared(pairs)
    get = next(use)
    model = get("rotary").turned
    assert get("rotary").turned is model
    if change == "weight":
        model.lm_head.weight.data[3, 2] += 1e-9
    elif change == "gradient":
        model(torch.tensor([[3, 4]])).logits.sum().backward()
    elif change == "mode":
        model.train()
    else:
        model.config.use_cache = False
    with pytest.raises(AssertionError, match="changed models that all tests share: .*'rotary'"):
        next(use)
    assert not pairs
    assert list(shared(pairs)), "the end of a module without shared models"
