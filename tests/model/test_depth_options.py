"""Depth as time in the model: solvers, interpolation, the adjoint, caches, saving; and every refusal with its text."""

from itertools import product

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GPT2LMHeadModel

from rigpt_hf import RiGPTForCausalLM, flow_rigpt
from rigpt_hf.configuration_rigpt import ADAPTIVE_SOLVERS, FIXED_STEP_SOLVERS
from rigpt_hf.conversion import convert_model
from tests.conversion.sources import gpt2_config
from tests.model.agreement import (
    assert_different,
    assert_same,
    assert_same_gradients,
    difference,
    recompute_activations,
)
from tests.model.test_generation import GREEDY, without_cache
from tests.model.test_remote_code import WITHOUT_PACKAGE, save
from tests.models import ALL, COVER, EACH, OPTIONS, over, randomise_, tiny_config, tiny_model, tokens
from tests.processes import run
from tests.tolerances import SYMMETRY


# Euler's method with one step per layer against the ordinary network, in float64.
SAME_NETWORK = 1e-12
# Options that depth with interpolated weights refuses.
APART = {"value_embedding_period", "local_frames", "layer_types", "no_rope_layers", "num_experts"}
FLOWS = {
    "constant": {"depth_solver": "midpoint", "depth_steps": 2, "attention_score": "squared_distance"},
    "linear": {"depth_solver": "rk4", "depth_interpolation": "linear", "embedding_size": 24},
}
every_flow = pytest.mark.parametrize("options", FLOWS.values(), ids=FLOWS.keys())


@over(EACH, [*COVER, *OPTIONS])
def test_one_euler_step_per_layer_is_the_ordinary_network(option):
    options = {name: value for name, value in ALL[option].items() if not name.startswith("depth")}
    euler = options | {"depth_solver": "euler"}
    if "num_experts" in options:
        with pytest.raises(ValueError, match="`depth_solver='euler'` needs layers that are smooth in the stream"):
            tiny_config(**euler)
        return
    expected = tiny_model(**options)(tokens(2, 9)).logits
    assert difference(tiny_model(**euler)(tokens(2, 9)).logits, expected) <= SAME_NETWORK
    assert_different(tiny_model(**euler | {"depth_steps": 2})(tokens(2, 9)).logits, expected)
    linear = euler | {"depth_interpolation": "linear"}
    if APART & options.keys():
        with pytest.raises(ValueError, match="`depth_interpolation='linear'` (needs layers|adds weights)"):
            tiny_config(**linear)
        return
    assert difference(tiny_model(**linear)(tokens(2, 9)).logits, expected) <= SAME_NETWORK


def count_evaluations(model) -> list[int]:
    calls = []
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("interpolation", ["constant", "linear"])
@pytest.mark.parametrize("solver", FIXED_STEP_SOLVERS)
def test_solvers_with_fixed_steps_evaluate_as_often_as_they_say(solver, interpolation):
    model = tiny_model(depth_solver=solver, depth_steps=3, depth_interpolation=interpolation)
    calls = count_evaluations(model)
    output = model(tokens(2, 7), output_hidden_states=True)
    assert len(calls) == flow_rigpt.evaluations_per_layer(model.config) == 3 * FIXED_STEP_SOLVERS[solver]
    assert len(output.past_key_values) == 3 * len(calls)
    assert [state.shape for state in output.hidden_states] == [(2, 7, 32)] * 4
    model(tokens(2, 7), labels=tokens(2, 7)).loss.backward()
    assert all(
        parameter.grad.abs().max() > 0 for name, parameter in model.named_parameters() if "k_proj.b" not in name
    )


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(solver, marks=[pytest.mark.full] * (solver not in ("bosh3", "dopri5")))
        for solver in ADAPTIVE_SOLVERS
    ],
)
def test_solvers_that_choose_their_steps_find_the_same_flow(solver):
    tight = {"depth_rtol": 1e-8, "depth_atol": 1e-8} if solver in ("dopri5", "dopri8") else {}
    model = smooth_model(depth_solver=solver, **tight)
    calls = count_evaluations(model)
    found = model(tokens(1, 5)).logits
    fine = smooth_model(depth_solver="rk4", depth_steps=32)(tokens(1, 5)).logits
    error = difference(found, fine)
    print(f"{error:.1e}, {len(calls)} evaluations")
    assert error <= (1e-7 if tight else 1e-3)
    assert error < difference(smooth_model(depth_solver="euler", depth_steps=8)(tokens(1, 5)).logits, fine) / 10
    coarse = count_evaluations(model)
    model.config.depth_rtol = model.config.depth_atol = 1e-2
    model(tokens(1, 5))
    assert len(coarse) < len(calls) - len(coarse)


