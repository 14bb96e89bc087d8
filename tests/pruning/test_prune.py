"""Smaller models: nothing is lost where nothing was there, the best is fitted where something was, and no more."""

import copy

import pytest
import torch
from torch import nn

from rigpt_hf.pruning import Sizes, prune, recovered
from rigpt_hf.pruning.elimination import eliminate
from rigpt_hf.symmetry import GaugeTransformation

from ..models import OPTIONS, tiny_model, tokens
from ..tolerances import SYMMETRY


# One of every kind of frame that an attention, or an MLP, may have.
HEADS = [
    "rotary",
    "multi-head",
    "alibi",
    "sinks-learned",
    "gain-metric",
    "gain-per-head",
    "value-embeddings",
    "experts",
]
RANKS = [
    "learned",
    "rotary",
    "rotary-learned",
    "unturned",
    "value-embeddings",
    "no-biases",
    "local-frames",
    "multi-head",
]
NEURONS = ["gelu", "gated", "relu2", "parallel", "post-norm"]


def input_moments(model) -> list[dict[str, torch.Tensor]]:
    """Second moments of the inputs of all linear maps on some tokens."""
    moments = {}

    def look(name):
        def hook(module, inputs):
            rows = inputs[0].detach().flatten(0, -2).double()
            moments[name] = rows.T @ rows / len(rows)

        return hook

    maps = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(look(name)) for name, module in maps]
    model(tokens(8, 16))
    for handle in handles:
        handle.remove()
    return [moments]


def difference(a, b) -> float:
    with torch.no_grad():
        first, second = (model.eval()(tokens(2, 14, seed=3)).logits for model in (a, b))
    return float((first - second).abs().max() / first.abs().max())


def model_of(option: str):
    return tiny_model(**OPTIONS[option]).eval()


@pytest.mark.parametrize("option", NEURONS)
def test_neurons_that_write_nothing_go_without_a_trace(option):
    model = model_of(option)
    count = model.config.intermediate_size // 4
    for layer, block in enumerate(model.model.layers):
        dead = torch.randperm(model.config.intermediate_size, generator=torch.Generator().manual_seed(layer))[:count]
        block.mlp.down_proj.weight.data[:, dead] = 0
    smaller = prune(model, input_moments(model), Sizes(neurons=0.25))
    assert smaller.config.intermediate_size == model.config.intermediate_size - count
    assert difference(model, smaller) < SYMMETRY[torch.float64]
    block.mlp.down_proj.weight.data[:, dead[:1]] = 1
    assert difference(model, prune(model, input_moments(model), Sizes(neurons=0.25))) > 1e-4


def silence_heads(model) -> int:
    """The first query head of every group writes nothing; in models with groups of one, one of all."""
    config = model.config
    groups = config.num_key_value_heads if config.num_key_value_heads < config.num_attention_heads else 1
    for block in model.model.layers:
        columns = block.self_attn.o_proj.weight.data.unflatten(1, (groups, -1, config.head_dim))
        columns[:, :, 0] = 0
    return groups


@pytest.mark.parametrize("option", HEADS)
def test_heads_that_write_nothing_go_without_a_trace(option):
    model = model_of(option)
    whole = copy.deepcopy(model)
    count = silence_heads(model)
    smaller = prune(model, input_moments(model), Sizes(heads=count))
    assert smaller.config.num_attention_heads == model.config.num_attention_heads - count
    assert difference(model, smaller) < SYMMETRY[torch.float64]
    assert difference(whole, prune(whole, input_moments(whole), Sizes(heads=count))) > 1e-4


