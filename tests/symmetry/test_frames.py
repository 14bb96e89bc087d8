"""The table answers what others ask: who carries a frame, how a parameter meets it, for the config as it is now."""

import pytest
import torch

import rigpt_hf
from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.configuration_rigpt import AUTO_CLASSES
from rigpt_hf.symmetry import FrameKey, table_of
from rigpt_hf.symmetry.alignment import SWEEP
from tests.models import ALL, EACH, SYMMETRIES, over, tiny_config


def test_keys_are_strings_to_users():
    for key in (FrameKey("stream"), FrameKey("head_qk", 3), FrameKey("local", 12)):
        assert FrameKey.parse(str(key)) == key
    assert str(FrameKey("head_qk", 3)) == "layers.3.head_qk" and str(FrameKey("stream")) == "stream"


def test_one_table_for_equal_configs_and_another_once_a_field_changes():
    config, other = tiny_config(), tiny_config()
    assert table_of(config) is table_of(other)
    other.num_hidden_layers = 4
    assert len(table_of(other).frames) > len(table_of(config).frames)
    other.num_hidden_layers, other.rope_parameters = 3, other.rope_parameters | {"partial_rotary_factor": 0.5}
    assert table_of(other).kinds["head_qk"] != table_of(config).kinds["head_qk"]
    for size in range(64, 64 + 8 * 40, 8):  # more than are kept
        assert table_of(tiny_config(hidden_size=size)).kinds["stream"].group.n == size
    assert table_of(tiny_config()).kinds == table_of(config).kinds


@over(ALL, ())
@pytest.mark.by_default(45)
def test_the_table_knows_every_parameter_in_the_order_of_the_model(option):
    known(option, ["RiGPTForCausalLM"])


@over(EACH, ALL)
def test_the_table_knows_every_parameter_of_other_heads(option):
    _, *classes = AUTO_CLASSES.values()  # the base model's names lack their prefix
    assert len(classes) >= 3
    known(option, classes)


def known(option: str, classes: list[str]) -> None:
    config = tiny_config(**ALL[option])
    table = table_of(config)
    with torch.device("meta"):
        models = [getattr(rigpt_hf, name)(config) for name in classes]
    for model in models:
        names = [name for name, _ in model.named_parameters()]
        assert [name for name in table.names if name in names] == names
        for name, parameter in model.named_parameters():
            turns = table.turns(name)
            written = WRITTEN if config.post_norm else ()
            still = ("score.bias", "qa_outputs.bias", "shared_expert_gate.bias", *written)
            assert turns or name.endswith(still), f"{name} stands still"
            assert table.rank(name) in (1, parameter.dim())
            for turned in turns:
                assert turned.key in table.frames, f"{name} turns with {turned.key}, which is no frame"
                assert (name, turned.dim) in table.carriers(turned.key, turned.role)
                assert torch.equal(
                    turned.fold(turned.unfold(torch.arange(18.0).reshape(6, 3)), torch.Size([6, 3])),
                    torch.arange(18.0).reshape(6, 3),
                )
    assert set(table.frames) == set(table.carried) | set(table.shifts)


