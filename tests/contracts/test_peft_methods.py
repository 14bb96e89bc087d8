"""Every method of PEFT works on a RiGPT, or says in one line what to use instead."""

import itertools

import pytest
import torch

from tests.model.agreement import assert_different, assert_same
from tests.models import OPTIONS, randomise_, tiny_config, tiny_model, tokens


peft = pytest.importorskip("peft")
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as METHODS  # noqa: E402


# What a method cannot do without, or does not fit so small a model by default.
SETTINGS = {
    "ADALORA": {"total_step": 10, "lora_alpha": 10000},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [4, 5, 6, 7], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 2, 4]},
    "FOURIERFT": {"n_frequency": 8},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "OFT": {"oft_block_size": 4},
    "POLY": {"n_tasks": 2, "n_skills": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"r": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": tokens(2, 9)[0, :2].tolist()},
    "VBLORA": {"num_vectors": 4, "vector_length": 4, "topk": 2},
    "WAVEFT": {"n_frequency": 8},
    "XLORA": {"hidden_size": 32, "adapters": {}},
}
ARGUMENTS = {
    "CPT": {"input_type_mask": torch.full((2, 9), 4)},
    "MULTITASK_PROMPT_TUNING": {"task_ids": torch.tensor([0, 1])},
    "POLY": {"task_ids": torch.tensor([0, 1])},
}
REFUSED = {
    "ADAPTION_PROMPT": "AdaptionPromptConfig needs the queries of Llama's attention. Use another adapter",
    "LN_TUNING": "LNTuningConfig needs norms with weights, which RiGPT's norms have not. Use another adapter",
}
PROMPTS = ("CPT", "MULTITASK_PROMPT_TUNING", "PROMPT_TUNING", "P_TUNING")
PREFIXES = ("CARTRIDGE", "PREFIX_TUNING")
SETS = {
    "plain": {},
    "projections": OPTIONS["untied-projected"],
    "values": {"value_embedding_period": 2, "gated_mlp": True, "hidden_act": "silu"},
    "midpoint": {"depth_solver": "midpoint", "embedding_size": 24},
    "dopri5": {"depth_solver": "dopri5"},
}
REFUSED_WITH = {
    ("SHADOW", "projections"): "ShadowConfig needs a base model without projections",
    ("SHADOW", "midpoint"): "ShadowConfig needs a base model without projections",
    ("SHADOW", "values"): "ShadowConfig needs a base model without projections",
    **{(name, "values"): "`value_embedding_period=2` needs a token everywhere. Use PrefixT" for name in PROMPTS},
    **{(name, "dopri5"): "with `depth_solver='dopri5'` there is none. Use Prompt" for name in PREFIXES},
}


def adapter(method: str, **settings):
    return METHODS[method](task_type="CAUSAL_LM", **(SETTINGS.get(method, {}) | settings))


def over_methods():
    """All of them with projections; the other sets of options for the methods that look at more than linear maps."""
    names = [method.value for method in METHODS]
    assert len(names) > 30
    told = {*REFUSED_WITH, ("PREFIX_TUNING", "midpoint")}
    for name, option in itertools.product(names, SETS):
        if option == "projections" or (name, option) in told:
            yield pytest.param(name, option)
        elif option != "dopri5":  # which takes long
            yield pytest.param(name, option, marks=pytest.mark.full)


@pytest.mark.parametrize(("method", "option"), [*over_methods()])
@pytest.mark.filterwarnings("ignore")  # of methods that are warned about, each in its own words
@pytest.mark.by_default(14)
def test_a_method_trains_or_says_what_to_use(method, option):
    model = tiny_model(dtype=torch.float32, **SETS[option])
    model.config.use_cache = method != "XLORA"
    refusal = REFUSED.get(method) or REFUSED_WITH.get((method, option))
    if refusal:
        with pytest.raises(ValueError, match=refusal.replace("(", r"\(")) as raised:
            peft.get_peft_model(model, adapter(method))
        assert "\n" not in str(raised.value)
        return
    expected = model(tokens(2, 9)).logits.detach()
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, adapter(method)).train()
    optimizer = torch.optim.SGD(
        [p for p in adapted.parameters() if p.requires_grad], lr=1.0 if method in ("ADALORA", "POLY") else 0.3
    )
    for _ in range(2):  # factors that start at zero learn from the second step on
        loss = adapted(input_ids=tokens(2, 9), labels=tokens(2, 9), **ARGUMENTS.get(method, {})).loss
        if method != "XLORA":  # which has nothing to choose from without adapters
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loss.isfinite()
    if method in ("XLORA", "CPT"):
        return
    adapted.eval()
    arguments = ARGUMENTS.get(method, {})
    assert_different(adapted(input_ids=tokens(2, 9), **arguments).logits[:, -9:], expected, method)
    asked = {"attention_mask": torch.ones(2, 9, dtype=torch.long), "max_new_tokens": 2, "do_sample": False}
    assert adapted.generate(input_ids=tokens(2, 9), **asked, **arguments).shape == (2, 11)


def test_prompts_and_prefixes_are_saved_and_loaded(tmp_path):
    for method, options in {"PROMPT_TUNING": SETS["projections"], "PREFIX_TUNING": SETS["midpoint"]}.items():
        model = peft.get_peft_model(tiny_model(**options), adapter(method)).eval()
        model.add_adapter("second", adapter(method))
        model.save_pretrained(tmp_path / method)
        again = peft.PeftModel.from_pretrained(tiny_model(**options), tmp_path / method).eval()
        assert_same(again(tokens(2, 9)).logits, model(tokens(2, 9)).logits, method)


def test_other_models_are_left_alone():
    """The wrappers around PEFT look at a RiGPT only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=61, **sizes)
    for method in ("LN_TUNING", "PROMPT_TUNING", "PREFIX_TUNING"):
        model = peft.get_peft_model(LlamaForCausalLM(config), adapter(method))
        assert model(tokens(2, 9)).logits.isfinite().all()


HEADS = {
    "RiGPTForSequenceClassification": ("SEQ_CLS", {"labels": torch.tensor([0, 2])}, (2, 3)),
    "RiGPTForTokenClassification": ("TOKEN_CLS", {"labels": torch.tensor([[0, 1, 2] * 3] * 2)}, (2, 9, 3)),
    "RiGPTForQuestionAnswering": (
        "QUESTION_ANS",
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        (2, 9),
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_other_heads_learn_by_themselves_and_with_an_adapter(name, tmp_path):
    import rigpt_hf

    task, labels, shape = HEADS[name]
    for options in ({}, {"embedding_size": 24}):
        torch.manual_seed(0)
        model = randomise_(getattr(rigpt_hf, name)(tiny_config(num_labels=3, **options)), 0)
        output = model(tokens(2, 9), **labels)
        assert output[1].shape == shape
        output.loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
        folder = tmp_path / str(len(options))
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder)
        assert_same(again(tokens(2, 9))[0], model.eval()(tokens(2, 9))[0].detach(), "loaded")
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=4))
        adapted(input_ids=tokens(2, 9), **labels).loss.backward()
        learned = {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert any("lora_B" in n for n in learned)
        assert any("modules_to_save" in n for n in learned), learned