def smooth_model(**options) -> RiGPTForCausalLM:
    """With weights small enough for solvers to be where their orders say."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    model = RiGPTForCausalLM(tiny_config(hidden_act="gelu", **sizes, **options)).double()
    return randomise_(model, 3, scale=0.1).eval()


def gradients(**options) -> dict[str, torch.Tensor]:
    model = smooth_model(**options)
    model(tokens(1, 5), labels=tokens(1, 5)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def apart(a: dict, b: dict) -> float:
    """The distance of two gradients relative to the length of one."""
    return float(
        sum((a[name] - b[name]).square().sum() for name in b).sqrt() / sum(g.square().sum() for g in b.values()).sqrt()
    )


@pytest.mark.parametrize("interpolation", ["constant", "linear"])
@pytest.mark.full
def test_the_adjoint_gives_the_gradient_up_to_the_solver_s_error(interpolation):
    between = {"depth_interpolation": interpolation}
    options = between | {"depth_solver": "dopri5", "depth_rtol": 1e-7, "depth_atol": 1e-9}
    exact = gradients(**options)
    error = apart(gradients(depth_adjoint=True, **options), exact)
    print(f"{error:.1e}")
    assert 0 < error <= 1e-6
    fixed = {steps: between | {"depth_solver": "rk4", "depth_steps": steps} for steps in (2, 4)}
    errors = [apart(gradients(depth_adjoint=True, **each), gradients(**each)) for each in fixed.values()]
    print([f"{value:.1e}" for value in errors])
    assert errors[1] < errors[0] / 8 < 1e-3
    # Negative control: a single Euler step back is not the derivative of a single Euler step.
    coarse = between | {"depth_solver": "euler"}
    assert apart(gradients(depth_adjoint=True, **coarse), gradients(**coarse)) > 1e-2


def saved_numbers(model) -> int:
    """How many numbers autograd keeps between forward and backward pass, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens(2, 9), labels=tokens(2, 9)).loss
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("interpolation", ["constant", "linear"])
@pytest.mark.full
def test_the_adjoint_s_memory_does_not_grow_with_the_steps(interpolation):
    options = {"depth_solver": "rk4", "depth_interpolation": interpolation}
    kept = {
        adjoint: [saved_numbers(smooth_model(**options, depth_adjoint=adjoint, depth_steps=n)) for n in (1, 2, 8)]
        for adjoint in (False, True)
    }
    print(kept)
    assert kept[True][0] == kept[True][1] == kept[True][2] < kept[False][0] / 2
    assert kept[False][2] > 3 * kept[False][1] > 5 * kept[False][0]


@every_flow
def test_checkpointing_does_not_change_the_adjoint_s_gradient(options):
    expected, model = (tiny_model(depth_adjoint=True, **options).train() for _ in range(2))
    recompute_activations(model)
    model.enable_input_require_grads()
    for each in (expected, model):
        each(tokens(2, 7), labels=tokens(2, 7), use_cache=False).loss.backward()
    assert_same_gradients(model, expected)


