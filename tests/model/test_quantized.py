"""Models of codes: the same function as of the weights behind them, wherever they are loaded, moved or trained."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from rigpt_hf import RiGPTForCausalLM, RiGPTForSequenceClassification, RiGPTModel
from rigpt_hf.packed_rigpt import Coded, QuantizedEmbedding, QuantizedLinear
from rigpt_hf.quantized_rigpt import RiGPTQuantizationConfig, RiGPTQuantizer, to_quantized
from tests.codes import CODED, codes_of, quantized
from tests.model.agreement import assert_different, assert_same, difference, recompute_activations
from tests.model.test_remote_code import WITHOUT_PACKAGE, load
from tests.models import COVER, EACH, over, tiny_model, tokens
from tests.processes import run
from tests.tolerances import DISTANCE, SYMMETRY


over_options = pytest.mark.parametrize("option", CODED)


def alike(one: nn.Module, other: nn.Module):
    """Every stored number, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second) and len(first) > 50
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@over_options
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_function_is_that_of_the_weights_behind_the_codes(option, dtype):
    model = tiny_model(dtype=dtype, **CODED[option])
    codes = codes_of(model)
    coded = to_quantized(model, codes, RiGPTQuantizationConfig(group=32))
    plain = copy.deepcopy(coded).dequantize(dtype)
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear and not hasattr(plain.config, "quantization_config")
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in model.named_parameters()}
    for shape in ((2, 9), (1, 1)):
        assert_same(coded(tokens(*shape)).logits, plain(tokens(*shape)).logits, str(shape))
    assert_different(coded(tokens(2, 9)).logits, model(tokens(2, 9)).logits, "what rounds nothing")
    name = "model.layers.1.self_attn.o_proj"
    expected = codes[name].codes * codes[name].scales.repeat_interleave(32, 1) * codes[name].gain
    assert difference(plain.get_submodule(name).weight, expected.to(dtype)) <= SYMMETRY[torch.float32]
    other = codes | {name: replace(codes[name], gain=codes[name].gain.flip(0))}
    changed = to_quantized(model, other, RiGPTQuantizationConfig(group=32))
    assert_different(changed(tokens(2, 9)).logits, coded(tokens(2, 9)).logits, "another gain")


@over(EACH, COVER)
@torch.no_grad()
def test_every_option_has_codes(option):
    model = tiny_model(**COVER[option])
    codes, config = codes_of(model), RiGPTQuantizationConfig(group=32)
    if model.config.depth_interpolation == "linear":
        with pytest.raises(ValueError, match="adds weights of neighbouring layers, and codes cannot be added"):
            to_quantized(model, codes, config)
        return
    coded = to_quantized(model, codes, config)
    logits = coded(tokens(2, 9)).logits
    assert_different(logits, model(tokens(2, 9)).logits, "what rounds nothing")
    assert_same(logits, coded.dequantize(torch.float64)(tokens(2, 9)).logits)


