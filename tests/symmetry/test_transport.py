"""What was made for a model does the same in its disguise once it is carried there, and not before."""

import copy
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from rigpt_hf.symmetry import GaugeTransformation, table_of, transport
from rigpt_hf.symmetry.transport import check_mean, transport_adapter
from tests.model.agreement import assert_different, difference
from tests.models import ALL, over, randomise_, tiny_config, tiny_model, tokens, turned_pair
from tests.symmetry.options import BROAD, SEARCHED, generator
from tests.tolerances import CONVERSION


peft = pytest.importorskip("peft")
EXACT = CONVERSION[torch.float64]
LORA = {"r": 3, "lora_alpha": 5}
# All groups and translations; besides experts, a map that reads its own frame, an unmixed head, a flow.
QUICK = (*SEARCHED, "experts-shared", "no-biases", "untied-projected", "norm-bias-vector", "depth-midpoint")


def assert_exact(actual: torch.Tensor, expected: torch.Tensor, what: str = ""):
    error = difference(actual, expected)
    assert error <= EXACT, f"{what} differs by {error:.2e}"


def kinds_of(model: nn.Module) -> set[str]:
    return set(table_of(model.config).kinds)


def modules(model: nn.Module, *kinds: type) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) in kinds]


def adapted(model: nn.Module, settings, state=None) -> nn.Module:
    """A copy with an adapter: a random one, or the one given."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), settings).eval()
    if state is None:
        return randomise_(wrapped, 5, 0.1)
    assert not peft.set_peft_model_state_dict(wrapped, state).unexpected_keys
    return wrapped


def state_of(wrapped: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in peft.get_peft_model_state_dict(wrapped).items()}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(tokens(2, 9), use_cache=False).logits


def carried(wrapped: nn.Module, settings, b: nn.Module, g: GaugeTransformation) -> torch.Tensor:
    """The logits of B with the adapter of A."""
    state, changed = transport_adapter(state_of(wrapped), g, settings.to_dict())
    own = copy.deepcopy(settings)
    own.lora_bias = changed.get("lora_bias", False)
    return logits(adapted(b, own, state))


@over(QUICK[1::2], [*QUICK, *BROAD])
@pytest.mark.by_default(2)
def test_lora_on_every_linear_map_does_the_same_in_a_disguise(option):
    a, b, g = turned_pair(option)
    targets = modules(a, nn.Linear)
    settings = peft.LoraConfig(target_modules=targets, **LORA)
    wrapped = adapted(a, settings)
    factors = [key for key in state_of(wrapped) if ".lora_" in key]
    assert len(factors) == 2 * len(targets) >= 2 * 6 * 3, "a map has been left out"
    expected = logits(wrapped)
    assert_different(expected, logits(a), "an adapter that does nothing")
    assert_exact(carried(wrapped, settings, b, g), expected)
    assert_different(logits(adapted(b, settings, state_of(wrapped))), expected, "the adapter as it was")
    assert_different(carried(wrapped, settings, b, g.inverse()), expected, "the adapter carried the wrong way")


@pytest.mark.parametrize("option", ["untied-projected", "learned-untied-projected", "values", "no-biases"])
@pytest.mark.by_default(2)
def test_lora_of_embeddings_too(option):
    options = {"values": {"value_embedding_period": 2}}.get(option) or ALL[option]
    a = tiny_model(**options)
    linear = [kind for kind, frame in table_of(a.config).kinds.items() if frame.shift is None]
    g = GaugeTransformation.random(a.config, generator(1), linear)
    targets = modules(a, nn.Linear, nn.Embedding)
    settings = peft.LoraConfig(target_modules=targets, **LORA)
    wrapped = adapted(a, settings)
    embeddings = [key for key in state_of(wrapped) if "lora_embedding_" in key]
    assert len(embeddings) == 2 * len(modules(a, nn.Embedding)) >= 2
    assert_exact(carried(wrapped, settings, g(a), g), logits(wrapped))
    other = {key: value for key, value in state_of(wrapped).items() if key in embeddings}
    state = transport(state_of(wrapped), g) | other
    assert_different(logits(adapted(g(a), settings, state)), logits(wrapped), "embeddings as they were")


def test_a_lora_behind_a_shift_gets_a_bias_and_only_there():
    """Constants in the values reach o_proj, whose adapter must not see them."""
    a = tiny_model()
    settings = peft.LoraConfig(target_modules=["q_proj", "o_proj"], **LORA)
    wrapped = adapted(a, settings)
    for frames, has in (("shifts", True), ("value_shift", True), ("head", False)):
        g = GaugeTransformation.random(a.config, generator(2), frames)
        state, changed = transport_adapter(state_of(wrapped), g, settings.to_dict())
        assert changed.get("lora_bias", False) is has and any("lora_B.bias" in key for key in state) is has
        assert_exact(carried(wrapped, settings, g(a), g), logits(wrapped), frames)
    g = GaugeTransformation.random(a.config, generator(2), "shifts")
    without = {key: value for key, value in transport(state_of(wrapped), g).items() if "lora_B.bias" not in key}
    assert_different(logits(adapted(g(a), settings, without)), logits(wrapped), "without the bias")
    owned = peft.LoraConfig(target_modules=["q_proj", "o_proj"], lora_bias=True, **LORA)
    wrapped = adapted(a, owned)
    every = GaugeTransformation.random(a.config, generator(2), "all")
    assert_exact(carried(wrapped, owned, every(a), every), logits(wrapped), "an adapter with biases of its own")


def test_whole_parameters_beside_an_adapter_turn_as_the_model_does():
    options = {"tie_word_embeddings": False, "attention_bias": False, "position_embedding_type": "learned"}
    a = tiny_model(**options)
    g = GaugeTransformation.random(a.config, generator(4), ["stream", "head", "neurons"])
    settings = peft.LoraConfig(target_modules=["up_proj"], modules_to_save=["lm_head"], bias="all", **LORA)
    wrapped = adapted(a, settings)
    state = state_of(wrapped)
    assert [key for key in state if key.endswith("lm_head.weight")] and len([k for k in state if "bias" in k]) == 9
    expected = logits(wrapped)
    assert_exact(logits(adapted(g(a), settings, transport(state, g))), expected)
    assert_different(logits(adapted(g(a), settings, state)), expected)
    shifted = GaugeTransformation.random(tiny_config(), generator(4), "shifts")
    biases = {"base_model.model.model.layers.0.self_attn.o_proj.base_layer.bias": torch.ones(32).double()}
    with pytest.raises(ValueError, match=r"must hold `model.layers.0.self_attn.o_proj.weight` beside the biases"):
        transport(biases, shifted)
    weights = {"base_model.model.model.layers.0.self_attn.o_proj.weight": torch.ones(32, 32).double()}
    with pytest.raises(
        ValueError, match=r"must hold `model.layers.0.self_attn.o_proj.bias` beside `model.layers.0.se"
    ):
        transport(weights, shifted)
    assert transport(weights, GaugeTransformation.random(tiny_config(), generator(4), "stream"))


@pytest.mark.parametrize("option", ["gated-relu2", "experts-shared", "relu", "no-biases"])
def test_ia3_on_neurons_is_exact_and_on_heads_refused(option):
    a, b, g = turned_pair(option)
    names = [name for name in modules(a, nn.Linear) if name.endswith("down_proj")]
    settings = peft.IA3Config(target_modules=names, feedforward_modules=names)
    wrapped = adapted(a, settings)
    assert len(state_of(wrapped)) >= 3
    expected = logits(wrapped)
    assert_different(expected, logits(a))
    assert_exact(logits(adapted(b, settings, transport(state_of(wrapped), g))), expected)
    assert_different(logits(adapted(b, settings, state_of(wrapped))), expected)
    heads = peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    wrapped = adapted(a, heads)
    with pytest.raises(ValueError, match=r"scales of IA3 for coordinates of `model.layers.0.self_attn.k_proj.weight`"):
        transport(state_of(wrapped), g)
    # Where nothing turns the heads themselves they are exact too.
    kinds = [kind for kind in ("stream", "heads", "neurons", "experts") if kind in kinds_of(a)]
    exchanges = GaugeTransformation.random(a.config, generator(5), kinds)
    assert_exact(logits(adapted(exchanges(a), heads, transport(state_of(wrapped), exchanges))), logits(wrapped))
    assert_different(logits(adapted(exchanges(a), heads, state_of(wrapped))), logits(wrapped))


def refused(settings, **others) -> str:
    config = tiny_config()
    g = GaugeTransformation.random(config, generator(0), others.pop("frames", "all"))
    state = others.pop("state", None)
    if state is None:
        state = state_of(adapted(tiny_model(), settings))
    with pytest.raises(ValueError) as raised:
        transport(state, g, settings=others or (settings and settings.to_dict()))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_has_no_exact_form_is_refused_with_the_reason():
    dora = peft.LoraConfig(target_modules=["q_proj"], use_dora=True)
    assert "got DoRA: it divides each coordinate of an output by the norm of a row" in refused(dora)
    embeddings = peft.LoraConfig(target_modules=["o_proj", "embed_tokens"])
    assert "must leave embeddings alone where a translation shifts" in refused(embeddings)
    plain = peft.LoraConfig(target_modules=["q_proj"])
    factor = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for settings, words in (
        ({"peft_type": "VERA"}, "one of the method 'VERA'"),
        ({"use_qalora": True}, "`use_qalora=True`"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights='pissa'`, which changes A's own weights"),
    ):
        assert words in refused(plain, **settings)
    for state, words in (
        (
            {factor: torch.ones(3, 31)},
            "must fit the model, whose `model.layers.0.self_attn.q_proj.weight` has the shape",
        ),
        (
            {factor.replace("q_proj", "c_attn"): torch.ones(3, 32)},
            "no parameter 'model.layers.0.self_attn.c_attn.weight'",
        ),
        (
            {factor.replace("q_proj", "gate_proj").replace("self_attn", "mlp"): torch.ones(3, 32)},
            "which has no `model.la",
        ),
        ({factor.replace("lora_A", "lora_E"): torch.ones(3, 1)}, "must hold the parameters of LoRA or IA3"),
    ):
        assert words in refused(None, state=state)


# Where hidden states are at each point: the module, and whether they go in or come out.
PLACES = {
    "hook_resid_pre": ("", "in"),
    "hook_resid_mid": ("post_attention_layernorm", "in"),
    "hook_resid_post": ("", "out"),
    "attn.hook_z": ("self_attn.o_proj", "in"),
    "mlp.hook_post": ("mlp.down_proj", "in"),
    "mlp.experts.hook_post": ("mlp.experts.down_proj", "in"),
    "mlp.shared_expert.hook_post": ("mlp.shared_expert.down_proj", "in"),
}
FEATURES = 7


def autoencoder(size: int, kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    shapes = {"W_enc": (size, FEATURES), "W_dec": (FEATURES, size), "b_dec": (size,)}
    shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag") if kind == "gated" else ("b_enc", "threshold"), (FEATURES,))
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}


def reconstruct(state: dict[str, torch.Tensor], x: torch.Tensor, applied: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of an autoencoder, gated or with a threshold, and what they give back."""
    inner = x - state["b_dec"] if applied else x
    if "b_gate" in state:
        gate = (inner @ state["W_enc"] + state["b_gate"] > 0).to(x)
        features = gate * (inner @ (state["W_enc"] * state["r_mag"].exp()) + state["b_mag"]).relu()
    else:
        before = inner @ state["W_enc"] + state["b_enc"]
        features = before.relu() * (before > state["threshold"])
    return features, features @ state["W_dec"] + state["b_dec"]


