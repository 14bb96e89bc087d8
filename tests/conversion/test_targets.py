"""Every stock class to go back to: one function, from any frame, tied where it can be, and loaded without us."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.conversion import certify, convert_model, export_checkpoint, export_model
from rigpt_hf.conversion.export import even_gains
from rigpt_hf.conversion.families import TARGETS
from rigpt_hf.layers_rigpt import FULL, SLIDING
from rigpt_hf.symmetry import GaugeTransformation

from ..models import DTYPES, GAIN_VECTOR, OPTIONS, tiny_model, tokens
from ..processes import run
from ..tolerances import CONVERSION, SYMMETRY
from .families import converted_family, family_model, with_plain_experts


NO_BIASES = dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias"), False)
GATED = {"gated_mlp": True, "hidden_act": "silu", "head_dim": 10}
NATIVE = {"hidden_act": "relu2", "qk_norm": True, "mlp_bias": False}
MOE = {"num_experts": 4, "moe_intermediate_size": 12, "norm_topk_prob": True}
QWEN2_MOE = {"attention_bias": True, "shared_expert_intermediate_size": 20, "norm_topk_prob": False}
QWEN3_MOE = {"qk_norm": True, "qk_norm_gain": "vector", "mlp_only_layers": [1]}
OLMOE = {"qk_norm": True, "qk_norm_over": "all", "head_dim": 8}
GPT_OSS = {"attention_sinks": True, "swiglu_limit": 0.6, "swiglu_alpha": 1.7}
LEARNED = {"position_embedding_type": "learned", "num_key_value_heads": 4}
UNTIED = {"tie_word_embeddings": False}
IN_PART = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.6}}
BY_TYPE = OPTIONS["sliding"] | {
    "rope_parameters": {
        FULL: {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        SLIDING: {"rope_type": "default", "rope_theta": 100.0},
    }
}
GEMMA = GATED | {"mlp_bias": False, "hidden_act": "gelu_pytorch_tanh"}
OLMO2 = GATED | {"mlp_bias": False, "pre_norm": False, "post_norm": True} | OPTIONS["together-vector"]
GLM = GATED | NO_BIASES | {"attention_bias": True}
# The target, and after a dash what is odd about the model: options, and whether embeddings are tied in the result.
MODELS: dict[str, tuple[dict[str, Any], bool]] = {
    "gpt2": (LEARNED, True),
    "gpt2-eps": (LEARNED | {"rms_norm_eps": 0.05, "hidden_act": "relu2"}, True),
    "gpt2-small-heads": (LEARNED | {"head_dim": 4}, True),
    "gpt2-large-heads": (LEARNED | NO_BIASES | {"head_dim": 12}, True),
    "gpt2-narrow": (LEARNED | {"embedding_size": 24, "output_bias": True}, False),
    "gpt2-untied": (LEARNED | UNTIED | {"embedding_size": 40, "output_bias": True}, False),
    "llama": (GATED, True),
    "llama-normed": (GATED | {"embedding_norm": True}, False),
    "mistral": (GATED | NO_BIASES, True),
    "mistral-wide": (GATED | NO_BIASES | {"embedding_size": 40}, False),
    "mistral-window": (GATED | NO_BIASES | {"sliding_window": 6}, True),
    "qwen2-window": (GATED | NO_BIASES | {"attention_bias": True} | OPTIONS["sliding"], True),
    "qwen3": (GATED | {"mlp_bias": False} | GAIN_VECTOR | OPTIONS["sliding"], True),
    "qwen3-native": (GATED | UNTIED | NO_BIASES | {"qk_norm": True}, False),
    "qwen2": (GATED | NO_BIASES | {"attention_bias": True}, True),
    "smollm3": (GATED | NO_BIASES | {"mlp_bias": True, "no_rope_layers": [1, 0, 1]}, True),
    "smollm3-window": (GATED | NO_BIASES | {"layer_types": [FULL, SLIDING, FULL], "sliding_window": 5}, True),
    "arcee": ({"hidden_act": "relu2"}, True),
    "arcee-normed": (UNTIED | {"embedding_norm": True, "embedding_size": 24}, False),
    "apertus": (NATIVE, True),
    "apertus-normed": (NATIVE | NO_BIASES | {"embedding_norm": True, "num_key_value_heads": 1}, False),
    "mixtral": (GATED | NO_BIASES | MOE, True),
    "mixtral-untied": (GATED | NO_BIASES | MOE | UNTIED | {"num_experts_per_tok": 3, "embedding_size": 24}, False),
    "qwen2_moe": (GATED | NO_BIASES | MOE | QWEN2_MOE, True),
    "qwen3_moe": (GATED | NO_BIASES | MOE | QWEN3_MOE, True),
    "qwen3_moe-untied": (GATED | NO_BIASES | MOE | QWEN3_MOE | UNTIED | {"num_experts_per_tok": 3}, False),
    "olmoe": (GATED | NO_BIASES | MOE | OLMOE | {"attention_bias": True, "attention_output_bias": True}, True),
    "olmoe-untied": (GATED | NO_BIASES | MOE | UNTIED | OLMOE | GAIN_VECTOR | {"norm_topk_prob": False}, False),
    "gpt_oss": (GATED | NO_BIASES | MOE | GPT_OSS | {"mlp_bias": True} | OPTIONS["sliding"], True),
    "gpt_oss-untied": (GATED | MOE | UNTIED | GPT_OSS | {"num_experts_per_tok": 3, "embedding_size": 24}, False),
    "gpt_oss-unbiased": (GATED | NO_BIASES | MOE | GPT_OSS, True),
    "ministral": (GATED | NO_BIASES | OPTIONS["sliding"], True),
    "ministral3": (GATED | NO_BIASES | {"sliding_window": 6}, True),
    "ernie4_5": (GATED, True),
    "granite": (GATED, True),
    "gemma": (GEMMA, True),
    "gemma-untied": (GEMMA | UNTIED | {"embedding_size": 24, "embedding_norm": True}, False),
    "gemma2": (GEMMA | {"post_norm": True} | OPTIONS["sliding"] | OPTIONS["soft-caps"], True),
    "gemma3_text": (GEMMA | {"post_norm": True, "final_logit_softcapping": 1.5} | GAIN_VECTOR | BY_TYPE, True),
    "gemma3_text-narrow": (GEMMA | {"post_norm": True, "qk_norm": True, "embedding_size": 24}, False),
    "glm": (GLM | IN_PART, True),
    "glm4": (GLM | IN_PART | {"post_norm": True}, True),
    "olmo2": (OLMO2, True),
    "olmo2-untied": (OLMO2 | UNTIED | {"embedding_size": 40, "qk_norm_gain": None}, False),
    "olmo3": (OLMO2 | BY_TYPE, True),
    "phi3": (GATED | NO_BIASES | IN_PART | {"sliding_window": 6}, True),
    # Maps of queries, keys and values have no biases there.
    "gpt_neo": (LEARNED | OPTIONS["sliding"], True),
    "gpt_neo-no-biases": (LEARNED | NO_BIASES | {"head_dim": 12, "rms_norm_eps": 0.05}, True),
    "nanochat": (NATIVE | {"embedding_norm": True}, True),
    "nanochat-untied": (NATIVE | UNTIED | {"embedding_norm": True, "embedding_size": 32, "head_dim": 10}, False),
}
over_models = pytest.mark.parametrize("name", MODELS)


def target_of(name: str) -> str:
    return name.partition("-")[0]


def turned(model, seed: int = 0, frames: Any = "all"):
    return GaugeTransformation.random(model.config, torch.Generator().manual_seed(seed), frames=frames)(model)


def model_of(name: str, dtype: torch.dtype = torch.float64):
    return tiny_model(dtype=dtype, **MODELS[name][0])


# They remove a direction that a converted model alone leaves free: `test_back.py`.
CENTRED = {name for name, target in TARGETS.items() if target.family.centred and target.family.width is None}


def test_every_target_has_a_model():
    assert {target_of(name) for name in MODELS} == set(TARGETS) - CENTRED and len(CENTRED) == 13
    assert set(MATTERING) <= set(MODELS)


# One result of every kind.
MATTERING = (
    "gpt2-narrow",
    "gpt_neo",
    "llama",
    "smollm3",
    "qwen3",
    "apertus",
    "nanochat",
    "gemma3_text",
    "olmo3",
    "glm",
)
MATTERING += ("phi3", "granite", "qwen2_moe", "gpt_oss")


@over_models
@pytest.mark.by_default(13)
def test_a_target_is_the_same_function_from_every_frame(name):
    model, tied = model_of(name), MODELS[name][1]
    result = export_model(turned(model), target_of(name))
    certificate = certify(model, result, tokens(2, 36))
    print(f"{name}: {certificate.relative_logit_error:.1e}")
    assert certificate.relative_logit_error <= CONVERSION[torch.float64] and certificate.max_abs_logit > 0.5
    assert type(result) is TARGETS[target_of(name)].model_class
    shared = result.get_input_embeddings().weight.data_ptr() == result.get_output_embeddings().weight.data_ptr()
    assert shared is result.config.tie_word_embeddings is tied


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name not in MATTERING)) for name in MODELS]
)
@pytest.mark.by_default(4)
def test_every_tensor_of_a_result_matters(name):
    """So that none could be wrong unseen; of an activation, not what the others make idle."""
    model, ids = with_plain_experts(export_model(model_of(name), target_of(name))), tokens(2, 36)
    expected = model(ids).logits
    idle = ("act_fn.eps", "act_fn.alpha_n")
    absent = (".bias",)  # zeros, in the place of one that RiGPT does not have
    looked = 0
    for key, tensor in model.state_dict().items():
        if key.endswith(idle) or (key.endswith(absent) and not tensor.any()):
            continue
        before = tensor.clone()
        tensor.mul_(1.5).add_(0.3)
        assert (model(ids).logits - expected).abs().max() > 1e-3, key
        tensor.copy_(before)
        looked += 1
    assert looked > 20 and torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("name", "constant", "value"),
    [
        ("apertus", "mlp.act_fn.beta", 0.5),
        ("apertus", "mlp.act_fn.alpha_n", 0.0),
        ("apertus", "mlp.act_fn.alpha_p", 1.0),
        ("apertus", "self_attn.q_norm.weight", 0.5),
    ],
)
def test_a_wrong_constant_shows(name, constant, value, monkeypatch):
    target = TARGETS[name]
    constants = target.constants | {f"model.layers.{{i}}.{constant}": value}
    assert len(constants) == len(target.constants)
    monkeypatch.setitem(TARGETS, name, replace(target, constants=constants))
    assert certify(model_of(name), export_model(model_of(name), name), tokens(2, 36)).relative_logit_error > 1e-3


def test_the_eps_of_a_wider_stream_is_another_one():
    model = tiny_model(**LEARNED)
    result = export_model(model, "gpt2")
    assert result.config.n_embd == 36 and result.config.layer_norm_epsilon == model.config.rms_norm_eps * 32 / 36
    for module in result.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = model.config.rms_norm_eps
    error = certify(model, result, tokens(2, 36)).relative_logit_error
    print(f"{error:.1e}")
    assert error > 1e5 * CONVERSION[torch.float64]


TIED = ("gemma", "qwen2", "arcee-tied", "granite-tied", "ministral3-unscaled")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TIED)
def test_embeddings_stay_tied_in_every_frame(name, dtype, caplog):
    target = "arcee" if name == "arcee-tied" else "llama"
    source, converted = converted_family(name)
    model = turned(converted, 1).to(dtype)
    result = export_model(model, target)
    assert result.config.tie_word_embeddings and "table of its own" not in caplog.text
    assert certify(model, result, tokens(2, 36)).relative_logit_error <= CONVERSION[dtype]
    assert certify(source, result, tokens(2, 36)).relative_logit_error <= SYMMETRY[dtype]
    # Whatever is not the gain of any frame needs a head of its own, and says so.
    with torch.no_grad():
        model.model.project_out.weight += 0.01 * torch.randn_like(model.model.project_out.weight)
    result = export_model(model, target)
    assert not result.config.tie_word_embeddings and "is not symmetric." in caplog.text
    assert certify(model, result, tokens(2, 36)).relative_logit_error <= CONVERSION[dtype]


@pytest.mark.parametrize("size", [24, 32, 40])
def test_a_native_gain_is_tied_whatever_the_lexical_size(size):
    """`project_out = Uᵀ M`; where the lexical space is the smaller one, many symmetric M do."""
    model = tiny_model(**GATED, embedding_size=size)
    metric = torch.randn(32, 32, dtype=torch.float64)
    with torch.no_grad():
        model.model.project_out.weight.copy_(model.model.project_in.weight.T @ (metric + metric.T))
    for source in (model, turned(model)):
        result = export_model(source, "llama")
        assert result.config.tie_word_embeddings
        assert certify(source, result, tokens(2, 36)).relative_logit_error <= CONVERSION[torch.float64]


UNEVEN = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "up_proj.weight", "gate_proj.weight")


@pytest.mark.parametrize("name", ["gpt2-narrow", "llama", "arcee", "apertus"])
def test_gains_even_out_the_columns_of_what_reads_a_norm(name):
    """Which changes no function; where columns are alike, gains are 1."""
    model = model_of(name)
    for uneven in (False, True):
        if uneven:
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if key.endswith(UNEVEN):
                        parameter *= torch.exp2(torch.linspace(-4, 4, 32, dtype=torch.float64))
        result = export_model(model, target_of(name))
        assert certify(model, result, tokens(2, 36)).relative_logit_error <= CONVERSION[torch.float64]
        norms = [module for key, module in result.named_modules() if ".0." in key and hasattr(module, "weight")]
        gains = [norm.weight for norm in norms if norm.weight.dim() == 1 and len(norm.weight) >= 32]
        spread = max((gain.max() / gain.min()).item() for gain in gains)
        print(name, spread)
        assert len(gains) == 2 and (spread > 8) is uneven


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gains_round_no_weight(dtype):
    """What comes back has the same bits: the gains are powers of two."""
    model = model_of("llama", dtype)
    back = convert_model(export_model(model, "llama"))
    tensors, others = model.state_dict(), back.state_dict()
    assert sum(not torch.equal(tensors[name], others[name]) for name in tensors if "proj" in name) == 0
    assert len(tensors) > 40


def rounding_error(weights: torch.Tensor, gains: torch.Tensor) -> float:
    """What four bits with a scale per 32 neighbours do to `W x`, where `x` has gains of its own."""
    from rigpt_hf.evaluation.rounding import rounded

    inputs = torch.randn(500, len(gains), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = inputs @ weights.T
    off = (inputs * gains) @ rounded(weights / gains, group=32).T - exact
    return float(off.norm() / exact.norm())


def test_four_bits_do_less_harm_with_these_gains():
    generator = torch.Generator().manual_seed(0)
    even = torch.randn(40, 64, generator=generator, dtype=torch.float64)
    uneven = even * torch.exp2(1.5 * torch.randn(64, generator=generator, dtype=torch.float64))
    for weights, better in ((uneven, True), (even, False)):
        gains = even_gains(weights.square().sum(0))
        assert torch.equal(gains.log2(), gains.log2().round())
        errors = rounding_error(weights, torch.ones(64)), rounding_error(weights, gains)
        print(errors)
        assert (errors[1] < 0.9 * errors[0]) is better
    assert torch.equal(even_gains(torch.zeros(3)), torch.ones(3))
    assert torch.isfinite(even_gains(torch.tensor([0.0, 1.0, 1e30]))).all()


def test_the_class_that_a_model_came_from_is_recorded(tmp_path):
    for name in ("gpt2", "mistral", "qwen2", "arcee", "nanochat-tied"):
        model = turned(converted_family(name)[1])
        model.save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["converted_from"] == target_of(name)
        result = export_model(type(model).from_pretrained(tmp_path / name, dtype=torch.float64))
        assert type(result) is type(family_model(name))
    for origin, record in (
        (None, "no record of its class"),
        ("rigpt", "come from 'rigpt', to which there is no way back"),
    ):
        for options, advice in (
            (GATED, "Take 'llama', 'ernie4_5' or 'granite', which have its options, or 'auto' for"),
            (NATIVE | UNTIED, "Take 'apertus', which has its options, or 'auto' for"),
            (
                {"depth_solver": "euler"},
                "No class has all of its options: not .*: `depth_solver=.*`rigpt families` says",
            ),
        ):
            model = tiny_model(**options, converted_from=origin)
            message = f"^`target` must be .* has {record}, and none was given. {advice}"
            with pytest.raises(ValueError, match=message) as caught:
                export_model(model)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    # A record that is not true is no more than a wish.
    with pytest.raises(ValueError, match="`gated_mlp=True` and .* no counterpart in GPT-2.*Try `target='llama'`"):
        export_model(tiny_model(**GATED, converted_from="gpt2"))


@pytest.mark.parametrize(
    ("options", "best", "reason"),
    [
        (
            GATED | NO_BIASES,
            "llama",
            "tied embeddings and 50,336 numbers in matrices, no more than mistral with 50,336, qwen2 with 50,336, "
            "ministral with 50,336, 7 more",
        ),
        (GATED | NO_BIASES | {"converted_from": "mistral"}, "mistral", "no more than llama with 50,336"),
        (GATED | NO_BIASES | {"attention_bias": True}, "llama", "no more than qwen2 with"),
        (GATED | NO_BIASES | {"attention_bias": True, "converted_from": "qwen2"}, "qwen2", "no more than llama with"),
        (NATIVE | NO_BIASES | {"embedding_norm": True}, "nanochat", "no more than apertus with"),
        (
            NATIVE | UNTIED,
            "apertus",
            "a head of its own and 37,696 numbers in matrices, and no other class has its options",
        ),
        (LEARNED, "gpt2", "no more than gpt_neo with"),
    ],
)
@pytest.mark.by_default(3)
def test_auto_takes_the_class_in_which_a_model_is_smallest(options, best, reason, caplog):
    model = tiny_model(**options)
    sizes = {}
    for name in TARGETS:
        try:
            sizes[name] = sum(p.numel() for p in export_model(model, name).state_dict().values() if p.dim() > 1)
        except ValueError:
            continue
    caplog.clear()
    result = export_model(model, "auto")
    assert type(result) is TARGETS[best].model_class
    assert sizes[best] == min(sizes.values()) and (len(sizes) == 1) is ("no other" in reason)
    # Nothing is said of the classes that were tried besides; apertus would have to untie this one.
    (said,) = [record.message for record in caplog.records if record.name.startswith("rigpt_hf")]
    assert len(said) < 300 and said.startswith(f"`target='auto'` is '{best}': it is exact with ") and reason in said


def test_what_no_class_can_express_is_refused_by_auto():
    for options, message in (
        (
            {"depth_solver": "euler"},
            "there is none: not .*: .*`depth_solver='euler'`; not .*: `.*`rigpt families` says",
        ),
        ({"hidden_act": "relu2"} | BY_TYPE, "there is none: not "),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            export_model(tiny_model(**options), "auto")
        assert len(str(caught.value)) < 800 and str(caught.value).count("; not ") == 2


WITHOUT_PACKAGE = """
import sys
sys.modules["rigpt_hf"] = None  # an import of it fails
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert type(model).__module__.startswith("transformers."), type(model)
    logits = model(torch.load(f"{folder}/input_ids.pt")).logits
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(torch.load(f"{folder}/input_ids.pt")[:, :5], **settings)
    torch.save((logits.detach(), tokens), f"{folder}/output.pt")
