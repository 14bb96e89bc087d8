"""The table of families: every architecture, its costs as models have them, its targets as they are exported to."""

from contextlib import suppress

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.conversion.export import plan_export
from rigpt_hf.conversion.families import ARCHITECTURES, TARGETS
from rigpt_hf.conversion.overview import exportable, overview

from .families import architecture, converted_family
from .test_families import over_kinds


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in overview()}


def test_every_architecture_has_a_row(rows):
    assert list(rows) == list(ARCHITECTURES)
    for name, row in rows.items():
        assert (row.class_name, row.refused) == (ARCHITECTURES[name].class_name, tuple(ARCHITECTURES[name].refused))


def test_costs_are_those_of_whole_models(rows):
    for name, config, stock_class in (
        ("gpt2", GPT2Config(), GPT2LMHeadModel),
        ("llama", LlamaConfig(tie_word_embeddings=True), LlamaForCausalLM),
    ):
        with torch.device("meta"):
            stock = stock_class(config).num_parameters()
            result = RiGPTForCausalLM(ARCHITECTURES[name].result(config, None)).num_parameters()
        assert rows[name].parameters[True] == pytest.approx(result / stock - 1, abs=1e-12)
    assert 0.009 < rows["gpt2"].parameters[True] < 0.01
    assert max(rows["llama"].products[False], rows["nanochat"].parameters[True]) <= 0 < rows["llama"].products[True]


@over_kinds
@pytest.mark.by_default(4)
def test_what_can_be_exported_is_exported(name):
    converted = converted_family(name)[1]
    done = set()
    for target in TARGETS:
        with suppress(ValueError):
            done |= {target} if plan_export(converted, target).entries else set()
    assert set(exportable(converted.config, ARCHITECTURES[architecture(name)].family)) == done
