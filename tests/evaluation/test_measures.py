"""Outliers, rounding, frames, invariance and speed: closed forms, and what must and must not change them."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis
from transformers import OPTConfig, OPTForCausalLM

from rigpt_hf.conversion import convert_model
from rigpt_hf.evaluation.frames import FRAMES, cosine_transform, hadamard, in_frame
from rigpt_hf.evaluation.measures.invariance import invariance
from rigpt_hf.evaluation.measures.outliers import ActivationStats, outliers
from rigpt_hf.evaluation.measures.perplexity import perplexity
from rigpt_hf.evaluation.measures.quantization_robustness import bits_of, quantization_robustness, quantized
from rigpt_hf.evaluation.measures.throughput import throughput
from rigpt_hf.evaluation.rounding import matrices_of, rounded, rows_of
from tests.conversion.sources import stock_model
from tests.evaluation.small import WORDS
from tests.evaluation.toys import rows, tiny_gpt2, word_tokenizer
from tests.models import OPTIONS, tiny_model
from tests.tolerances import SYMMETRY


# An odd size keeps the median from lying between two values.
D = 33


def test_outliers_of_known_vectors():
    """One coordinate of size c among ones: every measure has a closed form."""
    c, x = 10.0, torch.ones(D, dtype=torch.float64)
    x[0] = c
    collected = ActivationStats()
    collected.add(torch.stack([x, -2 * x]))  # scale and sign of a token play no part per token
    found = collected.result()["per_token"]
    p = 1 / D  # a two-point law: excess kurtosis 1 / (p (1 - p)) - 6
    assert found["excess_kurtosis"] == pytest.approx(1 / (p * (1 - p)) - 6)
    assert found["max_over_median"] == pytest.approx(c)
    assert found["crest_factor"] == pytest.approx(c / math.sqrt((c**2 + D - 1) / D))


def test_pooled_outliers_are_those_of_all_values():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, D, generator=generator, dtype=torch.float64) ** 3 + 0.5
    collected = ActivationStats()
    for part in x.split(77):
        collected.add(part)
    found = collected.result()["pooled"]
    values = x.flatten().numpy()
    assert found["excess_kurtosis"] == pytest.approx(kurtosis(values), rel=1e-9)
    assert found["crest_factor"] == pytest.approx(np.abs(values).max() / np.sqrt((values**2).mean()), rel=1e-12)
    assert found["max_over_median"] == pytest.approx(np.abs(values).max() / np.median(np.abs(values)), rel=6e-3)


def test_vectors_without_a_measure_do_not_spoil_the_mean():
    """Zeros, a constant, and one that is mostly zeros, as a ReLU leaves them, beside one that has all measures."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(1, D, generator=generator, dtype=torch.float64)
    sparse = torch.zeros(1, D, dtype=torch.float64)
    sparse[0, :3] = 1.0
    alone, among, nothing = ActivationStats(), ActivationStats(), ActivationStats()
    alone.add(plain)
    among.add(torch.cat([plain, torch.zeros(2, D), torch.full((2, D), 0.3), sparse]))
    nothing.add(torch.zeros(3, D))
    expected, found = alone.result()["per_token"], among.result()["per_token"]
    sparse_kurtosis = 1 / (3 / D * (1 - 3 / D)) - 6
    assert found["excess_kurtosis"] == pytest.approx((expected["excess_kurtosis"] + sparse_kurtosis) / 2)
    assert found["max_over_median"] == pytest.approx((expected["max_over_median"] + 2) / 3)
    assert all(value is None for kind in nothing.result().values() for value in kind.values())


def test_the_median_of_an_even_number_lies_between_two():
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    collected = ActivationStats()
    collected.add(x)
    sizes = x.abs().numpy()
    expected = (sizes.max(-1) / np.median(sizes, axis=-1)).mean()
    assert collected.result()["per_token"]["max_over_median"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["stock", "rigpt"])
