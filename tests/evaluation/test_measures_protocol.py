"""The protocol in the results of measures, losses that are no numbers, and code beside a model that is never run."""

import json
import math
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.evaluation.likelihood import exponential
from rigpt_hf.evaluation.measures.cloze import Cloze, cloze_accuracy
from rigpt_hf.evaluation.measures.invariance import invariance, largest
from rigpt_hf.evaluation.measures.multiple_choice import MultipleChoice, multiple_choice_accuracy
from rigpt_hf.evaluation.measures.perplexity import perplexity
from rigpt_hf.evaluation.measures.quantization_robustness import quantization_robustness
from rigpt_hf.evaluation.measures.throughput import first_token
from rigpt_hf.evaluation.models import EvaluatedModel, evaluated
from tests.evaluation.toys import Bigrams, rows, tiny_gpt2, word_tokenizer
from tests.models import tiny_model


WORDS = [f" w{index}" for index in range(61)]
TEXTS = ["".join(WORDS[index] for index in row) for row in rows(3, 20)]
SCHEMES = {"schemes": ("W16A16", "W6A6"), "frames": ("identity",)}


def test_rounding_is_scored_as_perplexity_is():
    """One protocol, one loss; and another protocol is another loss."""
    for detokenizer in ("none", "wikitext"):
        for bos in (False, True):
            model, tokenizer = tiny_model(), word_tokenizer([*WORDS[:-1], " ,"])
            texts = [f"{text} , {text[:8]}" for text in TEXTS]
            found = quantization_robustness(model, texts, tokenizer, bos=bos, detokenizer=detokenizer, **SCHEMES)
            expected = perplexity(model, texts, tokenizer, bos=bos, detokenizer=detokenizer)
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-12)
            assert found["rounded"]["identity"]["W16A16"]["samples"] == expected["samples"] | {
                "before": expected["samples"]["nats"]
            }
            assert found["protocol"]["bos"] is bos and found["protocol"]["detokenizer"] == detokenizer
            if bos or detokenizer != "none":
                plain = quantization_robustness(model, texts, tokenizer, **SCHEMES)
                assert abs(found["loss"] - plain["loss"]) > 1e-6
                changes = [each["rounded"]["identity"]["W6A6"]["increase"] for each in (found, plain)]
                assert abs(changes[0] - changes[1]) > 1e-6


def test_principal_axes_are_found_on_what_is_read(monkeypatch):
    from rigpt_hf.evaluation.measures import quantization_robustness as quantization

    seen = []
    own = quantization.in_frame

    def in_frame(model, frame, **options):
        seen.append(options["input_ids"].tolist())
        return own(model, frame, **options)

    monkeypatch.setattr(quantization, "in_frame", in_frame)
    model, tokenizer = tiny_model(), word_tokenizer(WORDS)
    for bos, start in ((False, []), (True, [0])):
        options = {"schemes": ("W16A16",), "frames": ("pca",), "context": 16, "bos": bos}
        found = quantization_robustness(model, TEXTS, tokenizer, **options)
        assert seen[-1] == [[*start, *row][:16] for row in rows(3, 20)]
        assert found["protocol"]["calibration"] == {
            "frame": "pca",
            "windows": 3,
            "tokens": 16,
            "text": "the first of what is scored",
        }
    assert "calibration" not in quantization_robustness(model, rows(2, 20), **SCHEMES)["protocol"]


def test_rows_of_token_ids_are_never_detokenized():
    with pytest.raises(ValueError, match="`detokenizer` and `separator` are for texts"):
        quantization_robustness(tiny_model(), rows(2, 20), detokenizer="wikitext", **SCHEMES)


LINE = r"`model` must give finite losses, got (nan|inf) from .* in torch.float(32|64)\. See whether its weights are"


def spoilt(value: float) -> torch.nn.Module:
    """A stock model with one weight that is no number, or endless."""
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[0, 0] = value
    return model


def test_what_is_no_number_is_no_guess():
    tokenizer = word_tokenizer(WORDS)
    questions = [MultipleChoice(" w1 w2", [" w4", " w5"], 0), MultipleChoice(" w1 w2", [" w4", " w5"], 1)]
    for measure in (
        lambda model: multiple_choice_accuracy(model, questions, tokenizer),
        lambda model: cloze_accuracy(model, [Cloze(" w1 w2", " w4")], tokenizer),
        lambda model: perplexity(model, rows(2, 12)),
        lambda model: quantization_robustness(model, rows(2, 12), schemes=("W8A8",)),
    ):
        measure(tiny_gpt2())
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match=LINE) as caught:
                measure(spoilt(value))
            assert "\n" not in str(caught.value)


