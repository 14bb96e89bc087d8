"""The word for a difference: of two models of which one is known to be better, for every metric."""

import copy
import io
import json
import random
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rigpt_hf.conversion import convert_model
from rigpt_hf.evaluation.harness.figures import figure
from rigpt_hf.evaluation.harness.report import as_html
from rigpt_hf.evaluation.harness.results import _compared, _correct, build
from rigpt_hf.evaluation.harness.runner import EvaluationJob
from rigpt_hf.evaluation.harness.suites import Suite, Task, TextOptions
from rigpt_hf.evaluation.harness.tables import as_markdown, on_terminal, rows, verdict
from rigpt_hf.evaluation.harness.tasks import measure
from rigpt_hf.evaluation.harness.texts import Texts
from rigpt_hf.evaluation.measures import MEASURES
from rigpt_hf.evaluation.models import EvaluatedModel
from rigpt_hf.terminal import Console
from tests.evaluation.toys import tiny_gpt2, word_tokenizer


# The first stands for all that is unknown, the last is in no text.
WORDS = ["<s>", *[f" {a}{b}x" for a in "abcd" for b in "efgh"][:14], " never"]
SIZE, USED = len(WORDS), range(1, len(WORDS) - 1)
RESULTS = Path(__file__).parents[2] / "evaluation/results"
TASKS = {
    "words": [Task("perplexity"), Task("cloze"), Task("multiple_choice")],
    "ids": [
        Task("perplexity"),
        Task("quantization_robustness", arguments={"schemes": ["W3A16"], "frames": ["identity"]}),
    ],
}
TESTED = {
    ("words", "perplexity"): ["bits per byte"],
    ("words", "cloze"): ["accuracy"],
    ("words", "multiple_choice"): ["accuracy", "accuracy, normalized"],
    ("ids", "perplexity"): ["loss"],
    ("ids", "quantization_robustness"): ["loss of W3A16, identity"],
}


def following(token: int) -> int:
    return token % (SIZE - 2) + 1


def chains(count: int = 40, length: int = 24) -> list[list[int]]:
    """Rows in which each token but every tenth or so is the one that follows."""
    draw = random.Random(0)
    found = []
    for _ in range(count):
        row = [draw.choice(USED)]
        while len(row) < length:
            row.append(following(row[-1]) if draw.random() < 0.9 else draw.choice(USED))
        found.append(row)
    return found


