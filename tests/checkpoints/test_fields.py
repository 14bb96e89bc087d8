"""What a `config.json` may say: impossible values are named before weights are read; how the library runs is not."""

import json
import math
import shutil
import socket
from contextlib import suppress

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rigpt_hf.checkpoints.fields import UNREAD, check_fields
from rigpt_hf.checkpoints.read import check_model, load_model, load_tokenizer

from ..conversion.sources import CLASSES, stock_model
from ..models import tiny_model
from .folders import save_tokenizer


# The names that GPT-2 has for the fields of the others.
GPT2 = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "rms_norm_eps": "layer_norm_epsilon",
    "attention_dropout": "attn_pdrop",
    "hidden_act": "activation_function",
}
ROTARY = tuple(name for name in CLASSES if name != "gpt2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of every stock family, and of a RiGPT."""
    place = tmp_path_factory.mktemp("families")
    for name in CLASSES:
        stock_model(name, torch.float32).save_pretrained(place / name)
    tiny_model(dtype=torch.float32).save_pretrained(place / "rigpt")
    return place


def edited(folders, family, to, **values):
    """A copy of a folder with other values in its configuration, under the names that the family has for them."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folders / family, to)
    content = json.loads((to / "config.json").read_text())
    if values.keys() & {"rope_theta", "rope_scaling"}:  # which older releases wrote in place of it
        content.pop("rope_parameters", None)
    content |= {GPT2.get(name, name) if family == "gpt2" else name: value for name, value in values.items()}
    (to / "config.json").write_text(json.dumps(content))
    return to


def rope(rope_type="default", **values):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4} | values}


ALL = (*CLASSES, "rigpt")
# What stands in the file; the families; what the line says of the field.
IMPOSSIBLE = {
    "no heads": ({"num_attention_heads": 0}, ALL, "must be at least 1, got 0."),
    "less than no heads": ({"num_attention_heads": -4}, ALL, "must be at least 1, got -4."),
    "no keys": ({"num_key_value_heads": 0}, (*ROTARY, "rigpt"), "must be at least 1, got 0."),
    "no tokens": ({"vocab_size": -1}, ALL, "must be at least 1, got -1."),
    "more digits than numbers have": ({"vocab_size": 10**400}, ALL, "must be at most 2147483647, got a number of 401"),
    "half a layer": ({"num_hidden_layers": 1.5}, ALL, "must be a whole number, got 1.5."),
    "less than no layers": ({"num_hidden_layers": -1}, ALL, "must be at least 0, got -1."),
    "absurd layers": ({"num_hidden_layers": 10**12}, ALL, "must be at most 10000, got 1e+12."),
    "a flag for a size": ({"hidden_size": True}, ALL, "must be a whole number, got True."),
    "a text for a size": ({"hidden_size": "24"}, ALL, "must be a whole number, got '24'."),
    "a negative width": ({"intermediate_size": -1}, ALL, "must be at least 1, got -1."),
    "no dimensions": ({"head_dim": 0}, (*ROTARY, "rigpt"), "must be at least 1, got 0."),
    "no positions": ({"max_position_embeddings": 0}, ALL, "must be at least 1, got 0."),
    "no window": ({"sliding_window": 0}, ("mistral",), "must be at least 1, got 0."),
    "a window behind": ({"use_sliding_window": True, "sliding_window": -1}, ("qwen2",), "must be at least 1, got -1."),
    "a negative eps": ({"rms_norm_eps": -1.0}, ALL, "must be a finite number at least 0, got -1.0."),
    "an eps that is no number": ({"rms_norm_eps": math.nan}, ALL, "must be a finite number at least 0, got nan."),
    "an eps without a point": ({"rms_norm_eps": 0}, ALL, "must be a number with a decimal point, got 0."),
    "a large probability": ({"attention_dropout": 1.5}, ALL, "must be a finite number from 0 to 1, got 1.5."),
    "an endless spread": ({"initializer_range": math.inf}, ALL, "must be a finite number at least 0, got inf."),
    "an unknown activation": ({"hidden_act": "nope"}, ALL, "must be "),
    "a text for a flag": ({"use_cache": "x"}, ALL, "must be true or false, got 'x'."),
    "an unknown dtype": ({"dtype": "float99"}, ALL, "must be float32, bfloat16, float16 or float64, got 'float99'."),
    "no dtype at all": ({"dtype": "nn"}, ALL, "must be float32, bfloat16, float16 or float64, got 'nn'."),
    "a dtype of whole numbers": ({"torch_dtype": "int8"}, ALL, "must be float32, bfloat16, float16 or float64, got"),
    "labels of another kind": ({"id2label": ["a"]}, ALL, "is a dict, got ['a']"),
    "labels without numbers": ({"id2label": {"a": "b"}}, ALL, "must have whole numbers as keys, got 'a'."),
    "labels without end": ({"num_labels": 10**12}, ALL, "must be at most 50000, got 1e+12."),
    "a method": ({"to_dict": 7}, ALL, "is no field of a configuration"),
    "a property": ({"use_return_dict": False}, ALL, "is no field of a configuration"),
    "an unknown model": ({"model_type": "nope"}, tuple(CLASSES), "must be a type of model that is known here"),
    "layers of no type": ({"layer_types": ["x"] * 3}, ("qwen2",), "must hold names that are known here, got ['x'"),
    "a flag for a base": ({"rope_theta": True}, (*ROTARY, "rigpt"), "must be a finite number above 0, got True."),
    "a text for a base": (
        {"rope_theta": "10000"},
        (*ROTARY, "rigpt"),
        "must be a finite number above 0, got '10000'.",
    ),
    "an endless base": ({"rope_theta": math.inf}, (*ROTARY, "rigpt"), "must be a finite number above 0, got inf."),
    "no factor": (rope("linear", factor=0), (*ROTARY, "rigpt"), "['factor']` must be a finite number above 0, got 0."),
    "a factor that is none": (rope("yarn", factor="x"), (*ROTARY, "rigpt"), "['factor']` must be a finite number"),
    "factors that are none": (rope("longrope", short_factor=[1, "x"]), ROTARY, "['short_factor']` must be a finite"),
    "a rotation of no type": (rope("nope"), (*ROTARY, "rigpt"), "['rope_type']` must be "),
    "a rotation without numbers": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
        ROTARY,
        "must have 'high_freq_factor', 'low_freq_factor' where its `rope_type` is 'llama3'.",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
@pytest.mark.by_default(20)
def test_impossible_values_are_named_before_weights_are_read(case, folders, tmp_path):
    values, families, words = IMPOSSIBLE[case]
    for family in families:
        folder = edited(folders, family, tmp_path / "model", **values)
        with pytest.raises(ValueError, match="config.json") as caught:
            check_model(folder, argument="model")
        line, name = str(caught.value), list(values)[-1]
        named = "rope_parameters" if name == "rope_scaling" else GPT2.get(name, name) if family == "gpt2" else name
        assert line.startswith("`model` must have a `config.json`") and repr(str(folder))[:-1] in line
        assert named in line and words in line and "\n" not in line and len(line) < 400, line
        assert not any(word in line for word in ("Error", "torch.", "Tensor", "object", "None")), line


def test_a_tokenizer_that_a_configuration_keeps_from_loading(folders, tmp_path):
    folder = edited(folders, "gpt2", tmp_path / "model", dtype="float99")
    save_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="`tokenizer` must have a `config.json` with possible values, .*`dtype` must"):
        load_tokenizer(folder, argument="tokenizer")


def test_values_that_models_have_are_taken():
    """Also where another model has a number under that name, or none at all; and every default."""
    for kind, content in {
        "llama": {"attention_dropout": 0, "rope_scaling": None, "head_dim": None, "pad_token_id": -1},
        "esm": {"token_dropout": True},
        "qwen2": {"sliding_window": None, "num_labels": 3, "id2label": {"0": "a"}, "torch_dtype": "bfloat16"},
        "phi3": rope("longrope", short_factor=[1.0, 2], long_factor=[1, 3.5], original_max_position_embeddings=9),
        "deepseek_v3": rope("yarn", factor=40, mscale=1.0, mscale_all_dim=0),
        "segformer": {"num_attention_heads": [1, 2]},
    }.items():
        check_fields({"model_type": kind} | content, CONFIG_MAPPING[kind])
    checked = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() & CONFIG_MAPPING.keys():
        with suppress(ImportError, OSError, StrictDataclassError):  # some have none
            check_fields(json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False)), CONFIG_MAPPING[kind])
            checked += 1
    assert checked > 100


RUNNING = (
    {"return_dict": False},
    {"return_dict": "x"},
    {"output_hidden_states": True},
    {"output_hidden_states": "x"},
    {"output_attentions": True, "attn_implementation": "sdpa"},
    {"attn_implementation": "kernels-community/flash-attn"},
    {"_attn_implementation": "kernels-community/flash-attn"},
    {"_attn_implementation_internal": 7},
    {"attn_implementation": {"": "nonsense"}},
    {"experts_implementation": "nonsense"},
    {"chunk_size_feed_forward": "x"},
    {"torchscript": True},
)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.by_default(2)
def test_a_folder_does_not_say_how_the_library_runs(family, folders, tmp_path, monkeypatch):
    """The same outputs by the same backend as without, and nothing is asked of the Hub."""
    ids = torch.arange(12)[None]
    plain = load_model(folders / family)

    def connect(*arguments):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    expected = plain(ids)
    for values in RUNNING:
        folder = edited(folders, family, tmp_path / "model", **values)
        model = load_model(folder)
        out = model(ids)
        assert type(out) is type(expected) and torch.equal(out.logits, expected.logits), values
        assert out.hidden_states is None and out.attentions is None, values
        assert model.config._attn_implementation == plain.config._attn_implementation, values
        model.save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert all(saved.get(name, value) == value for name, value in UNREAD.items()), values