@torch.no_grad()
def run_with(model: nn.Module, hook: str, state: dict[str, torch.Tensor], sae: dict, applied: bool):
    """The logits with a steering vector and what an autoencoder misses taken out; what the probe and features read."""
    layer, kind = int(hook.split(".")[1]), hook.split(".", 2)[2]
    path, side = PLACES[kind]
    module = model.model.layers[layer].get_submodule(path)
    read = []

    def change(x: torch.Tensor) -> torch.Tensor:
        features, given_back = reconstruct(sae, x, applied)
        read.extend((features, x @ state["weight"].T + state["bias"]))
        return (x + given_back) / 2 + state["vector"]

    with ExitStack() as stack:
        if side == "in":
            handle = module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
        else:
            handle = module.register_forward_hook(lambda _, inputs, output: change(output))
        stack.callback(handle.remove)
        found = logits(model)
    return found, *read


def points(model: nn.Module, layer: int) -> list[str]:
    block = dict(model.model.layers[layer].named_modules())
    has = [kind for kind, (path, _) in PLACES.items() if isinstance(block.get(path), nn.Module)]
    # One module for both norms is called twice, and a flow has no middle.
    if not model.config.pre_norm or model.config.depth_solver is not None or model.config.use_parallel_residual:
        has = [kind for kind in has if kind != "hook_resid_mid"]
    return [f"blocks.{layer}.{kind}" for kind in has]