@pytest.mark.parametrize(
    ("option", "name", "kind", "role"),
    [
        ("rotary", "model.embed_tokens.weight", "stream", "rows"),
        ("rotary", "model.layers.1.self_attn.q_proj.weight", "stream", "reads"),
        ("rotary", "model.layers.1.self_attn.q_proj.weight", "head_qk", "writes"),
        ("rotary", "model.layers.1.self_attn.o_proj.weight", "stream", "writes"),
        ("rotary", "model.layers.1.self_attn.o_proj.bias", "stream", "writes"),
        ("rotary", "model.layers.1.self_attn.o_proj.weight", "neurons", None),
        ("rotary", "model.layers.1.mlp.down_proj.weight", "neurons", "reads"),
        ("untied", "lm_head.weight", "stream", "reads"),
        ("learned", "model.embed_positions.weight", "stream", "rows"),
        ("untied-projected", "model.embed_tokens.weight", "lexical", "rows"),
        ("untied-projected", "model.embed_tokens.weight", "stream", None),
        ("untied-projected", "model.project_in.weight", "lexical", "reads"),
        ("untied-projected", "model.project_out.weight", "output", "writes"),
        ("untied-projected", "lm_head.weight", "output", "reads"),
        ("value-embeddings", "model.layers.1.self_attn.value_embedding.weight", "heads", "rows"),
        ("local-frames", "model.layers.1.mlp.up_proj.weight", "local", "reads"),
        ("local-frames", "model.layers.1.mlp.up_proj.weight", "stream", None),
    ],
)
def test_how_a_parameter_meets_a_frame(option, name, kind, role):
    assert table_of(tiny_config(**SYMMETRIES[option])).role_on(name, kind) == role


# What gains behind a block are multiplied with, and the gains.
WRITTEN = ("_output_norm.weight", "o_proj.bias", "down_proj.bias")
SHARDED = {"writes": "colwise", "reads": "rowwise", "rows": "embedding_colwise"}


@over(ALL, ())
@pytest.mark.by_default(45)
def test_the_plan_that_travels_with_a_checkpoint_follows_from_the_table(option):
    """
    Tensor parallelism shards what has an entry per head or neuron; biases go with their weights. What all heads of a
    layer share gets gradients from all processes.
    """
    config = tiny_config(**ALL[option])
    table, plan = table_of(config), {}
    with torch.device("meta"):
        model = RiGPTForCausalLM(config)
    # A process has all heads where the length of all is asked for, and where they share one thing and not another.
    shared = config.qk_norm_gain == "vector" and config.qk_norm_bias
    together = config.qk_norm_over == "all" or shared
    if together:
        attention = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise_gather_output")
        attention["o_proj"] = "rowwise_split_input"
        plan = {f"layers.*.self_attn.{name}": style for name, style in attention.items()}
    for name, _ in model.named_parameters():
        sharded = (table.role_on(name, kind) for kind in ("heads", "neurons", "shared_neurons"))
        role = next((role for role in sharded if role), None)
        if together and ".self_attn." in name:
            continue
        if role is not None and not name.endswith("proj.bias"):
            pattern = name.removeprefix("model.").replace(f".{name.split('.')[2]}.", ".*.", 1)
            linear = isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Linear | torch.nn.Embedding)
            plan[pattern.removesuffix(".weight") if linear else pattern] = SHARDED[role]
        elif role is None and table.role_on(name, "gains") is not None:
            pattern = name.removeprefix("model.").replace(f".{name.split('.')[2]}.", ".*.", 1)
            plan[pattern.removesuffix(".weight")] = "replicated_with_grad_allreduce"
    assert plan == config.base_model_tp_plan
    assert len(plan) >= (6 if config.num_experts is None else 4)


def test_an_unknown_parameter_is_named():
    table = table_of(tiny_config())
    for ask in (table.turns, table.rank, lambda name: table.role_on(name, "stream")):
        with pytest.raises(ValueError, match="no parameter 'model.spin.weight', .* its row in rigpt_hf/frames.py"):
            ask("model.spin.weight")
    with pytest.raises(ValueError, match="must have the names of a model with its head, got 'embed_tokens.weight'"):
        table.turns("embed_tokens.weight")


def test_a_sweep_of_an_alignment_goes_through_every_frame_that_is_no_translation():
    """A new kind of frame that no sweep knew would be left where it is, without a word."""
    swept, seen = [kind for kinds in SWEEP for kind in kinds], set()
    for options in ALL.values():
        kinds = table_of(tiny_config(**options)).kinds
        seen |= {kind for kind in kinds if not kind.endswith("shift")}
    assert set(swept) == seen and len(swept) == len(seen) > 5