def test_huge_losses_are_numbers():
    """A sure model that errs: its loss is finite, its perplexity is not."""
    model = Bigrams(torch.eye(3, dtype=torch.float64))
    model.logits = 800.0 * torch.eye(3, dtype=torch.float64)
    found = perplexity(EvaluatedModel(model, name="sure"), [[0, 2, 0]])
    assert found["perplexity"] == math.inf and found["loss"] == pytest.approx(800.0)
    assert exponential(800.0) == math.inf and math.isnan(exponential(math.nan)) and exponential(1.0) == math.e


def test_invariance_does_not_lose_what_is_no_number(monkeypatch):
    from rigpt_hf.evaluation.measures import invariance as module

    assert max([1.0, math.nan]) == 1.0, "which is why there is another"
    assert math.isnan(largest([1.0, math.nan])) and math.isnan(largest([math.nan, 1.0])) and largest([1.0, 2.0]) == 2.0
    assert math.isnan(invariance(spoilt(math.nan), rows(1, 8), dtypes=("float32",), draws=1)["largest"]["float32"])
    values = iter([0.5, math.nan, 0.25, 0.125])
    monkeypatch.setattr(module, "_error", lambda *arguments: next(values))
    found = invariance(tiny_model(), rows(), frame=["stream", "head_vo"], dtypes=("float64",), draws=2)
    assert math.isnan(found["errors"]["stream"]["float64"]["largest"]) and math.isnan(found["largest"]["float64"])
    assert found["errors"]["head_vo"]["float64"]["largest"] == 0.25


def bytes_tokenizer(prefix: bool = False) -> PreTrainedTokenizerFast:
    """One token for every byte, but one for two bytes of a character of four and one for a word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = [piece for piece, _ in shown.pre_tokenize_str("😀")]
    first, second = pieces[0][0], pieces[0][1]
    merges = [(first, second), ("a", "b")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_bytes_of_a_first_token_that_is_part_of_a_character():
    for prefix in (False, True):
        for text, first in (
            ("😀", 2),
            ("😀 and", 2),
            ("é is", 1),
            ("ab is", 2),
            (" is", 1),
            ("\ufffd is", 1),
            ("is", 1),
        ):
            tokenizer = bytes_tokenizer(prefix)
            size = len(tokenizer)
            model = EvaluatedModel(
                Bigrams(torch.full((size, size), 1 / size, dtype=torch.float64), 64), tokenizer, "bytes"
            )
            found = perplexity(model, [text])
            # A space that only the tokenizer knows of is no byte of the text.
            gone = 0 if prefix and not text.startswith(" ") else first
            assert found["bytes"] == found["samples"].get("bytes", [found["bytes"]])[0] == len(text.encode()) - gone
            assert perplexity(model, [text, text])["bytes"] == 2 * found["bytes"]


def test_bytes_are_never_below_zero():
    """A tokenizer whose tokens say more than the text did."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "[a long name]": 1}, unk_token="[a long name]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="removed")
    model = EvaluatedModel(
        Bigrams(torch.full((2, 2), 0.5, dtype=torch.float64)), PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    )
    found = perplexity(model, ["b c", "a much longer text than that"])
    assert found["samples"]["bytes"][0] == 0 < found["samples"]["bytes"][1] == 28 - len("[a long name]")


CODE = """
from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel

Path({marker!r}).touch()


class StrangerConfig(GPT2Config):
    model_type = "stranger"


class Stranger(GPT2LMHeadModel):
    config_class = StrangerConfig
"""


def test_code_beside_a_model_is_never_run(tmp_path, monkeypatch):
    """Not even where somebody says yes to all that is asked."""
    from transformers import dynamic_module_utils

    folder, marker = tmp_path / "stranger", tmp_path / "ran"
    model = tiny_gpt2()
    model.save_pretrained(folder)
    (folder / "stranger.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "stranger", "architectures": ["Stranger"]}
    config["auto_map"] = {"AutoConfig": "stranger.StrangerConfig", "AutoModelForCausalLM": "stranger.Stranger"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *arguments: "y")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match="asks for code from its folder"):
        evaluated(folder)
    assert not marker.exists()
    # The question is asked, and the code runs, where nobody has said no.
    AutoModelForCausalLM.from_pretrained(folder)
    assert marker.exists()


def test_a_rigpt_that_carries_its_code_loads_as_the_registered_class(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_rigpt.RiGPTForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_rigpt.py").write_text("raise AssertionError('must not be run')\n")
    loaded = evaluated(tmp_path).model
    assert type(loaded) is RiGPTForCausalLM
    assert perplexity(loaded, rows(1, 20))["loss"] == pytest.approx(perplexity(model, rows(1, 20))["loss"], rel=1e-6)


def test_a_folder_does_not_say_how_measures_generate(tmp_path):
    """Neither several beams nor other outputs, which would be slower or fail."""
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"num_beams": 0, "return_dict_in_generate": True, "temperature": 0.9, "eos_token_id": 3})
    )
    model = evaluated(tmp_path).model
    first_token(model, torch.arange(4)[None])()
    assert model.generation_config.eos_token_id == 3 and model.generation_config.num_beams is None