def test_outliers_are_found_where_they_are(kind):
    """A coordinate of the stream that the embeddings blow up shows in the stream, and where the stream is read."""
    model = tiny_gpt2() if kind == "stock" else tiny_model()
    calm = outliers(model, rows(), context=20)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[:, 5] += 40.0
    wild = outliers(model, rows(), context=20)
    assert wild["summary"]["excess_kurtosis"] > 20 > abs(calm["summary"]["excess_kurtosis"])
    assert wild["stream"][0]["all"]["per_token"]["crest_factor"] == pytest.approx(math.sqrt(32), rel=0.1)
    layers = model.config.num_hidden_layers
    assert len(calm["stream"]) == layers + 1
    assert len(calm["linear_inputs"]) == (4 * layers + 1 if kind == "stock" else 6 * layers + 1)
    assert calm["protocol"] == {
        "context": 20,
        "windows": 12,
        "tokens": 240,
        "not covered": [],
        "stream": "before the final norm",
    }


def test_the_summary_has_a_sign():
    """Coordinates of one size have a kurtosis of -2, and are no outliers."""
    for tails in ("light", "heavy"):
        model = tiny_model(num_hidden_layers=1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.zero_()
                if "embed_tokens" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).sign())
                    if tails == "heavy":
                        parameter[:, 3] *= 9
        found = outliers(model, rows(), context=20)["summary"]["excess_kurtosis"]
        assert found == pytest.approx(-2, abs=0.2) if tails == "light" else found > 10


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_stream_is_the_one_before_the_final_norm(family):
    model = tiny_gpt2() if family == "gpt2" else stock_model("llama")
    layers, norm = (
        (model.transformer.h, model.transformer.ln_f) if family == "gpt2" else (model.model.layers, model.model.norm)
    )
    with torch.no_grad():
        norm.weight[7] = 30.0
    data, seen = rows(3, 20), {"stream": [], "norm": []}
    for key, module in (("stream", layers[-1]), ("norm", norm)):

        def keep(module, arguments, output, key=key):
            state = output if isinstance(output, torch.Tensor) else output[0]
            seen[key].append(kurtosis(state[0].detach().double().numpy(), axis=-1).mean())

        module.register_forward_hook(keep)
    found = outliers(model, data)
    own = {"stream": found["stream"][-1], "norm": found["final_norm"]}
    for key, each in own.items():
        assert each["all"]["per_token"]["excess_kurtosis"] == pytest.approx(np.mean(seen[key]), rel=1e-5)
    assert np.mean(seen["norm"]) > np.mean(seen["stream"]) + 5, "the two must differ for this to say something"
    if family == "llama":
        # The conversion has the same stream, in the same basis, and no gain.
        other = outliers(convert_model(model), data)
        for a, b in zip(found["stream"], other["stream"], strict=True):
            one, two = (each["all"]["per_token"]["excess_kurtosis"] for each in (a, b))
            assert one == pytest.approx(two, abs=1e-4)
        assert other["final_norm"]["all"]["per_token"]["excess_kurtosis"] < 5


def test_a_norm_at_the_end_of_a_layer_is_part_of_the_stream():
    config = OPTConfig(
        vocab_size=61, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, do_layer_norm_before=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model, data = OPTForCausalLM(config).eval(), rows(2, 20)
    with torch.no_grad():
        model.model.decoder.layers[-1].final_layer_norm.weight[3] = 30.0
        states = [model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0] for row in data]
    found = outliers(model, data)
    expected = np.mean([kurtosis(each.double().numpy(), axis=-1).mean() for each in states])
    assert "final_norm" not in found and found["protocol"]["stream"] == "as the model gives it"
    assert found["stream"][-1]["all"]["per_token"]["excess_kurtosis"] == pytest.approx(expected, rel=1e-5)
    assert found["summary"]["excess_kurtosis"] == pytest.approx(expected, rel=1e-5) and expected > 5


def test_the_first_position_is_told_apart():
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.wpe.weight[0, 3] = 500.0
    found = outliers(model, rows(), context=20)["stream"][0]
    assert found["all"]["pooled"]["crest_factor"] > 3 * found["without_first"]["pooled"]["crest_factor"]
    assert found["all"]["per_token"]["excess_kurtosis"] > found["without_first"]["per_token"]["excess_kurtosis"] + 1