@over(
    ["parallel-local-projected", "experts-shared", "depth-midpoint"],
    [*QUICK, *BROAD, "experts-local", "post-norm-alone"],
)
@pytest.mark.by_default(1)
def test_vectors_probes_and_autoencoders_do_the_same_in_a_disguise(option):
    a, b, g = turned_pair(option)
    shapes = {name: parameter.shape for name, parameter in a.named_parameters()}
    tried = [*points(a, 1), *points(a, 2)]
    assert len(tried) >= 8
    for hook in tried:
        path = PLACES[hook.split(".", 2)[2]][0] or "self_attn.q_proj"
        path = "self_attn.q_proj" if "norm" in path else path
        size = shapes[f"model.layers.{hook.split('.')[1]}.{path}.weight"][1]
        draw = torch.Generator().manual_seed(1)
        sizes = {"vector": (size,), "weight": (3, size), "bias": (3,)}
        state = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in sizes.items()}
        moved_state = transport(state, g, hook=hook)
        for kind, applied in (("gated", False), ("jumprelu", True), ("jumprelu", False)):
            sae = autoencoder(size, kind)
            settings = {"architecture": kind, "apply_b_dec_to_input": applied, "metadata": {"hook_name": hook}}
            expected = run_with(a, hook, state, sae, applied)
            assert_different(expected[0], logits(a), f"{hook}: nothing was changed")
            moved = moved_state, transport(sae, g, settings=settings)
            for found, wanted in zip(run_with(b, hook, *moved, applied), expected, strict=True):
                assert_exact(found, wanted, f"{hook} with {kind}")
        untouched = run_with(b, hook, state, sae, applied)
        assert_different(untouched[0], expected[0], f"{hook} as it was")


