"""The dimension of the gauge group, from the table, is the rank deficiency of the network, as measured."""

import pytest
import torch

from rigpt_hf import RiGPTConfig
from rigpt_hf.symmetry import jacobian_spectrum, redundant_dimensions
from tests.models import SYMMETRIES, learned, over, tiny_model
from tests.symmetry.options import BROAD
from tests.tolerances import JACOBIAN_GAP


# Some hundred parameters. A tiny eps would make the length of the stream almost redundant.
SMALL = {
    "vocab_size": 9,
    "hidden_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 5,
    "max_position_embeddings": 7,
    "rms_norm_eps": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
KINKED = ("relu", "relu2")
# Options whose layers are not alike.
UNLIKE = ("sliding", "unturned", "rope-by-type", "experts-shared")
# Models in which each expert has many tokens, and each neuron is on both sides of its bounds; of relu2 the one among
# the first 150 whose neurons live most.
SEEDS = {"experts-relu2": 124, "experts-local": 2, "experts-parallel": 4, "experts-clamped": 55, "clamped": 2}
# Few neurons, and experts that every token may meet.
FEW_EXPERTS = {"num_experts": 3, "moe_intermediate_size": 3, "vocab_size": 13}


def small_model(name: str, **changes):
    """The model of `SYMMETRIES[name]` in a size at which a singular value decomposition takes no time."""
    options = SMALL | {key: value for key, value in SYMMETRIES[name].items() if key not in SMALL}
    options |= {"embedding_size": SMALL["hidden_size"]} if options.get("embedding_size") else {}
    options |= {"num_key_value_heads": 2} if name == "multi-head" else {}
    # Behind nothing but rotary positions a query depends on its token alone: more tokens must look at a metric than it
    # has numbers, which are ten; and as many at lengths of keys with a bias.
    numbers = options.get("qk_norm_gain") == "metric" or options.get("qk_norm_bias")
    options |= {"vocab_size": 11} if numbers else {}
    # More tokens must look at the lengths behind `project_in` than the 21 numbers that say what is a length.
    mapped = options.get("embedding_norm_map") and options.get("embedding_size")
    options |= {"vocab_size": 22} if mapped else {}
    # And twice as many at those of two heads.
    options |= {"vocab_size": 22} if options.get("qk_norm_over") == "all" else {}
    # Where lengths of two heads add up, neither may read what the other reads.
    together = (options.get("qk_norm_over"), options.get("qk_norm_gain")) == ("all", "metric")
    options |= {"hidden_size": 8} if together else {}
    # The first layer has no value embeddings.
    several = name in ("value-embeddings", "recipe", *UNLIKE)
    options |= {"num_hidden_layers": 2} if several else {}
    # The first layer's MLP may read tokens alone, and must not have more weights than those show.
    options |= {"vocab_size": 16} if options.get("use_parallel_residual") else {}
    options |= {"seed": SEEDS[name]} if name in SEEDS else {}
    options |= FEW_EXPERTS if options.get("num_experts") else {}
    options |= {"shared_expert_intermediate_size": 4} if options.get("shared_expert_intermediate_size") else {}
    # Where experts read tokens alone, each must read more of them; and bounds must be met by every neuron.
    options |= {"vocab_size": 48} if name == "experts-parallel" else {}
    options |= {"swiglu_limit": 0.15} if options.get("swiglu_limit") else {}
    return tiny_model(**(options | changes))


def inputs(sequences: int = 20, vocab_size: int = SMALL["vocab_size"]) -> torch.Tensor:
    """Sequences of full length in which every token occurs."""
    shape = sequences, SMALL["max_position_embeddings"]
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def centre_neurons_(model, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """
    Set the biases before activations so that every neuron is active on half of the inputs; returns per layer on which
    share each is. One that is active never, or always, has more freedom than the table knows. Experts without biases
    are asked one after the other.
    """
    shares = []
    for layer in model.model.layers:
        mlp = layer.mlp if model.config.num_experts is None else layer.mlp.experts
        into = mlp.up_proj if mlp.gate_proj is None else mlp.gate_proj
        seen: list[torch.Tensor] = []
        handle = mlp.act_fn.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        model(input_ids, use_cache=False)
        if into.bias is not None:
            into.bias -= seen[-1].flatten(0, 1).median(dim=0).values
            seen.clear()
            model(input_ids, use_cache=False)
        handle.remove()
        assert len(seen) == (model.config.num_experts or 1)
        shares.append(torch.cat([(part > 0).double().flatten(0, -2).mean(dim=0) for part in seen]))
    return shares


def measure(model, input_ids: torch.Tensor):
    spectrum = jacobian_spectrum(model, input_ids, torch.Generator().manual_seed(1))
    assert len(spectrum.singular_values) == sum(parameter.numel() for parameter in learned(model))
    return spectrum


def check_count(model, input_ids: torch.Tensor) -> None:
    if model.config.hidden_act in KINKED:
        for share in centre_neurons_(model, input_ids):
            least = 0.25 if model.config.num_experts is None else 0.15  # which nothing centres
            assert share.min() > least and share.max() < 1 - least, "a neuron is dead, or linear"
    spectrum = measure(model, input_ids)
    assert spectrum.gap > JACOBIAN_GAP
    assert 0 < spectrum.rank < len(spectrum.singular_values)
    counted = redundant_dimensions(model.config)
    # Maps between local frames are frozen, and only rotations of all frames at once leave them alone. So is the map
    # from gains into the stream, which only the identity leaves alone.
    frozen = "stream" if model.config.post_norm else "local"
    assert spectrum.deficiency == counted["total"] - counted.get(frozen, 0)


@over(BROAD, SYMMETRIES)
@pytest.mark.by_default(6)
def test_the_count_is_the_rank_deficiency(option):
    model = small_model(option)
    check_count(model, inputs(vocab_size=model.config.vocab_size))


def test_an_mlp_that_reads_few_tokens_alone_has_more_room():
    # Nine vectors of the stream are all that it makes: fewer numbers than it has weights.
    few = small_model("parallel", vocab_size=SMALL["vocab_size"])
    assert measure(few, inputs()).deficiency > redundant_dimensions(few.config)["total"] + 10


def test_neurons_that_meet_no_bound_and_experts_without_tokens_have_more_room():
    """Up to its bounds `up + 1` may be stretched; nobody sees the weights of an expert without tokens."""
    for name, change in (("clamped", {"swiglu_limit": 1e3}), ("experts-local", {"seed": 1})):
        model = small_model(name, **change)
        deficiency = measure(model, inputs(vocab_size=model.config.vocab_size)).deficiency
        counted = redundant_dimensions(model.config)
        assert deficiency >= counted["total"] - counted.get("local", 0) + SMALL["intermediate_size"]


@over(["gated-relu2"], ["learned-untied-projected", "squared-distance"])
def test_layers_add_up(option):
    model = small_model(option, num_hidden_layers=2)
    one, two = (redundant_dimensions(m.config) for m in (small_model(option), model))
    assert two["total"] > one["total"]
    assert two["head_vo"] == 2 * one["head_vo"] and two["stream"] == one["stream"]
    check_count(model, inputs(40))


def test_every_option_is_counted_differently_where_it_should_be():
    totals = {name: redundant_dimensions(small_model(name).config)["total"] for name in SYMMETRIES}
    assert totals["relu2"] == totals["gelu"] + SMALL["intermediate_size"]
    assert totals["gated-relu"] == totals["gated"] + SMALL["intermediate_size"]
    assert totals["distance"] < totals["rotary"] < totals["learned"]
    assert len(set(totals.values())) > 10


def test_a_gain_in_the_stream_takes_away_its_rotations():
    model = small_model("learned")
    gain = torch.linspace(0.5, 1.5, SMALL["hidden_size"], dtype=torch.float64)
    counted = redundant_dimensions(model.config)
    before = measure(model, inputs())
    # Between the last norm and the head, which is tied: no other weight can take the gain up.
    model.model.norm.register_forward_hook(lambda module, args, output: output * gain)
    after = measure(model, inputs())
    assert before.deficiency == counted["total"]
    assert after.deficiency == counted["total"] - counted["stream"] < counted["total"]
    assert after.gap > JACOBIAN_GAP


def test_layers_that_see_only_the_range_of_a_narrow_embedding_have_more_room():
    # Nothing but `project_in` has written to the stream where the first layer reads it, and rotary positions add
    # nothing there: what queries, keys and values read outside of its range is free.
    config = {"embedding_size": SMALL["hidden_size"] - 1}
    rotary, learned = small_model("untied-projected", **config), small_model("learned-untied-projected", **config)
    heads = rotary.config.num_attention_heads + 2 * rotary.config.num_key_value_heads
    unread = rotary.config.head_dim * heads * (rotary.config.hidden_size - rotary.config.embedding_size)
    assert unread == 16
    assert measure(rotary, inputs()).deficiency == redundant_dimensions(rotary.config)["total"] + unread
    assert measure(learned, inputs()).deficiency == redundant_dimensions(learned.config)["total"]


def test_a_metric_that_few_tokens_look_at_has_more_room():
    """Ten numbers in each of three maps, and what queries and keys may be stretched by."""
    for tokens, unseen in ((9, 6), (10, 3), (11, 0)):
        model = small_model("gain-metric", vocab_size=tokens)
        deficiency = measure(model, inputs(40, tokens)).deficiency
        assert deficiency == redundant_dimensions(model.config)["total"] + unseen, tokens


def test_a_bias_behind_a_norm_that_few_tokens_look_at_has_more_room():
    for tokens, unseen in ((8, 14), (9, 2), (10, 0)):
        model = small_model("norm-bias-squared", vocab_size=tokens)
        deficiency = measure(model, inputs(40, tokens)).deficiency
        assert deficiency == redundant_dimensions(model.config)["total"] + unseen, tokens


def test_lengths_behind_a_projection_that_few_tokens_look_at_have_more_room():
    """`n(U E)` reads `Uᵀ U`, 21 numbers, and a token shows one of their sums."""
    for tokens, unseen in ((9, 13), (20, 2), (22, 0)):
        model = small_model("alibi-bloom", vocab_size=tokens)
        deficiency = measure(model, inputs(20, tokens)).deficiency
        assert deficiency == redundant_dimensions(model.config)["total"] + unseen, tokens


def test_metrics_of_heads_that_read_the_same_have_more_room():
    """Two heads of four dimensions read one direction both, of six and a bias: whose its length is nobody sees."""
    for size, shared in ((6, 1), (8, 0)):
        model = small_model("together-metric", hidden_size=size)
        deficiency = measure(model, inputs(40, model.config.vocab_size)).deficiency
        assert deficiency == redundant_dimensions(model.config)["total"] + shared, size


def test_heads_wider_than_the_stream_are_counted_wrong():
    # Dimensions that neither factor fills: some freedom the group does not know, some elements that do nothing.
    for head_dim, right in ((6, True), (8, False)):
        model = small_model("learned", head_dim=head_dim)
        deficiency, total = measure(model, inputs(40)).deficiency, redundant_dimensions(model.config)["total"]
        assert (deficiency == total) == right, head_dim


def test_the_parts_of_gpt2_and_of_a_llama():
    biases = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "output_bias": True}
    assert redundant_dimensions(RiGPTConfig(embedding_size=768, position_embedding_type="learned", **biases)) == {
        "stream": 768 * 767 // 2,
        "lexical": 768 * 768,
        "head_qk": 12 * 12 * 64 * 64,
        "head_vo": 12 * 12 * 64 * 64,
        "heads": 0,
        "neurons": 0,
        "key_shift": 12 * 768,
        "value_shift": 12 * 768,
        "total": 294_528 + 589_824 + 589_824 + 589_824 + 9_216 + 9_216,
    }
    llama = RiGPTConfig(
        embedding_size=2048,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        hidden_act="silu",
        gated_mlp=True,
    )
    assert redundant_dimensions(llama) == {
        "stream": 2048 * 2047 // 2,
        "lexical": 2048 * 2048,
        "head_qk": 16 * 8 * 2 * 32,
        "head_vo": 16 * 8 * 64 * 64,
        "heads": 0,
        "neurons": 16 * 8192,
        "total": 2_096_128 + 4_194_304 + 8_192 + 524_288 + 131_072,
    }


def test_too_few_logits_are_named():
    model = small_model("rotary")
    size = sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(
        ValueError, match=f"`input_ids` must give at least {size + 20} logits to see {size} parameters"
    ):
        jacobian_spectrum(model, inputs(2))