def test_hadamard_matrices_are_even():
    for n in (1, 2, 4, 12, 20, 24, 28, 36, 64, 72, 96, 192, 576, 768, 960):
        matrix = hadamard(n)
        assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, n**-0.5), atol=1e-12)


def test_other_sizes_are_orthogonal_and_nearly_even():
    for n in (3, 6, 9, 50, 100, 184):
        matrix = hadamard(n)
        assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
        assert float(matrix.abs().max()) <= math.sqrt(2 / n) + 1e-12
    assert np.allclose(cosine_transform(5) @ cosine_transform(5).T, np.eye(5))


def test_frames_do_not_change_the_function():
    ids = torch.tensor(rows(2, 12))
    for option in ("learned-projected", "rotary", "recipe", "squared-distance"):
        model = tiny_model(**OPTIONS[option]).double()
        for frame in FRAMES:
            turned = in_frame(model, frame, generator=torch.Generator().manual_seed(1), input_ids=ids)
            before, after = (each(input_ids=ids, use_cache=False).logits for each in (model, turned))
            assert float((before - after).abs().max() / before.abs().max()) < SYMMETRY[torch.float64]
            moved = (model.model.layers[0].mlp.up_proj.weight - turned.model.layers[0].mlp.up_proj.weight).abs().max()
            assert (float(moved) > 0.01) is (frame != "identity")


def test_principal_axes_hold_most_in_few_coordinates():
    model, ids = tiny_model().double(), torch.tensor(rows(4, 20))
    turned = in_frame(model, "pca", input_ids=ids)
    states = torch.cat([s.flatten(0, 1) for s in turned(ids, output_hidden_states=True).hidden_states])
    states = states / states.square().mean(-1, keepdim=True).sqrt()
    moments = states.T @ states / len(states)
    off = moments - torch.diag(moments.diagonal())
    assert float(off.abs().max()) < 1e-9 * float(moments.diagonal().max())


