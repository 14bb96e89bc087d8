"""
Quantizers find the linear maps: memory falls, and the logits stay near.

Each is skipped where it is not installed: `pip install '.[contracts]'` brings them, into an environment of their own,
as torchao writes to stderr when another library looks for it.
"""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.checkpoints.opened import open_model
from tests.conversion.sources import stock_model
from tests.models import tiny_model, tokens
from tests.tolerances import SYMMETRY


SIZES = {"hidden_size": 128, "num_attention_heads": 4}
SETS = {
    "tied": SIZES,
    "untied-projected": SIZES | {"embedding_size": 64, "output_bias": True, "tie_word_embeddings": False},
    # The gate of the values has an output for each head, and on some processors bitsandbytes takes 32 at a time.
    "values-local": SIZES
    | {"num_attention_heads": 32, "num_key_value_heads": 32}
    | {"value_embedding_period": 2, "local_frames": True, "gated_mlp": True},
}
# Of the logits' spread, by bits; those of another model are 1.4 of it away.
NEAR = {8: 0.1, 4: 0.7}


def bitsandbytes(bits):
    from transformers import BitsAndBytesConfig

    return (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )


def torchao(bits):
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    kind = {8: torch.int8, 4: torch.int4}[bits]
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=kind, granularity=PerGroup(32)))


def quanto(bits):
    from transformers import QuantoConfig

    return QuantoConfig(weights=f"int{bits}")


# Four bits of quanto on a CPU need a compiler.
WAYS = {"bitsandbytes": (bitsandbytes, 8, 4), "torchao": (torchao, 8, 4), "optimum.quanto": (quanto, 8)}


def near(quantized: nn.Module, model: nn.Module, bits: int):
    """Close on a full pass, on the single rows of cached generation, and not the same."""
    for shape in ((2, 9), (1, 1)):
        expected, actual = model(tokens(*shape)).logits, quantized(tokens(*shape)).logits
        error = ((actual - expected).std() / expected.std()).item()
        assert 1e-4 < error < NEAR[bits], error
    asked = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert quantized.generate(tokens(1, 5), **asked).shape == (1, 8)


@pytest.mark.parametrize("option", SETS)
@pytest.mark.parametrize("way", [(name, bits) for name, (_, *all_bits) in WAYS.items() for bits in all_bits], ids=str)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_quantizer_takes_every_linear_map(way, option, tmp_path):
    name, bits = way
    pytest.importorskip(name)
    model = tiny_model(dtype=torch.float32, **SETS[option])
    model.save_pretrained(tmp_path)
    config = WAYS[name][0](bits)
    quantized = RiGPTForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
    for inner in quantized.model.modules():
        if isinstance(inner, nn.Linear):
            plain = type(inner) is nn.Linear and type(inner.weight) is nn.Parameter
            assert not plain or inner.weight.dtype != torch.float32, inner
    near(quantized, model, bits)
    if name == "bitsandbytes":
        assert quantized.get_memory_footprint() < {8: 0.4, 4: 0.3}[bits] * model.get_memory_footprint()


def test_an_adapter_trains_on_four_bits(tmp_path):
    peft, _ = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    tiny_model(dtype=torch.float32, **SETS["untied-projected"]).save_pretrained(tmp_path)
    base = RiGPTForCausalLM.from_pretrained(tmp_path, quantization_config=bitsandbytes(4), device_map="cpu")
    model = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(base), peft.LoraConfig(task_type="CAUSAL_LM", r=4)
    )
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02), []
    for _ in range(8):
        losses.append(model(tokens(4, 9), labels=tokens(4, 9)).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@torch.no_grad()
def test_dynamic_quantization_takes_every_linear_map():
    model = tiny_model(dtype=torch.float32, **SETS["untied-projected"])
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    near(quantized, model, 8)


@pytest.mark.parametrize("way", [("bitsandbytes", 4), ("torchao", 8), ("torchao", 4)], ids=str)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_quantized_folder_opens_as_the_numbers_behind_its_codes(way, tmp_path):
    name, bits = way
    pytest.importorskip(name)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    model = stock_model("llama", torch.float32, **sizes)
    model.save_pretrained(tmp_path / "plain")
    config = WAYS[name][0](bits)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, device_map="cpu"
    ).eval()
    quantized.save_pretrained(tmp_path / "codes")
    opened = open_model(tmp_path / "codes")
    assert opened.stock == "LlamaForCausalLM" and "is quantized by" in opened.notes[0] and "decoded" in opened.notes[0]
    wanted, found, plain = (each(tokens(1, 9)).logits for each in (quantized, opened.load(), model))
    assert (found - wanted).abs().max() <= SYMMETRY[torch.float32] * wanted.abs().max()
    assert (found - plain).abs().max() > 1e-3 * wanted.abs().max()