@pytest.mark.parametrize("kind", ["attn.hook_z", "mlp.hook_post", "hook_resid_post"])
def test_at_a_wrong_point_they_do_something_else(kind):
    a, b, g = turned_pair("parallel-local-projected")  # each layer has a stream of its own
    right, wrong = f"blocks.1.{kind}", f"blocks.0.{kind}"
    size = a.config.intermediate_size if "mlp" in kind else a.config.hidden_size
    draw = torch.Generator().manual_seed(1)
    sizes = {"vector": (size,), "weight": (3, size), "bias": (3,)}
    state = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in sizes.items()}
    sae, settings = autoencoder(size, "jumprelu"), {"apply_b_dec_to_input": False}
    expected = run_with(a, right, state, sae, False)
    for hook, check in ((right, assert_exact), (wrong, assert_different)):
        moved = transport(state, g, hook=hook), transport(sae, g, hook=hook, settings=settings)
        for found, wanted in list(zip(run_with(b, right, *moved, False), expected, strict=True))[::2]:
            check(found, wanted, hook)


def test_names_may_say_the_point_and_other_names_of_it_are_known():
    _, _, g = turned_pair("untied")
    vector = torch.randn(32, generator=generator(0), dtype=torch.float64)
    given = {"blocks.1.hook_resid_post": vector, "blocks.1.attn.hook_z.weight": vector[None], "model.layers.1": vector}
    given |= {"blocks.1.hook_resid_pre.love": vector[None, None]}
    moved = transport(given, g)
    expected = transport({"v": vector}, g, hook="blocks.1.hook_resid_post")["v"]
    for name in ("blocks.1.hook_resid_post", "model.layers.1", "blocks.1.hook_resid_pre.love"):
        assert_exact(moved[name].flatten(), expected, name)
    assert_exact(
        moved["blocks.1.attn.hook_z.weight"],
        transport({"weight": vector[None]}, g, hook="blocks.1.attn.hook_z")["weight"],
    )
    assert_different(moved["blocks.1.attn.hook_z.weight"][0], expected)
    assert transport({"v": vector.float()}, g, hook="model.layers.1")["v"].dtype is torch.float32