@over_options
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_gives_back_every_bit(option, dtype, tmp_path, monkeypatch):
    model = quantized(option, dtype)
    model.save_pretrained(tmp_path / "codes")
    with safe_open(tmp_path / "codes" / "model.safetensors", framework="pt") as file:
        held = {name: file.get_tensor(name) for name in set(file.keys())}
    tied = model.config.tie_word_embeddings
    assert ("lm_head.codes" in held) != tied and "model.embed_tokens.codes" in held
    assert not any(name.endswith("proj.weight") for name in held)
    name = "model.layers.0.mlp.down_proj"
    columns = model.get_submodule(name).in_features
    assert held[f"{name}.codes"].dtype == torch.uint8 and held[f"{name}.codes"].shape == (32, columns // 2)
    assert held[f"{name}.scales"].dtype == torch.float16
    assert held["model.embed_tokens.codes"].dtype == torch.int8
    assert not any(held[one].shape[-1] == 0 for one in held), "the empty tensor that carries a dtype"
    written = json.loads((tmp_path / "codes" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "rigpt" and written["dtype"] == str(dtype)[6:]
    assert "dequantize" not in written["quantization_config"]

    def no_weights(*_):
        raise AssertionError("a weight was made")

    monkeypatch.setattr(Coded, "dense", no_weights)
    monkeypatch.setattr(Coded, "spread", no_weights)
    for auto_class in (RiGPTForCausalLM, AutoModelForCausalLM):
        again, report = auto_class.from_pretrained(tmp_path / "codes", output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        alike(again, model)
    monkeypatch.undo()
    assert again.dtype == model.dtype == dtype
    assert (again.lm_head.codes is again.model.embed_tokens.codes) == tied
    assert not any(p.requires_grad for n, p in again.named_parameters() if n.endswith(("codes", "scales", "gain")))
    assert again.model.layers[0].mlp.up_proj.bias.requires_grad
    with torch.no_grad():
        assert torch.equal(again(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    again.save_pretrained(tmp_path / "again")
    alike(RiGPTForCausalLM.from_pretrained(tmp_path / "again"), model)


def test_other_classes_read_the_same_folder(tmp_path):
    model = quantized("tied", keep=("model.layers.0.mlp.up_proj",))
    model.save_pretrained(tmp_path)
    base = RiGPTModel.from_pretrained(tmp_path)
    assert type(base.layers[0].mlp.up_proj) is nn.Linear and type(base.layers[1].mlp.up_proj) is QuantizedLinear
    assert type(base.embed_tokens) is QuantizedEmbedding
    states = model.model(tokens(2, 9)).last_hidden_state
    assert torch.equal(base(tokens(2, 9)).last_hidden_state, states)
    torch.manual_seed(0)
    classifier = RiGPTForSequenceClassification.from_pretrained(tmp_path)
    assert type(classifier.score) is nn.Linear
    assert torch.equal(classifier.model(tokens(2, 9)).last_hidden_state, states)


@pytest.mark.parametrize("way", ["remote", "package"])
def test_a_fresh_process_loads_a_folder(way, tmp_path):
    model = quantized("tied")
    model.save_pretrained(tmp_path / "model")
    torch.save(tokens(2, 7), tmp_path / "model" / "input_ids.pt")
    is_remote = way == "remote"
    process = load(
        tmp_path / "model", WITHOUT_PACKAGE if is_remote else "import rigpt_hf\n", trust="trust" if is_remote else ""
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip().splitlines()[-1].startswith("transformers_modules." if is_remote else "rigpt_hf.")
    assert torch.equal(torch.load(tmp_path / "model" / "output.pt"), model(tokens(2, 7)).logits)
    alike(RiGPTForCausalLM.from_pretrained(tmp_path / "model" / "again"), model)


BOTH = """
import sys, torch
from transformers import AutoModelForCausalLM
order, folder = sys.argv[1:]
if order == "package":
    import rigpt_hf
remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
import rigpt_hf
from rigpt_hf import RiGPTForCausalLM
own = RiGPTForCausalLM.from_pretrained(folder)
ids = torch.tensor([[5, 6, 7]])
assert torch.equal(own(ids).logits, remote(ids).logits) and own.dtype == remote.dtype
print(type(remote).__module__, type(own).__module__)
"""


@pytest.mark.parametrize("order", ["package", "remote"])
def test_the_package_and_the_code_of_a_folder_get_along(order, tmp_path):
    quantized("tied", torch.bfloat16).save_pretrained(tmp_path / "model")
    process = run("-c", BOTH, order, tmp_path / "model", cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]


@torch.no_grad()
def test_casting_keeps_what_is_stored():
    model = quantized("tied", position_embedding_type="learned")
    expected, before = model(tokens(2, 7)).logits, {name: t.clone() for name, t in model.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        model = model.to(dtype)
        assert model.dtype == dtype == model(tokens(1, 3)).logits.dtype
        assert model.lm_head.codes is model.model.embed_tokens.codes
        for name, tensor in model.state_dict().items():
            if not name.endswith("bias"):
                assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    for name, module in model.named_modules():
        if getattr(module, "bias", None) is not None:
            module.bias.copy_(before[f"{name}.bias"])
    assert torch.equal(model(tokens(2, 7)).logits, expected)
    assert model.num_parameters() > 10_000 and model.device.type == "cpu"


@over_options
@torch.no_grad()
def test_loading_with_the_wish_for_weights_gives_them(option, tmp_path):
    model = quantized(option, torch.bfloat16)
    model.save_pretrained(tmp_path)
    config = RiGPTQuantizationConfig(dequantize=True)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        unchanged = RiGPTForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert type(unchanged.model.embed_tokens) is QuantizedEmbedding
    stored = type(model.config).from_pretrained(tmp_path)
    stored.quantization_config["dequantize"] = True
    plain = RiGPTForCausalLM.from_pretrained(tmp_path, config=stored)
    assert type(plain.model.embed_tokens) is nn.Embedding and plain.dtype == torch.float32
    assert_same(plain(tokens(2, 7)).logits, model.to(torch.float32)(tokens(2, 7)).logits)


BAD = {
    "bits": ({"bits": 5}, r"`bits` of a `quantization_config` must be 3, 4 or 8, got 5\."),
    "bool": ({"bits": True}, r"`bits` of a .* must be 3, 4 or 8, got True\."),
    "group": ({"group": 48}, r"`group` of a .* must be None, 32, 64 or 128, got 48\."),
    "table": ({"table_bits": None}, r"`table_bits` of a .* must be 4 or 8, got None\."),
    "activations": ({"activation_bits": 16}, r"`activation_bits` of a .* must be None, 4 or 8, got 16\."),
    "names": (
        {"modules_with_gain": "o_proj"},
        r"`modules_with_gain` of a .* must list names of modules, got 'o_proj'\.",
    ),
    "exceptions": ({"exceptions": {"x": {"bits": 4}}}, r"`exceptions` must give `bits` and `group` of 'x'"),
    "recipe": ({"recipe": 3}, r"`recipe` must be a dictionary"),
    "method": ({"quant_method": "gptq"}, r"`quant_method` of a .* must be 'rigpt', got 'gptq'\."),
    "unknown": ({"zeros": 1}, r"must have fields that are known here, got 'zeros'\. Load it with the version"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_config_says_what_is_wrong(case):
    fields, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        RiGPTQuantizationConfig(**fields)


def test_what_cannot_be_honoured_is_refused(tmp_path, monkeypatch):
    model, name = tiny_model(dtype=torch.float32), "model.layers.0.mlp.up_proj"
    codes = codes_of(model)
    config, one = RiGPTQuantizationConfig(group=32), codes[name]
    for changes, message in {
        r"`codes` must be those of linear maps and tables, got 'model.norm'\.": codes | {"model.norm": one},
        r"`codes` of 'lm_head' are those of 'model.embed_tokens', to which it is tied": codes | {"lm_head": one},
        rf"`codes` of '{name}' must be int8 of shape \(128, 32\)": codes | {name: replace(one, codes=one.codes[1:])},
        rf"`scales` of '{name}' must be those of groups of 32 in 32 inputs of 128 rows": codes
        | {name: replace(one, scales=one.scales[1:])},
        rf"`codes` of '{name}' must lie from -8 to 7, got -\d+ to 100\.": codes
        | {name: replace(one, codes=one.codes.where(one.codes < 5, 100))},
        rf"`scales` of '{name}' must be finite numbers of float16\.": codes
        | {name: replace(one, scales=one.scales + 1e-6)},
        rf"`gain` of '{name}' must be 32 finite numbers of float16": codes
        | {name: replace(one, gain=torch.full((32,), math.nan))},
        r"\['bits'\]` of a `quantization_config` must be 3, 4 or 8, got 5": codes | {name: replace(one, bits=5)},
    }.items():
        with pytest.raises(ValueError, match=changes):
            to_quantized(model, message, config)
    coded = to_quantized(model, codes, config)
    with pytest.raises(ValueError, match="`new_num_tokens` must be 61 for a table of codes, got 70"):
        coded.resize_token_embeddings(70)
    assert coded.resize_token_embeddings() is coded.model.embed_tokens

    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="must belong to a folder of codes, got one of rigpt for a model of weights"):
        RiGPTForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    coded.config.quantization_config.activation_bits = 8
    coded.save_pretrained(tmp_path / "a8")
    monkeypatch.setattr(RiGPTQuantizer, "simulate", None)  # as where the code of a folder is alone
    with pytest.raises(ValueError, match=r"`activation_bits=8` of a `quantization_config` needs a kernel or a simul"):
        RiGPTForCausalLM.from_pretrained(tmp_path / "a8")
    seen = []
    monkeypatch.setattr(RiGPTQuantizer, "simulate", staticmethod(lambda model, config: seen.append(config)))
    RiGPTForCausalLM.from_pretrained(tmp_path / "a8")
    assert [config.activation_bits for config in seen] == [8]
    del coded.config.quantization_config
    state = coded.state_dict()
    del state[f"{name}.codes"]
    broken = copy.deepcopy(coded.config)
    broken.quantization_config = RiGPTQuantizationConfig(group=32).to_dict()
    with pytest.raises(ValueError, match="up_proj.codes` must be stored for a map that has codes, got none"):
        RiGPTForCausalLM.from_pretrained(None, config=broken, state_dict=state)


@over_options
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generation_is_that_of_the_weights(option, cache):
    model = quantized(option)
    plain = copy.deepcopy(model).dequantize(torch.float32)
    input_ids, mask = tokens(2, 7), torch.ones_like(tokens(2, 7))
    input_ids[0, :3], mask[0, :3] = 0, 0  # padding on the left
    asked = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    asked |= {"cache_implementation": cache, "disable_compile": True}
    made = model.generate(input_ids, **asked)
    assert torch.equal(made, plain.generate(input_ids, **asked)) and made.shape == (2, 13)
    alone = model.generate(input_ids[:1, 3:], **(asked | {"attention_mask": mask[:1, 3:]}))
    assert torch.equal(made[:1, 3:], alone)
    half = model.to(torch.bfloat16).generate(input_ids, **asked)
    assert half.shape == (2, 13)


@over_options
def test_gradients_reach_inputs_and_biases(option):
    model = quantized(option, torch.float64).train()
    plain = copy.deepcopy(model).dequantize(torch.float64)
    if option == "untied-projected":  # whose layers look up tokens, so that nothing but tokens goes in
        recompute_activations(model)
    for each in (model, plain):
        each(tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss.backward()
    expected, compared = dict(plain.named_parameters()), 0
    for name, parameter in model.named_parameters():
        if name.endswith(("codes", "scales", "gain")):
            assert parameter.grad is None, name
        else:
            assert_same(parameter.grad, expected[name].grad, name)
            compared += 1
    assert compared > 10


def test_an_adapter_trains_on_codes(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    base = quantized("tied", torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = base(tokens(2, 9)).logits.detach()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "o_proj", "down_proj"])
    model = peft.get_peft_model(base, config)
    assert torch.equal(model.eval()(tokens(2, 9)).logits, expected), "with a fresh adapter"
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 0.05,
        "report_to": [],
        "use_cpu": True,
    }
    examples = [{"input_ids": row, "labels": row} for row in tokens(32, 9)]
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path, **settings, save_strategy="no", logging_strategy="no", disable_tqdm=True),
        train_dataset=examples,
    )
    with torch.no_grad():
        first = model(tokens(32, 9), labels=tokens(32, 9)).loss
    trainer.train()
    with torch.no_grad():
        last = model.eval()(tokens(32, 9), labels=tokens(32, 9)).loss
    assert last < 0.99 * first, (first, last)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
    after = {
        name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items() if "lora" not in name
    }
    assert all(torch.equal(after[name], before[name]) for name in before)
    trained = model(tokens(2, 9)).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantized("tied", torch.bfloat16), tmp_path / "adapter").eval()
    assert torch.equal(again(tokens(2, 9)).logits, trained)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"an adapter cannot be merged into codes.*Call `dequantize\(\)`"):
            merge()
    assert torch.equal(model.unload()(tokens(2, 9)).logits, expected)


def test_an_adapter_learns_as_on_the_weights():
    peft = pytest.importorskip("peft")
    gradients = []
    for kind in ("weights", "codes", "recomputed"):
        base = quantized("tied", torch.float64)
        base = base.dequantize(torch.float64) if kind == "weights" else base
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, use_dora=True)
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).train()
        if kind == "recomputed":
            recompute_activations(base)
            model.enable_input_require_grads()
        model(tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            assert_same(other[name], gradient, name)


def test_offloaded_codes_give_the_same(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = quantized("tied", torch.bfloat16)
    with torch.no_grad():
        expected = model(tokens(2, 7)).logits
    model.save_pretrained(tmp_path / "model")
    offloaded = {
        "disk": RiGPTForCausalLM.from_pretrained(
            tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "disk"
        ),
        "mixed": RiGPTForCausalLM.from_pretrained(
            tmp_path / "model",
            device_map={"model.embed_tokens": "cpu", "model.layers": "disk", "model.rotary_emb": "cpu"}
            | {"model.norm": "cpu", "model.dropout": "cpu", "lm_head": "cpu"},
            offload_folder=tmp_path / "mixed",
        ),
        "cpu": accelerate.cpu_offload(model, execution_device="cpu"),
    }
    for where, each in offloaded.items():
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(each(tokens(2, 7)).logits, expected), where
        module = each.model.layers[0].mlp.up_proj
        assert module.codes.is_meta and module._packed is None, where


def test_a_device_map_places_codes(tmp_path):
    model = quantized("untied-projected", torch.bfloat16)
    model.save_pretrained(tmp_path)
    placed = RiGPTForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    alike(placed, model)
    with torch.no_grad():
        assert torch.equal(placed(tokens(2, 7)).logits, model(tokens(2, 7)).logits)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled_without_graph_breaks(dtype):
    torch.compiler.reset()
    model = quantized("tied", dtype, num_hidden_layers=1)
    with torch.no_grad():
        expected = model(tokens(2, 7), use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens(2, 7), use_cache=False).logits
    allowed = SYMMETRY[dtype] if dtype in SYMMETRY else DISTANCE[dtype]
    assert difference(compiled.float(), expected.float()) <= allowed
    if dtype == torch.float32:
        model.train()
        loss = torch.compile(model, fullgraph=True, backend="aot_eager")(
            tokens(2, 7), labels=tokens(2, 7), use_cache=False
        ).loss
        loss.backward()
        assert model.model.layers[0].mlp.up_proj.bias.grad.abs().sum() > 0
    torch.compiler.reset()