def flatten_heads(model, rank: int) -> None:
    """Values, keys and queries of every head lie in `rank` dimensions, or in the first planes."""
    size = model.config.head_dim
    generator = torch.Generator().manual_seed(1)
    for block in model.model.layers:
        attention = block.self_attn
        for name in ("v", "k"):
            basis = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q
            projection = basis @ basis.T
            if name == "k" and attention.is_turned:
                kept = torch.zeros(size, dtype=torch.float64)
                kept[: rank // 2] = kept[size // 2 : size // 2 + rank // 2] = 1
                projection = kept.diag()
            module = getattr(attention, f"{name}_proj")
            for parameter in module.parameters():
                blocks = parameter.data.reshape(model.config.num_key_value_heads, size, -1)
                parameter.data = (projection @ blocks).reshape(parameter.shape)
            if name == "v" and attention.value_embedding is not None:
                table = attention.value_embedding.weight
                table.data = (table.data.unflatten(1, (-1, size)) @ projection).flatten(1)


@pytest.mark.parametrize("option", RANKS)
def test_dimensions_that_hold_nothing_go_without_a_trace(option):
    own = {} if option == "learned" else {"rotary_learned_frequencies": True}
    model = tiny_model(**OPTIONS[option] | own)
    rank = model.config.head_dim - 2
    whole = copy.deepcopy(model)
    flatten_heads(model, rank)
    smaller = prune(model, input_moments(model), Sizes(rank=rank))
    assert smaller.config.head_dim == rank
    assert difference(model, smaller) < SYMMETRY[torch.float64]
    assert difference(whole, prune(whole, input_moments(whole), Sizes(rank=rank))) > 1e-3


def test_frequencies_of_a_configuration_become_parameters():
    """The angles of a configuration are float32 in every model, those of parameters are not."""
    model = model_of("rotary")
    smaller = prune(model, input_moments(model), Sizes(rank=model.config.head_dim))
    assert smaller.config.rotary_learned_frequencies
    assert difference(model, smaller) < SYMMETRY[torch.float32]


def test_a_whole_rank_is_a_change_of_frames():
    model = model_of("learned")
    smaller = prune(model, input_moments(model), Sizes(rank=model.config.head_dim))
    assert difference(model, smaller) < SYMMETRY[torch.float64]
    ours, theirs = (side.model.layers[0].self_attn.v_proj.weight for side in (model, smaller))
    assert float((ours - theirs).detach().norm() / ours.detach().norm()) > 0.1


def test_everything_at_once_in_a_smaller_model_that_saves_and_loads(tmp_path):
    model = model_of("multi-head")
    smaller = prune(model, input_moments(model), Sizes(neurons=0.3, heads=1, rank=6), progress=True)
    assert sum(p.numel() for p in smaller.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
    smaller.save_pretrained(tmp_path)
    assert difference(smaller, type(model).from_pretrained(tmp_path, dtype=torch.float64)) == 0
    assert smaller(tokens(1, 4), labels=tokens(1, 4)).loss.isfinite()


class TestElimination:
    def problem(self, size: int = 1):
        generator = torch.Generator().manual_seed(2)
        inputs = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ torch.randn(
            12, 12, generator=generator, dtype=torch.float64
        )
        return torch.randn(5, 12, generator=generator, dtype=torch.float64), inputs.T @ inputs / len(inputs)

    def error(self, weight, fitted, moments) -> float:
        change = fitted - weight
        return float((change @ moments * change).sum())

    def best(self, weight, moments, kept) -> float:
        """The error of the least-squares fit by some inputs."""
        fitted = torch.zeros_like(weight)
        fitted[:, kept] = torch.linalg.solve(moments[kept][:, kept], moments[kept] @ weight.T).T
        return self.error(weight, fitted, moments)

    @pytest.mark.parametrize("size", [1, 3])
    def test_the_first_to_go_is_the_one_that_is_missed_least(self, size):
        weight, moments = self.problem()
        kept, fitted = eliminate(weight, moments, 1, size)
        units = torch.arange(12 // size)
        losses = {}
        for unit in units.tolist():
            inputs = torch.arange(12).view(-1, size)[units != unit].flatten()
            losses[unit] = self.best(weight, moments, inputs)
        (gone,) = set(units.tolist()) - set(kept.tolist())
        assert losses[gone] == min(losses.values()) < 0.9 * max(losses.values())
        assert self.error(weight, fitted, moments) == pytest.approx(losses[gone], rel=1e-2)

    def test_the_rest_is_fitted(self):
        weight, moments = self.problem()
        kept, fitted = eliminate(weight, moments, 6)
        best = self.best(weight, moments, kept)
        assert self.error(weight, fitted, moments) == pytest.approx(best, rel=1e-2)
        unfitted = torch.zeros_like(weight)
        unfitted[:, kept] = weight[:, kept]
        assert self.error(weight, unfitted, moments) > 1.5 * best
        others = [self.best(weight, moments, torch.randperm(12)[:6].sort().values) for _ in range(20)]
        assert best < sorted(others)[5]

    def test_groups_lose_equally_many(self):
        weight, moments = self.problem()
        kept, _ = eliminate(weight, moments, 4, 1, groups=2)
        assert len(kept) == 8 and int((kept < 6).sum()) == 4


@pytest.mark.parametrize(
    ("option", "sizes", "message"),
    [
        ("learned", {}, "`neurons`, `heads` or `rank` must say what shall go"),
        ("learned", {"neurons": 1.0}, "`neurons` must be a part of them"),
        ("experts", {"neurons": 0.5}, "`neurons` must be 0 for a model with experts"),
        ("learned", {"heads": 1}, "`heads` must be at least 0, less than 4 and a multiple of the 2"),
        ("multi-head", {"heads": 4}, "`heads` must be at least 0, less than 4, got 4"),
        ("learned", {"rank": 0}, "`rank` must be from 1 to the `head_dim`"),
        ("qk-norm", {"rank": 4}, "got `qk_norm=True`"),
        ("squared-distance", {"rank": 4}, "got `attention_score='squared_distance'`"),
        ("rotary", {"rank": 3}, "`rank` must be even"),
        ("rotary-partial", {"rank": 4}, "positions that turn whole heads"),
        ("learned", {"neurons": 0.001}, "`neurons` must leave out one of the"),
    ],
)
def test_sizes_that_cannot_be(option, sizes, message):
    model = model_of(option)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        prune(model, [], Sizes(**sizes))


def test_frequencies_stay_in_single_precision():
    model = model_of("rotary").to(torch.bfloat16)
    smaller = prune(model, input_moments(model), Sizes(rank=6))
    assert smaller.dtype == torch.bfloat16
    assert smaller.model.layers[0].self_attn.rotary_frequencies.dtype == torch.float32


def test_moments_that_are_missing_or_not_finite():
    model = model_of("gelu")
    (moments,) = input_moments(model)
    name = "model.layers.1.mlp.down_proj"
    with pytest.raises(ValueError, match="`moments` must have those of the inputs of"):
        prune(model, [{key: value for key, value in moments.items() if key != name}], Sizes(neurons=0.2))
    with pytest.raises(ValueError, match="`moments` must be of every layer, got none of layer 2"):
        prune(model, [{key: value for key, value in moments.items() if ".2." not in key}], Sizes(neurons=0.2))
    moments[name] = moments[name] * float("nan")
    with pytest.raises(ValueError, match="`moments` must be finite"):
        prune(model, [moments], Sizes(neurons=0.2))


class TestRecovery:
    def distance(self, teacher, model, ids) -> float:
        """The KL divergence from the teacher, per token."""
        with torch.no_grad():
            target, ours = (side(ids).logits.log_softmax(-1) for side in (teacher, model))
        return float((target.exp() * (target - ours)).sum(-1).mean())

    def test_the_smaller_comes_nearer_to_the_larger(self):
        teacher, ids = tiny_model(dtype=torch.float32), tokens(72, 16)
        smaller = prune(teacher, input_moments(teacher), Sizes(neurons=0.5))
        before = copy.deepcopy(smaller.state_dict())
        after = recovered(smaller, teacher, ids[:64], 60, learning_rate=3e-3, batch=8)
        assert self.distance(teacher, after, ids[64:]) < 0.7 * self.distance(teacher, smaller, ids[64:])
        assert all(map(torch.equal, before.values(), smaller.state_dict().values()))
        assert self.distance(teacher, teacher, ids) < 1e-6

    @pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
    def test_an_adapter_learns_it_and_is_merged(self, mixed_precision):
        teacher, ids = tiny_model(dtype=torch.float32), tokens(72, 16)
        smaller = prune(teacher, input_moments(teacher), Sizes(neurons=0.5))
        before, drawn = copy.deepcopy(smaller.state_dict()), torch.get_rng_state()
        options = {"lora": 4, "learning_rate": 1e-2, "batch": 8, "mixed_precision": mixed_precision}
        after = recovered(smaller, teacher, ids[:64], 60, **options)
        assert type(after) is type(smaller) and {*after.state_dict()} == {*before} and not after.training
        assert self.distance(teacher, after, ids[64:]) < 0.7 * self.distance(teacher, smaller, ids[64:])
        assert all(map(torch.equal, before.values(), smaller.state_dict().values()))
        moved = after.state_dict()
        assert {name for name, tensor in before.items() if not torch.equal(tensor, moved[name])} == {
            name for name in before if name.endswith("_proj.weight") or name == "model.project_in.weight"
        }
        again = recovered(smaller, teacher, ids[:64], 60, **options)
        assert all(map(torch.equal, moved.values(), again.state_dict().values()))
        assert torch.equal(drawn, torch.get_rng_state()), "the caller's own numbers"

    def test_bad_arguments(self):
        model, ids = tiny_model(dtype=torch.float32), tokens(4, 8)
        for options, said in (
            ({"lora": 0}, "`lora` must be a rank of at least 1"),
            ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
            ({"mixed_precision": "fp16"}, "`mixed_precision` must be no or bf16"),
        ):
            with pytest.raises(ValueError, match=said):
                recovered(model, model, ids, 1, **options)

    def test_it_does_not_depend_on_the_frame(self):
        teacher, ids = tiny_model(), tokens(4, 12)
        smaller = prune(teacher, input_moments(teacher), Sizes(neurons=0.5))
        generator = torch.Generator().manual_seed(0)
        g = GaugeTransformation.random(smaller.config, generator, ("stream", "neurons"))
        ways = [recovered(model, teacher, ids, 3, learning_rate=1e-2) for model in (smaller, g(smaller))]
        assert difference(*ways) < SYMMETRY[torch.float32]
        assert difference(ways[0], smaller) > 1e-3

    def test_a_rate_that_is_too_large(self):
        model = tiny_model(dtype=torch.float32)
        with pytest.raises(ValueError, match="`learning_rate` must leave losses finite, got 1e\\+30"):
            recovered(model, model, tokens(4, 8), 5, learning_rate=1e30)