def test_points_and_autoencoders_that_cannot_be_carried_are_refused():
    plain = GaugeTransformation.random(tiny_config(), generator(0), "all")
    sae = autoencoder(32, "jumprelu")
    stretched = GaugeTransformation.random(tiny_config(), generator(0), "head")
    parallel = GaugeTransformation.identity(tiny_config(use_parallel_residual=True))
    experts = GaugeTransformation.identity(tiny_config(**ALL["experts"]))
    pre, z = "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"
    for state, g, hook, settings, words in (
        (sae, plain, None, {}, "`hook` must name the point that the autoencoder reads"),
        ({"v": torch.ones(32)}, plain, None, {}, "`hook` must name the point of the network"),
        (
            {"v": torch.ones(32)},
            plain,
            "blocks.3.hook_resid_pre",
            {},
            "`hook` must be blocks.N. with one of hook_resid",
        ),
        ({"v": torch.ones(32)}, plain, "blocks.1.attn.hook_q", {}, "got 'blocks.1.attn.hook_q'"),
        ({"v": torch.ones(31)}, plain, pre, {}, "must have 32 dimensions at 'blocks.1.hook_resid_pre'"),
        ({"v": torch.tensor(1.0)}, plain, pre, {}, "got a tensor of the shape ()"),
        ({"bias": torch.ones(3)}, plain, pre, {}, "`state` must hold `weight` beside the bias `bias` of a probe"),
        ({"v": torch.ones(32)}, parallel, "blocks.1.hook_resid_mid", {}, "its layers have no middle"),
        ({"v": torch.ones(9)}, experts, "blocks.1.mlp.hook_post", {}, "It has hook_resid_pre, hook_resid_mid, hook_"),
        (sae | {"W_dec": torch.ones(32)}, plain, pre, {}, "got a tensor of the shape (32,)"),
        (sae | {"W_skip": torch.ones(32, 32)}, plain, pre, {}, "`W_skip`, of which it is not known how it turns"),
        (sae, plain, pre, {"architecture": "transcoder"}, "got 'transcoder'"),
        (sae, plain, z, {"hook_head_index": 2}, "`hook_head_index=2`"),
        (sae, plain, z, {}, "must say whether `apply_b_dec_to_input` is on"),
        (sae, plain, pre, {"normalize_activations": "layer_norm"}, "a mean over coordinates is another number"),
        (sae, stretched, z, {"normalize_activations": "constant_norm_rescale"}, "must not depend on lengths"),
        (sae, stretched, z, {"rescale_acts_by_decoder_norm": True}, "where layers.1.head_vo stretches them"),
    ):
        with pytest.raises(ValueError) as raised:
            transport(state, g, hook=hook, settings=settings)
        assert words in str(raised.value) and "\n" not in str(raised.value), raised.value
    # In the stream lengths stay, so there it is none of them.
    assert transport(sae, plain, hook=pre, settings={"normalize_activations": "constant_norm_rescale"})


def test_an_autoencoder_that_reads_the_mean_is_refused_unless_it_saw_none():
    sae = autoencoder(32, "jumprelu")
    raw = {"model_from_pretrained_kwargs": {"center_writing_weights": False}, "hook_name": "blocks.1.hook_resid_pre"}
    for settings in (
        {"metadata": raw},
        raw,
        {"metadata": raw | {"model_from_pretrained_kwargs": {}, "model_class_name": "AutoModelForCausalLM"}},
    ):
        with pytest.raises(
            ValueError, match="must not read the mean over coordinates of the residual stream, got a share"
        ):
            check_mean(sae, settings)
    centred = sae | {"W_enc": sae["W_enc"] - sae["W_enc"].mean(dim=0)}
    check_mean(centred, raw)
    check_mean(sae, raw, "blocks.1.attn.hook_z")
    check_mean(sae, raw | {"model_from_pretrained_kwargs": {}})


def test_the_configuration_may_be_given_and_must_fit():
    a, _, g = turned_pair("untied")
    vector, hook = {"v": torch.ones(32)}, "blocks.0.hook_resid_pre"
    moved = transport(vector, g, copy.deepcopy(a.config), hook=hook)
    assert torch.equal(moved["v"], transport(vector, g, hook=hook)["v"])
    with pytest.raises(ValueError, match="must be keyed by frames of the config"):
        transport(vector, g, tiny_config(num_hidden_layers=1), hook=hook)
