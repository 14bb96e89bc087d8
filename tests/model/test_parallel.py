"""Plans for tensor and pipeline parallelism: every rule names something there is, and the stages compose."""

import copy
import re

import pytest
import torch
from torch import nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from rigpt_hf import RiGPTForCausalLM, RiGPTForSequenceClassification, RiGPTModel
from tests.model.agreement import assert_different, assert_same
from tests.models import ALL, OPTIONS, over, tiny_config, tiny_model, tokens
from tests.processes import together


@over()
def test_every_rule_of_the_plans_applies(option):
    for model_class in (RiGPTModel, RiGPTForCausalLM, RiGPTForSequenceClassification):
        model = model_class(tiny_config(**ALL[option]))
        names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
        generic = {re.sub(r"\.\d+", ".*", name) for name in names}
        assert model.tp_plan and set(model.tp_plan) <= generic
        assert set(model.pp_plan) <= generic
        # Later stages of a pipeline do not have what these options read again.
        config = model.config
        again = config.value_embedding_period is not None or config.depth_interpolation == "linear" or config.post_norm
        assert bool(model.pp_plan) is not again
        assert again or ("project_out" in str(model.pp_plan)) is (model.config.embedding_size is not None)
        assert list(model._no_split_modules) == ["RiGPTDecoderLayer"]


@pytest.mark.parametrize("option", ["learned-projected", "rotary", "distance"])
def test_pipeline_stages_compose(option):
    """A later stage gets the stream of the earlier one as its embeddings, and the layers of others are identities."""
    model = tiny_model(**OPTIONS[option])
    first, last = copy.deepcopy(model), copy.deepcopy(model)
    first.model.layers[1] = first.model.layers[2] = IdentityLayer()
    first.model.norm = nn.Identity()
    last.model.layers[0] = IdentityLayer()
    stream = first.model(tokens(2, 7)).last_hidden_state
    assert_same(last(inputs_embeds=stream).logits, model(tokens(2, 7)).logits)
    last.model.layers[0] = model.model.layers[0]
    if stream.shape[-1] == model.config.lexical_size:
        assert_different(last(inputs_embeds=stream).logits, model(tokens(2, 7)).logits)


class IdentityLayer(nn.Identity):
    def forward(self, hidden_states, **kwargs):
        return hidden_states


def run_sharded(rank, folder):
    from transformers.distributed.configuration_utils import DistributedConfig

    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = RiGPTForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    reference = RiGPTForCausalLM.from_pretrained(folder)
    for each in (model, reference):
        each(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    config = model.config
    together = config.qk_norm_over == "all" or (config.qk_norm_bias and config.qk_norm_gain == "vector")
    assert together or model.model.layers[0].self_attn.distance_weight.to_local().shape == (2,)
    norm = model.model.layers[0].self_attn.k_norm
    if config.qk_norm_gain == "metric":
        assert norm.weight.to_local().shape == (8, 8)
    elif config.qk_norm_gain == "vector_per_head":
        assert norm.weight.to_local().shape == norm.bias.to_local().shape == (8,)
    with torch.no_grad():
        assert_same(model(tokens(2, 9)).logits, reference(tokens(2, 9)).logits)
    for (name, a), (_, b) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        gradient = a.grad.full_tensor() if hasattr(a.grad, "full_tensor") else a.grad
        assert (gradient - b.grad).abs().max() < 1e-4, name
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    "gain, over, bias",
    [
        ("vector", "head", False),
        ("metric", "head", False),
        ("vector", "all", False),
        ("vector_per_head", "head", True),
        pytest.param("vector", "head", True, marks=pytest.mark.full),
    ],
)
def test_tensor_parallelism_over_two_processes(tmp_path, gain, over, bias):
    model = tiny_model(
        dtype=torch.float32,
        attention_score="squared_distance",
        rotary_learned_frequencies=True,
        qk_norm=True,
        qk_norm_gain=gain,
        qk_norm_over=over,
        qk_norm_bias=bias,
        gated_mlp=True,
        embedding_size=24,
        output_bias=True,
        vocab_size=62,
        # The least version of Transformers has no such style and says so.
        value_embedding_period=1 if "embedding_colwise" in ALL_PARALLEL_STYLES else None,
    )
    model.save_pretrained(tmp_path)
    together(run_sharded, str(tmp_path))