def test_evaluations_in_one_place_of_a_cache_would_be_seen(monkeypatch):
    model, update = tiny_model(**FLOWS["constant"]), DynamicCache.update
    expected = model(tokens(2, 7), use_cache=False).logits
    assert_same(model(tokens(2, 7), past_key_values=DynamicCache(config=model.config)).logits, expected)
    monkeypatch.setattr(DynamicCache, "update", lambda cache, key, value, place: update(cache, key, value, place // 2))
    assert_different(model(tokens(2, 7), past_key_values=DynamicCache(config=model.config)).logits, expected)


def test_a_solver_that_chooses_its_steps_generates_without_a_cache():
    model = smooth_model(depth_solver="dopri5")
    output = model.generate(tokens(1, 5), return_dict_in_generate=True, **GREEDY | {"max_new_tokens": 3})
    assert torch.equal(output.sequences, without_cache(model, tokens(1, 5), count=3))
    assert output.past_key_values is None and model(tokens(1, 5), use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="`inputs_embeds` cannot start a generation with `depth_solver='dopri5'`"):
        model.generate(inputs_embeds=model.get_input_embeddings()(tokens(1, 5)), **GREEDY)


def test_later_tokens_bear_on_earlier_ones_only_where_steps_are_chosen():
    """What the config says of causality."""
    changed = tokens(1, 6)
    changed[0, -1] += 1
    for options, causal in (({"depth_solver": "rk4"}, True), ({"depth_solver": "dopri5"}, False)):
        model = smooth_model(**options)
        first, second = (model(ids).logits[:, :-1] for ids in (tokens(1, 6), changed))
        error = difference(first, second)
        assert error <= SYMMETRY[torch.float64] if causal else SYMMETRY[torch.float64] < error < 1e-3


@every_flow
def test_a_saved_model_comes_back_and_its_options_can_be_changed(options, tmp_path):
    model = tiny_model(**options)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is RiGPTForCausalLM and loaded.config.depth_solver == options["depth_solver"]
    assert_same(loaded(tokens(2, 7)).logits, model(tokens(2, 7)).logits)
    changed = {"depth_solver": "euler", "depth_steps": 1, "depth_interpolation": "constant"}
    euler = RiGPTForCausalLM.from_pretrained(tmp_path, **changed).eval()
    expected = tiny_model(**{name: value for name, value in options.items() if not name.startswith("depth")})
    assert_same(euler(tokens(2, 7)).logits, expected(tokens(2, 7)).logits)
    with pytest.raises(ValueError, match="`depth_solver` must be one of euler, .* got 'leapfrog'"):
        RiGPTForCausalLM.from_pretrained(tmp_path, depth_solver="leapfrog")


def test_a_converted_gpt2_follows_the_flow(tmp_path):
    torch.manual_seed(0)
    stock = randomise_(GPT2LMHeadModel(gpt2_config(attn_pdrop=0.1)), 0).double().eval()
    convert_model(stock).save_pretrained(tmp_path)
    expected = stock(tokens(2, 9)).logits
    euler = RiGPTForCausalLM.from_pretrained(tmp_path, depth_solver="euler").eval()
    assert difference(euler(tokens(2, 9)).logits, expected) <= SAME_NETWORK
    flows = [RiGPTForCausalLM.from_pretrained(tmp_path, depth_solver="rk4", depth_steps=n).eval() for n in (16, 32)]
    coarse, fine = (model(tokens(2, 9)).logits for model in flows)
    assert_different(coarse, expected)
    assert difference(coarse, fine) < difference(expected, fine) / 100
    with pytest.raises(ValueError, match="`attention_dropout` must be 0 to train with `depth_solver='rk4'`.* got 0.1"):
        flows[0].train()(tokens(2, 9))


SCRIPT = """
import sys, torch, transformers
flow, adaptive, plain = sys.argv[1:]
load = lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert "torchdiffeq" not in sys.modules, "the loader must be the first to import it"
input_ids = torch.load(flow + "/input_ids.pt")
for folder in (adaptive, flow):
    model = load(folder)
    with torch.no_grad():
        torch.save(model(input_ids)[0], folder + "/output.pt")
model.generate(input_ids, max_new_tokens=2, do_sample=False)
assert type(model).__module__.startswith("transformers_modules.")
sys.modules["torchdiffeq"] = None
print("plain", load(plain)(input_ids)[0].shape)
try:
    load(flow)
except ImportError as error:
    print("refused", error)
"""


def test_a_folder_loads_where_nothing_is_installed_and_only_flows_need_the_solvers(tmp_path):
    expected = save(RiGPTForCausalLM, tmp_path / "flow", **FLOWS["linear"])
    adaptive = save(RiGPTForCausalLM, tmp_path / "adaptive", depth_solver="dopri5")
    save(RiGPTForCausalLM, tmp_path / "plain")
    folders = (tmp_path / name for name in ("flow", "adaptive", "plain"))
    process = run("-c", WITHOUT_PACKAGE + SCRIPT, *folders, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert difference(torch.load(tmp_path / "flow" / "output.pt"), expected) <= SYMMETRY[torch.float32]
    assert difference(torch.load(tmp_path / "adaptive" / "output.pt"), adaptive) <= SYMMETRY[torch.float32]
    assert "plain torch.Size([2, 7, 61])" in process.stdout
    assert "refused `depth_solver` needs torchdiffeq, which is not installed. Run `pip install" in process.stdout


def test_plans_for_parallelism():
    plain, constant, linear = (tiny_config(), *(tiny_config(**options) for options in FLOWS.values()))
    assert constant.base_model_pp_plan is not None and linear.base_model_pp_plan is None
    assert not RiGPTForCausalLM(linear).pp_plan
    assert linear.base_model_tp_plan == plain.base_model_tp_plan


def test_what_a_flow_cannot_do_is_refused():
    adaptive = tiny_model(depth_solver="dopri5")
    with pytest.raises(ValueError, match="`past_key_values` must be left out with `depth_solver='dopri5'`, which"):
        adaptive(tokens(1, 3), past_key_values=DynamicCache(config=adaptive.config))
    with pytest.raises(ValueError, match="`depth_solver='dopri5'` needs at least single precision .* torch.bfloat16"):
        tiny_model(dtype=torch.bfloat16, depth_solver="dopri5")(tokens(1, 3))
    adjoint = tiny_model(depth_solver="rk4", depth_adjoint=True)
    with pytest.raises(ValueError, match="`past_key_values` must be left out with `depth_adjoint=True` where gradie"):
        adjoint(tokens(1, 3), past_key_values=DynamicCache(config=adjoint.config))
    assert adjoint(tokens(1, 3)).past_key_values is None
    with torch.no_grad():
        assert len(adjoint(tokens(1, 3)).past_key_values) == 12
    for other in (tiny_model(), tiny_model(depth_solver="midpoint")):
        filled = other(tokens(1, 3)).past_key_values
        message = "`past_key_values` must be empty or have a place for each of 12 evaluations"
        with pytest.raises(ValueError, match=message), torch.no_grad():
            adjoint(tokens(1, 3), past_key_values=filled)
    with pytest.raises(ValueError, match="`past_key_values` must be left out with .* continuous batching"):
        adjoint(tokens(1, 3), cache=object())


def test_dropout_needs_one_evaluation_per_layer():
    twice = ({"depth_solver": "midpoint"}, {"depth_solver": "euler", "depth_adjoint": True})
    for name, options in product(("attention_dropout", "residual_dropout"), twice):
        model = tiny_model(**{name: 0.3}, **options)
        model(tokens(1, 3))
        with pytest.raises(ValueError, match=f"`{name}` must be 0 to train with `depth_solver=.*, got 0.3. Set it"):
            model.train()(tokens(1, 3))
        tiny_model(**{name: 0.3}, depth_solver="euler").train()(tokens(1, 3))
    tiny_model(embedding_dropout=0.3, depth_solver="midpoint").train()(tokens(1, 3))


def test_layers_with_different_parameters_are_not_interpolated():
    model = tiny_model(depth_solver="rk4", depth_interpolation="linear")
    model.model.layers[1].mlp.extra = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match="`depth_interpolation='linear'` needs layers with the same parameters, got '"
    ):
        model(tokens(1, 3))