def test_rounding_is_to_the_nearest_of_a_grid():
    x = torch.tensor([[7.0, -3.4, 0.6, 0.4], [0.0, 0.0, 0.0, 0.0]])
    assert rounded(x, 4).tolist() == [[7.0, -3.0, 1.0, 0.0], [0.0] * 4]
    assert rounded(x, 4, group=2)[0].tolist() == pytest.approx([7.0, -3.0, 0.6, 0.6 * 5 / 7])
    with pytest.raises(ValueError, match="`group` must divide the 4 numbers of a row, got 3"):
        rounded(x, 4, group=3)
    # In half precision the grid is the same one, and only what is put out is rounded to it.
    wide = torch.randn(20, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(rounded(wide, 8), rounded(wide.float(), 8).bfloat16())
    with pytest.raises(ValueError, match="`bits` must be at least 2"):
        rounded(x, 1)


def test_quantized_models_compute_with_rounded_numbers():
    model = tiny_gpt2()
    rough = quantized(model, 4, 8, leave=("c_proj",))
    module, original = rough.transformer.h[0].attn.c_attn, model.transformer.h[0].attn.c_attn
    assert torch.equal(module.weight.T, rounded(original.weight.T, 4))
    assert torch.equal(rough.transformer.h[0].attn.c_proj.weight, model.transformer.h[0].attn.c_proj.weight)
    assert torch.equal(rough.lm_head.weight, model.lm_head.weight)
    x = torch.randn(2, 3, 32)
    expected = rounded(x, 8) @ module.weight + module.bias
    assert torch.allclose(module(x), expected, atol=1e-6)
    assert len(matrices_of(model)) == 8 and rows_of(original).shape == (96, 32)


def test_more_bits_lose_less_and_many_lose_nothing():
    model, data = tiny_model(), rows()
    result = quantization_robustness(model, data, schemes=("W16A16", "W12A12", "W6A6", "W3A3"), frames=("identity",))
    increases = [abs(each["increase"]) for each in result["rounded"]["identity"].values()]
    assert increases[0] == 0
    assert increases[1] < 1e-3 < increases[3] and increases[2] < increases[3]
    assert result["loss"] == pytest.approx(perplexity(model, data)["loss"], rel=1e-12)


def test_turning_away_an_outlier_helps():
    """A stock model whose stream has one huge coordinate: in its own frame activations of 4 bits keep nothing else."""
    model, data = tiny_gpt2(), rows()
    with torch.no_grad():
        model.transformer.wte.weight[:, 7] += 30.0
    result = quantization_robustness(model, data, schemes=("W16A4",), frames=("identity", "haar", "hadamard"))
    assert result["protocol"]["converted"] is True
    lost = {frame: each["W16A4"]["increase"] for frame, each in result["rounded"].items()}
    assert abs(lost["haar"]) < 0.8 * abs(lost["identity"]), lost


def test_in_half_precision_a_change_of_frame_is_not_taken_for_rounding():
    model = tiny_model().bfloat16()
    result = quantization_robustness(model, rows(), schemes=("W16A16",), frames=("identity", "haar"))
    assert [each["W16A16"]["increase"] for each in result["rounded"].values()] == [0.0, 0.0]


def test_modules_of_a_model_and_of_its_conversion_are_left_alone():
    def lost(*leave: str) -> list[float]:
        found = quantization_robustness(
            tiny_gpt2(), rows(), schemes=("W2A16",), frames=("identity", "haar"), modules_to_not_convert=leave
        )
        assert found["protocol"]["left alone"][1 : 1 + len(leave)] == list(leave)
        return [each["W2A16"]["increase"] for each in found["rounded"].values()]

    (stock, turned), both = lost(), lost("c_proj", "down_proj")
    assert both[0] != stock and both[1] != turned
    own, other = lost("c_proj"), lost("down_proj")
    assert (own[0], other[1]) == pytest.approx((both[0], both[1])) and (own[1], other[0]) == pytest.approx(
        (turned, stock)
    )


def test_frames_of_quantization_are_measured_on_the_same_function():
    result = quantization_robustness(tiny_model().double(), rows(), schemes=("W16A16",))
    assert list(result["rounded"]) == list(FRAMES)
    for each in result["rounded"].values():
        assert abs(each["W16A16"]["increase"]) < 1e-11
    assert list(quantization_robustness(tiny_gpt2(), rows(), schemes=("W8A8",))["rounded"]) == ["identity"]


def test_what_weights_lose_is_made_good(monkeypatch):
    asked = []

    def tokens_to_calibrate_on(tokenizer, tokens: int, context: int) -> torch.Tensor:
        asked.append(context)
        return torch.tensor(rows(64, context))

    monkeypatch.setattr(
        "rigpt_hf.evaluation.measures.quantization_robustness.calibration_tokens", tokens_to_calibrate_on
    )
    result = quantization_robustness(
        tiny_model(), rows(), word_tokenizer(WORDS), schemes=("W8A16", "W3A16", "W16A4"), frames=("hadamard", "gptq")
    )
    rounded_to_nearest, made_good = (result["rounded"][frame] for frame in ("hadamard", "gptq"))
    assert list(made_good) == ["W8A16", "W3A16"] and asked
    assert abs(made_good["W8A16"]["increase"]) < 1e-2 < 10 * abs(made_good["W3A16"]["increase"])
    assert made_good["W3A16"]["loss"] != rounded_to_nearest["W3A16"]["loss"]
    assert "documentation" in result["protocol"]["gptq"]


def test_refusals_of_quantization():
    for options, message in (
        ({"schemes": ("W4",)}, "`schemes` must be such as W4A8, with 2 to 16 bits each, got 'W4'"),
        ({"schemes": ("W32A32",)}, "`schemes` must be such as W4A8, with 2 to 16 bits each, got 'W32A32'"),
        ({"group_size": -8}, "`group_size` must be 0, for whole rows, or the size of a group, got -8"),
        (
            {"modules_to_not_convert": ("c_prjo",)},
            "`modules_to_not_convert` must name some of down_proj, .*v_proj, got c_prjo",
        ),
        ({"schemes": ("W1A8",)}, "`schemes` must be such as W4A8"),
        ({"frames": ("sideways",)}, "`frames` must be among identity, haar, hadamard, pca, gptq, got 'sideways'"),
        ({"frames": ("gptq",)}, "`frames` must be without 'gptq' where there is no tokenizer"),
        ({"group_size": 5}, "`group_size` must divide the 32 numbers of a row of .*q_proj, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            quantization_robustness(tiny_model(), rows(), **({"frames": ("identity",)} | options))
    assert bits_of("W4A16") == (4, 16)


@pytest.mark.parametrize(
    "option", ["recipe", *(pytest.param(name, marks=pytest.mark.full) for name in ("learned-projected", "gated"))]
)
def test_invariance_of_rigpt(option):
    model = tiny_model(**OPTIONS[option])
    result = invariance(model, rows(), draws=2)
    print(result["largest"])
    assert {"stream", "head_qk", "head_vo", "neurons"} <= set(result["errors"])
    assert result["largest"]["float64"] < SYMMETRY[torch.float64]
    assert 1e-12 < result["largest"]["float32"] < SYMMETRY[torch.float32]
    assert next(model.parameters()).dtype is torch.float64, "what is measured is left as it is"


def test_a_stock_model_is_not_invariant():
    model = tiny_gpt2()
    result = invariance(model, rows(), dtypes=("float64",), draws=2)
    assert result["largest"]["float64"] > 0.05 and result["protocol"]["stock"] is True
    assert invariance(convert_model(model), rows(), dtypes=("float64",), draws=1)["largest"]["float64"] < 1e-11


def test_frames_that_nothing_turns_are_left_out():
    """Translations keep no lengths, so none is drawn."""
    found = invariance(tiny_model(position_embedding_type="learned"), rows(), dtypes=("float64",), draws=2)
    assert {"stream", "neurons"} <= set(found["errors"]) and not [name for name in found["errors"] if "shift" in name]
    assert all(each["float64"]["largest"] > 0 for each in found["errors"].values())
    with pytest.raises(ValueError, match="`frame` must name one that turns with all lengths kept, got key_shift"):
        invariance(tiny_model(position_embedding_type="learned"), rows(), frame="key_shift", draws=1)


def test_refusals_of_invariance():
    for options, message in (
        ({"frame": "lexical"}, "`frame` must be among stream, .*, got 'lexical'"),
        ({"dtypes": ("int8",)}, "`dtypes` must be names of floating-point dtypes, such as 'float64', got 'int8'"),
        ({"dtypes": ()}, "`dtypes` must name at least one dtype"),
        ({"draws": 0}, "`draws` must be at least 1, got 0"),
        ({"frame": []}, "`frame` must name at least one frame"),
        ({"context": 1}, "`context` must be at least 2, got 1"),
        ({"texts": [[3]]}, "`predictions` must hold a text of at least two tokens, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            invariance(tiny_model(), **({"texts": rows()} | options))


@pytest.mark.full
@pytest.mark.slow
def test_peak_memory_grows_with_the_model():
    models = {"large": tiny_gpt2(n_embd=1024, n_head=4), "small": tiny_gpt2()}
    found = throughput(models, prompt=4, new_tokens=2, turns=3)["models"]
    weights = 4 * models["large"].num_parameters()
    assert found["large"]["peak_memory"] > found["small"]["peak_memory"] + 0.5 * weights


def test_refusals_of_throughput():
    for options, message in (
        ({"models": {}}, "`models` must hold at least one model"),
        ({"turns": 2}, "`turns` must be at least 3, got 2"),
        ({"prompt": 60, "new_tokens": 10}, "`prompt` and `new_tokens` must fit into the 64 positions of rigpt"),
    ):
        with pytest.raises(ValueError, match=message):
            throughput(**({"models": {"rigpt": tiny_gpt2()}, "memory": False} | options))
