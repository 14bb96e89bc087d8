"""Positions as linear biases of scores, `position_embedding_type="alibi"`."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations import flex_attention
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.alibi_rigpt import RiGPTAlibi, alibi_slopes
from rigpt_hf.scores_rigpt import SCORES, eager_attention_forward, flex_attention_forward
from rigpt_hf.symmetry import GaugeTransformation
from tests.model.agreement import assert_different, assert_same
from tests.model.test_attention import causal_mask, without_compiling
from tests.models import ALIBI, tiny_config, tiny_model, tokens
from tests.processes import together
from tests.tolerances import SYMMETRY


WINDOW = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5}


def test_slopes_are_those_of_the_paper_and_of_the_stock_classes():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(3) == [2.0**-4, 2.0**-8, 2.0**-2]
    for heads in range(1, 25):
        ours = torch.tensor(alibi_slopes(heads))
        assert_same(_get_alibi_slopes(heads, "cpu"), ours, f"BLOOM's of {heads}")
        assert_same(-build_mpt_alibi_tensor(heads, 2)[:, 0, 0], ours, f"MPT's of {heads}")
    assert not torch.equal(ours, ours.sort(descending=True).values)


def test_without_them_nothing_is_there():
    assert not any(isinstance(module, RiGPTAlibi) for module in tiny_model().modules())
    model = tiny_model(**ALIBI)
    assert model.model.rotary_emb is None and model.model.embed_positions is None
    slopes = [module.weight for module in model.modules() if isinstance(module, RiGPTAlibi)]
    assert len(slopes) == 3 and not any(slope.requires_grad for slope in slopes)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_it_is_the_formula(heads, backend):
    model = tiny_model(**ALIBI, num_key_value_heads=heads)
    model.set_attn_implementation(backend)
    attention, x = model.model.layers[1].self_attn, torch.randn(2, 7, 32, dtype=torch.float64)
    query, key, value = (proj(x).view(2, 7, -1, 8) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    output = torch.zeros_like(query)
    for head in range(4):
        for position in range(7):
            k, v = (states[:, : position + 1, head // (4 // heads)] for states in (key, value))
            distance = position - torch.arange(position + 1)
            scores = (query[:, position, head, None] * k).sum(-1) / 8**0.5 - alibi_slopes(4)[head] * distance
            output[:, position, head] = (scores.softmax(-1)[..., None] * v).sum(1)
    expected = attention.o_proj(output.flatten(2))
    float_mask = causal_mask(7, torch.float64)
    for mask in (float_mask, float_mask == 0, None):
        assert_same(attention(x, attention_mask=mask)[0], expected)
    attention.alibi.weight.mul_(0.5)
    assert_different(attention(x, attention_mask=float_mask)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, WINDOW], ids=["full", "sliding"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_padding_caches_and_packing_leave_distances_alone(options, backend):
    model = tiny_model(**ALIBI, **options)
    model.set_attn_implementation(backend)
    ids = tokens(2, 14)
    expected = model(ids).logits
    padded, mask = nn.functional.pad(ids, (6, 0)), nn.functional.pad(torch.ones_like(ids), (6, 0))
    assert_same(model(padded, attention_mask=mask).logits[:, 6:], expected, "padded")
    cache = model(padded[:, :12], attention_mask=mask[:, :12]).past_key_values
    for column in range(12, 20):
        last = model(
            padded[:, column : column + 1], attention_mask=mask[:, : column + 1], past_key_values=cache
        ).logits
        assert_same(last[:, 0], expected[:, column - 6], f"cached at {column}")
    both = torch.cat((ids[:1], ids[1:, :9]), dim=1)
    packed = model(both, position_ids=torch.cat((torch.arange(14), torch.arange(9)))[None]).logits
    assert_same(packed[:, :14], expected[:1], "packed, first")
    assert_same(packed[:, 14:], expected[1:, :9], "packed, second")
    for layer in model.model.layers:
        layer.self_attn.alibi.weight.zero_()
    assert_different(model(ids).logits, expected)


def test_caches_of_fixed_size_slide():
    """With more tokens than a window has places."""
    model = tiny_model(**ALIBI, **WINDOW)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = [
        model.generate(tokens(2, 7), cache_implementation=kind, disable_compile=True, **settings)
        for kind in ("dynamic", "static")
    ]
    assert torch.equal(*made) and torch.equal(made[0], model.generate(tokens(2, 7), use_cache=False, **settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_far_from_the_beginning_near_distances_are_not_rounded(dtype):
    """In 16 bits a position is rounded by more than a distance to a neighbour is."""
    alibi = RiGPTAlibi(2).to(dtype)
    with torch.no_grad():
        alibi.weight.copy_(torch.tensor([0.5, 0.25]))
    length = 8192
    query, key = torch.zeros(1, 2, 1, 8, dtype=dtype), torch.zeros(1, 1, length, 8, dtype=dtype)
    distance = torch.arange(length - 1, -1, -1, dtype=torch.float64)
    expected = -torch.tensor([[0.5], [0.25]], dtype=torch.float64) * distance
    mask = torch.zeros(1, 1, 1, length + 4, dtype=torch.bool)  # as of a cache of fixed size with four free places
    mask[..., :length] = True
    for given, keys in ((None, key), (mask, nn.functional.pad(key, (0, 0, 0, 4)))):
        bias = alibi(given, query, keys)[0, :, 0, :length].double()
        assert ((bias - expected).abs() <= torch.finfo(dtype).eps * expected.abs()).all()
    counted = (torch.tensor([[0.5], [0.25]], dtype=dtype) * torch.arange(length).to(dtype)).double()
    assert ((counted - counted[:, -1:]) - expected)[:, -3:].abs().max() > 0.2


def test_heads_do_not_change_places_without_their_slopes():
    model = tiny_model(**ALIBI, num_key_value_heads=4)
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(0), ["heads"])
    turned, expected = g(model), model(tokens(2, 20)).logits
    error = (turned(tokens(2, 20)).logits - expected).abs().max() / expected.abs().max()
    moved = [name for name, weight in turned.named_parameters() if not torch.equal(weight, model.get_parameter(name))]
    assert error <= SYMMETRY[torch.float64] and any(name.endswith("alibi.weight") for name in moved)
    left = copy.deepcopy(turned)
    for layer, own in zip(left.model.layers, model.model.layers, strict=True):
        layer.self_attn.alibi.load_state_dict(own.self_attn.alibi.state_dict())
    off = (left(tokens(2, 20)).logits - expected).abs().max() / expected.abs().max()
    print(f"heads exchanged and slopes left: {off:.2f}")
    assert off > 0.05


def test_what_cannot_take_them_is_refused():
    model = tiny_model(**ALIBI)
    assert model.config._attn_implementation == "sdpa"
    message = (
        "must be one of eager, sdpa, flex_attention for `position_embedding_type='alibi'`.*got 'flash_attention_2'"
    )
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation("flash_attention_2")
    message = "`position_embedding_type='alibi'` must not meet continuous batching, .*Generate with `generate`"
    for attempt in (
        lambda: model.set_attn_implementation("paged|eager"),
        lambda: model(tokens(1, 5), cache=object(), use_cache=False),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    capped = tiny_model(**ALIBI, attn_logit_softcapping=2.0)
    assert capped.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="eager, flex_attention for `attn_logit_softcapping=2.0`.*got 'sdpa'"):
        capped.set_attn_implementation("sdpa")


@pytest.mark.parametrize("score", ["dot", "distance"])
@pytest.mark.parametrize("cap", [None, 0.7])
def test_the_score_modification_of_flex_is_the_eager_score(score, cap, monkeypatch):
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", without_compiling)
    query, key, value = (torch.randn(2, heads, length, 8) for heads, length in ((4, 5), (2, 9), (2, 9)))
    alibi = RiGPTAlibi(4)
    module = SimpleNamespace(
        num_key_value_groups=2, score=SCORES[score], distance_weight=torch.randn(4), alibi=alibi, training=False
    )
    mask = causal_mask(9, torch.float32)[..., 4:, :]
    expected = eager_attention_forward(module, query, key, value, alibi(mask, query, key), 0.3, softcap=cap)[0]
    assert_same(flex_attention_forward(module, query, key, value, mask, 0.3, softcap=cap)[0], expected)
    plain = eager_attention_forward(module, query, key, value, mask, 0.3, softcap=cap)[0]
    assert_different(plain, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's compiler
@pytest.mark.full
def test_compiled_it_is_the_same():
    model = tiny_model(dtype=torch.float32, **ALIBI)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_saved_and_loaded_slopes_are_kept_and_frozen(tmp_path):
    model = tiny_model(dtype=torch.float32, **ALIBI)
    with torch.no_grad():
        model.model.layers[1].self_attn.alibi.weight.mul_(0.3)
    model.save_pretrained(tmp_path)
    loaded = RiGPTForCausalLM.from_pretrained(tmp_path)
    assert_same(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    assert not loaded.model.layers[1].self_attn.alibi.weight.requires_grad
    model._init_weights(model.model.layers[1].self_attn.alibi)
    assert_different(model(tokens(2, 9)).logits, loaded(tokens(2, 9)).logits)


def run_sharded(rank, folder):
    from transformers.distributed.configuration_utils import DistributedConfig

    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = RiGPTForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    reference = RiGPTForCausalLM.from_pretrained(folder)
    assert model.model.layers[0].self_attn.alibi.weight.to_local().shape == (2,)
    with torch.no_grad():
        assert_same(model(tokens(2, 9)).logits, reference(tokens(2, 9)).logits)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_tensor_parallelism_over_two_processes(tmp_path):
    tiny_model(dtype=torch.float32, **ALIBI, embedding_norm=True, embedding_norm_map=True).save_pretrained(tmp_path)
    together(run_sharded, str(tmp_path))


class TestEmbeddingMap:
    """`embedding_norm_map`: an affine map behind the norm of embeddings."""

    def test_the_stream_begins_behind_it(self):
        model = tiny_model(embedding_norm=True, embedding_norm_map=True, embedding_size=24)
        embeddings = model.model.embed_tokens(tokens(2, 9))
        x = embeddings @ model.model.project_in.weight.T
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        expected = x @ model.model.embedding_map.weight.T + model.model.embedding_map.bias
        found = model(tokens(2, 9), output_hidden_states=True).hidden_states[0]
        assert_same(found, expected)
        assert_different(found, x)

    def test_it_needs_the_norm(self):
        with pytest.raises(ValueError, match="`embedding_norm_map` is .* needs `embedding_norm=True`, got False"):
            tiny_config(embedding_norm_map=True)

    def test_it_begins_as_a_rotation(self):
        model = RiGPTForCausalLM(tiny_config(embedding_norm=True, embedding_norm_map=True))
        weight = model.model.embedding_map.weight
        assert_same(weight @ weight.T, torch.eye(32))
        assert not model.model.embedding_map.bias.any() and not torch.equal(weight, torch.eye(32))