"""


# One class of every kind, and the others where tests marked `full` run. The library multiplies by experts in at most
# single precision.
FOLDERS = ("gpt2", "gpt_neo", "llama", "qwen3", "apertus", "nanochat", "gemma3_text", "olmo3", "glm")
OTHERS = [name for name in MODELS if name in TARGETS and name not in FOLDERS and "num_experts" not in MODELS[name][0]]


@pytest.mark.slow
@pytest.mark.parametrize("names", [FOLDERS, pytest.param(OTHERS, marks=pytest.mark.full)], ids=["some", "others"])
def test_folders_load_without_the_package(names, tmp_path):
    load_without_the_package({name: turned(model_of(name)) for name in names}, tmp_path)


def load_without_the_package(models: dict[str, RiGPTForCausalLM], tmp_path: Path) -> None:
    """Folders of the targets that models are exported to are the same functions where only the library is there."""
    expected = {}
    for name, model in models.items():
        model.save_pretrained(tmp_path / f"{name}-rigpt")
        certificate = export_checkpoint(tmp_path / f"{name}-rigpt", tmp_path / name, target=name)
        assert certificate.passed and certificate.dtype == "float64"
        assert not list((tmp_path / name).glob("*.py"))
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())
        torch.save(tokens(2, 30), tmp_path / name / "input_ids.pt")
        settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        expected[name] = model(tokens(2, 30)).logits.detach(), model.generate(tokens(2, 30)[:, :5], **settings)
    process = run("-c", WITHOUT_PACKAGE, *(tmp_path / name for name in models), cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    for name in models:
        logits, generated = torch.load(tmp_path / name / "output.pt")
        error = (logits - expected[name][0]).abs().max() / expected[name][0].abs().max()
        print(f"{name}: {error:.1e}")
        # Outside of a certificate, stock norms and rotations are computed in float32 whatever the weights are in.
        assert error <= CONVERSION[torch.float32] and torch.equal(generated, expected[name][1])