@torch.no_grad()
def chain_model(strength: float, fragile: bool = False) -> EvaluatedModel:
    """
    A GPT-2 that takes the next token for the one that follows (or, with a negative strength, for any other): in its
    head, or, `fragile`, in a feedforward block, whose weights lie beside one so large that 3 bits leave none of them.
    """
    sizes = {"vocab_size": SIZE, "n_embd": SIZE, "n_inner": SIZE, "n_layer": 1, "n_head": 1, "n_positions": 64}
    config = GPT2Config(**sizes, activation_function="relu", tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
    eye = torch.eye(SIZE)
    follows = torch.zeros(SIZE, SIZE)
    for token in USED:
        follows[token, following(token)] = 1.0
    model.transformer.wte.weight.copy_(eye)
    if fragile:
        mlp = model.transformer.h[0].mlp
        mlp.c_fc.weight.copy_(eye)
        mlp.c_fc.weight[-1] = 10.0
        # What a token that is never there has after the norm.
        mlp.c_fc.bias.fill_(10.0 / (SIZE - 1) ** 0.5)
        mlp.c_proj.weight.copy_(follows)
    model.lm_head.weight.copy_(strength * (eye if fragile else follows.T))
    return EvaluatedModel(model, word_tokenizer(WORDS))


@cache
def measured(kind: str, metric: str, which: str) -> dict:
    # Worse at the text itself, and worse when rounded, are two things.
    good = chain_model(1.0)
    worse = chain_model(1.0, fragile=True) if metric == "quantization_robustness" else chain_model(-1.0)
    task = next(each for each in TASKS[kind] if each.metric == metric)
    texts = ids = chains()
    if kind == "words":
        texts = ["".join(WORDS[token] for token in row) + "." for row in ids]
    return measure(task, {"good": good, "worse": worse}[which], Texts(texts, {}), 8)


def compared(kind: str, metric: str, model: str, baseline: str) -> dict[str, dict]:
    """The quantities of one task in the results of an evaluation."""
    task = next(each for each in TASKS[kind] if each.metric == metric)
    subjects = {"model": chain_model(1.0), "baseline": chain_model(1.0)}
    found = {name: measured(kind, metric, which) for name, which in zip(subjects, (model, baseline), strict=True)}
    cells = [EvaluationJob(task.name, (name,), name, None) for name in subjects]
    suite = Suite("s", TextOptions(), (task,))
    hashes = dict.fromkeys(subjects, "0" * 64)
    texts = Texts([[1]], {"source": "chains", "documents": 40, "sha256": "", "revision": None})
    results = build(SimpleNamespace(batch_size=8), suite, texts, subjects, hashes, cells, found, {})
    return {each["name"]: each for each in results["tasks"][0]["quantities"]}


def test_the_better_model_reads_better():
    for (kind, metric), names in TESTED.items():
        better = compared(kind, metric, "good", "worse")
        assert [name for name, quantity in better.items() if verdict(quantity)] == names
        worse = compared(kind, metric, "worse", "good")
        alike = compared(kind, metric, "good", "good")
        for name in names:
            words = [verdict(quantities[name]) for quantities in (better, worse, alike)]
            assert words == ["better", "worse", "no difference shown"], name


def test_the_models_are_what_they_are_said_to_be():
    """So that the words above are about something."""
    good, bad = (measured("ids", "perplexity", which)["perplexity"] for which in ("good", "worse"))
    assert good < 0.8 * SIZE < SIZE < bad
    cost = [
        measured("ids", "quantization_robustness", which)["rounded"]["identity"]["W3A16"]["increase"]
        for which in ("good", "worse")
    ]
    assert abs(cost[0]) < 1e-6 and cost[1] > 0.1
    assert measured("words", "cloze", "good")["accuracy"] > 0.7 > measured("words", "cloze", "worse")["accuracy"]


def speeds(factor: float) -> dict:
    """The result of `throughput` for a model that is so much faster than the baseline."""
    keys = {"prefill_tokens_per_second": factor, "decode_tokens_per_second": factor, "time_to_first_token": 1 / factor}
    ratios = {key: {"values": [factor * each for each in (0.98, 1.0, 1.02, 1.01, 0.99)]} for key in keys}
    return {key: {"median": value} for key, value in keys.items()} | {"ratios": ratios, "peak_memory": 1e6 / factor}


def test_the_faster_model_reads_better():
    baseline = speeds(1.0)
    del baseline["ratios"]
    for factor, word in ((2.0, "better"), (0.5, "worse"), (1.0, "no difference shown")):
        task = {"quantities": _compared(MEASURES["throughput"], {"a": speeds(factor), "b": baseline}, ["a", "b"])}
        _correct([task])
        words = {quantity["name"]: verdict(quantity) for quantity in task["quantities"]}
        timed = dict.fromkeys(("prefill", "decoding", "time to first token"), word)
        assert len(words) == 4 and words | timed == words and words[task["quantities"][-1]["name"]] == ""
        for quantity in task["quantities"]:
            a, b = (quantity["models"][name]["value"] for name in "ab")
            if factor != 1:
                assert (a > b) is ((quantity["better"] == "more") is (word == "better")), quantity["name"]


def test_numbers_without_examples_have_a_direction_and_no_word():
    """A RiGPT is less changed by a turn than a stock model, and less is what is called better."""
    gpt2 = tiny_gpt2()
    texts = Texts([list(range(40))], {})
    for metric, arguments in (("invariance", {"draws": 1}), ("outliers", {"context": 16})):
        task = Task(metric, arguments=arguments)
        found = {
            name: measure(task, EvaluatedModel(each), texts, 8)
            for name, each in {"a": convert_model(gpt2).eval(), "b": gpt2}.items()
        }
        listed = _compared(MEASURES[metric], found, ["a", "b"])
        assert listed and all(each["better"] == "less" and verdict(each) == "" for each in listed)
        if metric == "invariance":
            assert all(each["models"]["a"]["value"] < each["models"]["b"]["value"] for each in listed)
    assert {metric for _, metric in TESTED} | {"throughput", "invariance", "outliers"} == set(MEASURES)


def test_noise_of_increases_near_zero_is_no_difference():
    """An increase is a difference of losses, and has their rounding: 1e-5 of 3 nats, not of 1e-6."""

    def significant(difference, scale, size=1e-6):
        values = {"a": {"value": size + difference}, "b": {"value": size}}
        if scale is not None:
            values = {name: entry | {"scale": scale} for name, entry in values.items()}
        difference = {"kind": "difference", "value": difference, "p_value": 1e-4}
        quantity = {"models": values, "difference": difference}
        _correct([{"quantities": [quantity]}])
        return quantity["difference"]["significant"]

    assert not significant(2e-5, 3.0) and not significant(-2e-5, 3.0)
    assert significant(4e-5, 3.0) and significant(2e-5, None)
    # Rounding of other numbers is no difference either, however regular.
    assert significant(1e-3, None, 1.0) and not significant(4e-8, None, 1.0) and not significant(-4e-8, None, 1.0)
    result = measured("ids", "quantization_robustness", "worse")
    (quantity,) = MEASURES["quantization_robustness"].quantities(result)
    assert quantity.scale == result["rounded"]["identity"]["W3A16"]["loss"] > 0
    listed = compared("ids", "quantization_robustness", "worse", "good")["loss of W3A16, identity"]
    assert listed["models"]["model"]["scale"] == quantity.scale


@pytest.fixture(scope="module")
def committed() -> dict:
    """Results of before this was written, of which only those of rounding are kept."""
    results = json.loads((RESULTS / "evaluate_converted.json").read_text())
    results["tasks"] = [task for task in results["tasks"] if task["metric"] == "quantization_robustness"]
    return results


def test_numbers_of_a_conversion_are_called_so(committed):
    """A stock model has no other frames than its own."""
    listed = rows(committed)
    turned = [row[1] for row in listed if "own frame" not in row[1]]
    assert turned and all(text.endswith(" (stock GPT-2, converted)") for text in turned)
    own = [row[1] for row in listed if "own frame" in row[1]]
    assert own and not any("converted" in text for text in own)
    page, table = as_html(committed), as_markdown(committed)
    assert page.count("Hadamard frame (stock GPT-2, converted)</td>") == sum("Hadamard" in text for text in turned) > 0
    assert "Hadamard frame (stock GPT-2, converted) |" in table
    # The library that draws letters as curves says in a comment what they are.
    _, picture = figure(committed["tasks"][0], list(committed["models"]))
    assert (
        "<!-- stock GPT-2, converted, Hadamard frame -->" in picture and "<!-- stock GPT-2, own frame -->" in picture
    )
    assert "<!-- converted, Hadamard frame -->" in picture  # the name of the other model, which is a RiGPT


def test_a_rigpt_is_called_what_it_is(committed):
    unconverted = copy.deepcopy(committed)
    for task in unconverted["tasks"]:
        for facts in task["models"].values():
            facts["protocol"]["converted"] = False
    assert not any("converted" in row[1] for row in rows(unconverted))


@pytest.mark.parametrize("name", ["converted", "rigpt", "smollm2"])
def test_committed_results_can_be_read(name):
    results = json.loads((RESULTS / f"evaluate_{name}.json").read_text())
    listed = rows(results)
    assert len(listed) == sum(len(task["quantities"]) for task in results["tasks"]) > 10
    assert "Wilson's for shares of right answers" in as_markdown(results)


def test_rounding_is_told_in_words():
    told = {
        "loss of W8A8, identity": "added loss, 8-bit weights and activations, own frame",
        "loss of W4A16, hadamard": "added loss, 4-bit weights, Hadamard frame",
        "loss of W4A8, haar": "added loss, 4-bit weights, 8-bit activations, random frame",
        "loss of W16A8, pca": "added loss, 8-bit activations, principal axes",
        "loss of W4A16, gptq": "added loss, 4-bit weights, GPTQ",
        "loss of int8, mine": "loss of int8, mine",
    }
    assert {name: MEASURES["quantization_robustness"].words(name) for name in told} == told
    assert MEASURES["perplexity"].words("loss") == "loss"


def test_questions_that_nobody_answered_are_one_line_on_a_terminal():
    def said(*values):
        entries = [{"a": {"value": value}, "b": {"value": 0}} for value in values]
        names = ("accuracy", "accuracy, normalized")
        listed = [{"name": name, "unit": "", "models": own} for name, own in zip(names, entries, strict=True)]
        task = {"task": "which ending", "metric": "multiple_choice", "quantities": listed, "errors": {}}
        task["models"] = {name: {"examples": 24} for name in "ab"}
        out = io.StringIO()
        Console(file=out, width=80).print(on_terminal({"models": dict.fromkeys("ab"), "tasks": [task]}))
        return out.getvalue()

    assert "none of 24 right" in said(0, 0) and "accuracy" not in said(0, 0)
    assert "none" not in said(0, 0.25) and "accuracy, normalized" in said(0, 0.25)


@pytest.mark.parametrize("name", ["converted", "rigpt", "smollm2"])
def test_the_table_on_a_terminal_fits_and_says_what_its_words_mean(name):
    results = json.loads((RESULTS / f"evaluate_{name}.json").read_text())
    names = list(results["models"])
    results["tasks"][0]["errors"] = {names[0]: "no room"}
    out = io.StringIO()
    Console(file=out, width=80, markup=False).print(on_terminal(results))
    said = out.getvalue()
    assert max(map(len, said.splitlines())) <= 80 and "…" not in said and "[bold]" not in said
    quantities = [quantity for task in results["tasks"] for quantity in task["quantities"]]
    worth = {word for quantity in quantities for word in verdict(quantity).split()}
    assert len(worth) > 2 and worth <= {*said.split()} and "nats per token" in " ".join(said.split())
    words = " ".join(said.split())
    assert "added loss, 4-bit weights" in words and "W4A" not in said and ": no room" in words
    assert "The ratio (×) of two is the geometric mean of their ratios in the same turn" in words
    longer = json.loads(json.dumps(results).replace(f'"{names[0]}"', f'"HuggingFaceTB/{9 * "long"}"'))
    out = io.StringIO()
    Console(file=out, width=80, markup=False).print(on_terminal(longer))
    numbers = [line.split()[4] for line in said.splitlines() if line.startswith("bits per byte")]
    assert numbers and all(value in out.getvalue() for value in numbers) and "…" not in out.getvalue()
    results["tasks"] = [task for task in results["tasks"] if task["metric"] == "perplexity"]
    assert on_terminal(results).caption is None
