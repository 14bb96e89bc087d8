"""Cards: golden texts of fixed metadata, and nothing in a card that nobody stated or measured."""

import json
import math
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from rigpt_hf import RiGPTForSequenceClassification
from rigpt_hf.cli import app
from rigpt_hf.conversion import Certificate, certify, convert_model
from rigpt_hf.model_cards.card import absent, card_text, gather, hub_metadata, render, write_card
from rigpt_hf.model_cards.metadata import (
    AuthorMetadata,
    CardMetadata,
    ModelMetadata,
    SymmetryMetadata,
    TrainingMetadata,
    invariance_of,
)
from rigpt_hf.model_cards.smaller import SmallerMetadata
from rigpt_hf.pruning.prune import Sizes
from rigpt_hf.quantization import Recipe
from tests import processes
from tests.codes import quantized
from tests.evaluation.small import WORDS, run, save
from tests.evaluation.toys import tiny_gpt2, word_tokenizer
from tests.model.test_remote_code import WITHOUT_PACKAGE
from tests.models import tiny_config, tiny_model


GOLDEN = Path(__file__).parent / "golden"
MODEL = ModelMetadata(
    type="rigpt",
    parameters=124_439_808,
    layers=12,
    hidden_size=768,
    heads=12,
    key_value_heads=4,
    vocabulary=50257,
    positions=1024,
    position_type="rotary",
    attention_score="dot",
    tied=True,
    dtype="bfloat16",
    has_tokenizer=True,
    options=["query-key norm", "value embeddings"],
)
TRAINING = TrainingMetadata(
    steps=500,
    tokens=2_048_000,
    batch_size=16,
    context=256,
    optimizer="equivariant",
    learning_rate=0.012,
    weight_decay=0.1,
    precision="bf16",
    seed=3,
    loss=3.1415926,
    source="docs",
    seconds=7200.0,
    start=None,
)
AUTHOR = AuthorMetadata(
    title="RiGPT of the documentation",
    description="Writes docstrings.",
    license="apache-2.0",
    language=["en"],
    datasets=["me/docs"],
    authors="Ada and Emmy",
    intended_use="Experiments with symmetry.",
    limits="It knows nothing but Python.",
)
INVARIANCE = {
    "errors": {
        "stream": {"float64": {"mean": 1e-15, "largest": 2e-15}, "float32": {"mean": 5e-7, "largest": 6e-7}},
        "neurons": {"float64": {"mean": 1e-15, "largest": 1e-15}, "float32": {"mean": 1e-7, "largest": 2e-7}},
    },
    "largest": {"float64": 2e-15, "float32": 6e-7},
    "protocol": {"draws": 2, "seed": 0, "tokens": [4, 128]},
}
# As an evaluation keeps it, whose JSON holds no infinity, and as it is measured.
OVERFLOWN = INVARIANCE | {
    "errors": {
        "stream": {"float16": {"mean": None, "largest": None}, "float32": {"mean": 5e-7, "largest": 6e-7}},
        "neurons": {"float16": {"mean": math.nan, "largest": math.inf}, "float32": {"mean": 1e-7, "largest": 2e-7}},
    },
    "largest": {"float16": None, "float32": 6e-7},
}
CERTIFICATE = Certificate(
    **{"max_abs_logit_error": 0.0123, "max_abs_logit": 12.3, "relative_logit_error": 0.001, "tolerance": 0.05},
    **{"loss_a": 3.25, "loss_b": 3.5, "loss_difference": 0.25, "dtype": "bfloat16", "source_dtype": "float32"},
    inputs={"shape": [2, 64], "tokens": 128, "sha256": "0" * 64, "seed": 0},
    source="/home/ada/secret dir/gpt2 (GPT2LMHeadModel)",
)
DIFFERENCE = {"value": -0.25, "low": -0.3, "high": -0.2, "p_value": 0.0005, "significant": True, "kind": "difference"}
BITS = {"RiGPT": {"value": 1.25, "low": 1.2, "high": 1.3}, "GPT-2": {"value": 1.5, "low": 1.4, "high": 1.6}}
QUANTITY = {"name": "bits per byte", "unit": "bits", "better": "less", "models": BITS, "difference": DIFFERENCE}
TASK = {"task": "perplexity", "metric": "perplexity", "models": {"RiGPT": {}, "GPT-2": {}}, "errors": {}}
EVALUATION = {
    "suite": {"name": "core", "text": {"source": "docs", "documents": 128, "revision": None}},
    "code": {"rigpt_hf": "0.1.0", "commit": "abc1234"},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "hardware": {"device": "cpu", "threads": 2},
    "models": {
        "RiGPT": {"source": "rigpt", "type": "rigpt", "parameters": 124_439_808, "dtype": "bfloat16"},
        "GPT-2": {"source": "gpt2", "type": "gpt2", "parameters": 124_439_808, "dtype": "float32"},
    },
    "baseline": "GPT-2",
    "tasks": [TASK | {"quantities": [QUANTITY]}],
}


SMALLER = SmallerMetadata(
    "quantize.json",
    "me/larger",
    ["4 bits for each weight, a scale for every 32 weights", "GPTQ in a Hadamard frame"],
    ["documentation", "end of text.txt"],
    [("before", [3.1, 3.2]), ("4.51 bits per weight", [3.15, 3.2612])],
)


def known(**facts: Any) -> CardMetadata:
    """The least that is known of a model, and these facts."""
    nothing = dict.fromkeys(("training", "certificate", "tuned", "evaluation", "evaluated_as"))
    least = {"model": MODEL, "author": AUTHOR, "doubt": "", "merged": [], "invariance": INVARIANCE}
    return CardMetadata(**(nothing | least | {"fingerprint": "0" * 64} | facts))


CASES = {
    "trained": known(training=TRAINING, evaluation=EVALUATION, evaluated_as="RiGPT"),
    "converted": known(
        # Every hundredth of its steps is in the log, and it ended in a loss that JSON has no number for.
        training=replace(TRAINING, steps=10_000, tokens=40_960_000, seconds=36_000.0, timed=100, loss=math.nan),
        certificate=CERTIFICATE,
        invariance=OVERFLOWN,
    ),
    "bare": known(
        model=replace(MODEL, key_value_heads=12, options=[], has_tokenizer=False, tied=False),
        author=AuthorMetadata(),
        doubt="whether it is what it was made from: its certificate is of other weights",
        merged=[("me/a", 0.7), ("b", 0.3)],
        smaller=[SMALLER],
        invariance=INVARIANCE | {"random_tokens": True},
    ),
    "symmetric": known(symmetry=SymmetryMetadata(24, 12, ["jump", "w*lk", "run", "look"], 3.2e-8, 2.1e-6, True)),
    "no-longer-symmetric": known(symmetry=SymmetryMetadata(2, 2, ["left", "right"], 0.31, 4.7, False)),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    """`RIGPT_WRITE_GOLDEN=1 pytest tests/model_cards` writes them anew; look at the difference before you keep it."""
    text = render(CASES[name], "me/my-rigpt")
    path = GOLDEN / f"{name}.md"
    if os.environ.get("RIGPT_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
    assert not re.search(r"\b(None|nan|inf)\b", text) and "secret" not in text


def test_the_hub_reads_the_metadata():
    data = ModelCard(render(CASES["trained"], "me/my-rigpt")).data
    assert data.license == "apache-2.0" and data.library_name == "transformers"
    (result,) = data.eval_results
    assert result.metric_type == "bits_per_byte" and result.metric_value == 1.25
    bare = ModelCard(render(CASES["bare"])).data
    assert bare.license is None and bare.eval_results is None


def test_the_hub_is_told_what_was_made_of_the_base_model():
    pruned = replace(SMALLER, record="prune.json")
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"smaller": [pruned, SMALLER], "merged": [("a", 0.5), ("b", 0.5)], "tuned": "a"}, "quantized"),
        ({"smaller": [pruned]}, "finetune"),
        ({"merged": [("a", 0.5), ("b", 0.5)]}, "merge"),
        ({"tuned": "a"}, "finetune"),
        ({"training": replace(TRAINING, start="a")}, "finetune"),
        ({"training": TRAINING}, None),
        ({"certificate": CERTIFICATE}, None),
    ]
    for facts, word in cases:
        facts["author"] = AuthorMetadata(base_model="openai-community/gpt2")
        assert hub_metadata(known(**facts), "x").to_dict().get("base_model_relation") == word
        facts["author"] = AuthorMetadata()
        assert "base_model_relation" not in hub_metadata(known(**facts), "x").to_dict()


def test_what_nobody_said_is_said_to_be_absent():
    bare = CASES["bare"]
    assert absent(bare) == [
        "how it was trained",
        "whether it is what it was made from: its certificate is of other weights",
        "perplexity, accuracy, outliers, robustness to rounding and speed",
        "license",
        "language",
        "intended use",
        "limits",
        "authors",
        "a tokenizer",
    ]
    text = render(bare)
    for heading in ("Training", "Conversion", "Evaluation", "Intended use"):
        assert f"## {heading}" not in text
    assert absent(CASES["trained"]) == ["accuracy", "outliers", "robustness to rounding", "speed"]


def test_accuracy_is_absent_until_it_is_measured():
    for metric, quantity in (("cloze", "accuracy"), ("lm-eval", "acc"), ("lm-eval", "f1")):
        found = {"value": 0.5, "low": None, "high": None}
        task = {
            "task": "questions",
            "metric": metric,
            "models": {"RiGPT": {}},
            "errors": {},
            "quantities": [{"name": quantity, "unit": "", "better": "more", "models": {"RiGPT": found}}],
        }
        trained = CASES["trained"]
        measured = replace(trained, evaluation=EVALUATION | {"tasks": [*EVALUATION["tasks"], task]})
        assert ("accuracy" in absent(measured)) == (quantity == "f1")
        # Of a baseline it says nothing about the model.
        task["models"] = {"GPT-2": {}}
        task["quantities"][0]["models"] = {"GPT-2": found}
        assert "accuracy" in absent(measured)


def test_the_largest_error_is_called_no_bound():
    text = " ".join(render(CASES["trained"]).split())
    recorded = "That is as recorded in `results.json`, not a bound"
    assert f"the largest of 2 draws. {recorded}" in text and "at most this share" not in text
    assert "what was seen" not in text and "Recorded as measured on" in text
    assert "the largest of 2 draws. That is what was seen, not a bound" in " ".join(render(CASES["bare"]).split())
    once = INVARIANCE | {"protocol": INVARIANCE["protocol"] | {"draws": 1}}
    text = " ".join(render(replace(CASES["trained"], invariance=once)).split())
    assert f"in one draw. {recorded}" in text and "1 draw per frame" in text and "draws" not in text


def test_only_the_card_says_that_it_measured():
    task = {"metric": "invariance", "models": {"RiGPT": INVARIANCE | {"random_tokens": True}}}
    assert invariance_of({"tasks": [task]}, "RiGPT", None) == INVARIANCE


def test_every_number_of_a_card_is_a_fact():
    """Numbers in the golden card are those of the facts above, or stand in the template for anybody to see."""
    text = render(CASES["trained"], "me/my-rigpt")
    body = text.split("---\n", 2)[2].split("## How to cite")[0]
    allowed = (
        "124,439,808 12 768 4 1024 50,257 2.0e-15 6.0e-07 1.0e-15 2.0e-07 128 2 2,048,000 500 16 256 0.012 0.1 3 2.0"
    )
    allowed += " 3.1416 1.250 1.200 1.300 1.500 1.400 1.600 -0.25 -0.3000 -0.2000 95 5 0.1.0 2.13.0 5.23.0"
    allowed += " 32 64 bf16 1234"  # float32, float64, the commit
    numbers = set(re.findall(r"(?<![\w.])-?\d[\d,.e+-]*(?<![.,])", body.replace("GPT-2", "").replace("gpt2", "")))
    strange = {each for each in numbers if each.rstrip(".,-") not in allowed.split()}
    assert len(numbers) > 20 and not strange


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A converted model with tokenizer and certificate, and an evaluation of it."""
    folder = tmp_path_factory.mktemp("world")
    gpt2 = tiny_gpt2()
    rigpt = convert_model(gpt2)
    save(folder / "gpt2", gpt2)
    save(folder / "rigpt", rigpt)
    certify(gpt2, rigpt).save(folder / "rigpt")
    (folder / "text.txt").write_text("<|endoftext|>".join("".join(WORDS[i : i + 30]) for i in range(1, 20)))
    tasks = "[{metric: perplexity}, {metric: invariance, arguments: {draws: 1}}]"
    (folder / "suite.yaml").write_text(f"text: {{source: {folder / 'text.txt'}}}\ntasks: {tasks}")
    run(folder, folder / "out", against="gpt2", names=("model", "baseline"))
    return folder


def test_a_card_of_a_converted_and_evaluated_model(world):
    text = card_text(world / "rigpt", repo_id="me/tiny", results=world / "out/results.json")
    certificate = json.loads((world / "rigpt/certificate.json").read_text())
    assert f"{certificate['max_abs_logit_error']:.2e}" in text
    results = json.loads((world / "out/results.json").read_text())
    bits = next(q for q in results["tasks"][0]["quantities"] if q["name"] == "bits per byte")
    card = ModelCard(text)
    values = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert values["bits_per_byte"] == bits["models"]["model"]["value"] and "perplexity" in values
    assert "## Training" not in text and "how it was trained" in text and "AutoTokenizer" in text
    assert str(world) not in text


def test_the_lines_that_load_it_ask_nothing(world, tmp_path):
    """As a stranger pastes them, who has not installed this package."""
    text = card_text(world / "rigpt", repo_id="me/tiny", results=world / "out/results.json")
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    asked = "import builtins\nbuiltins.input = lambda *arguments: sys.exit('asked')\n"
    said = "\nprint(type(model).__module__, len(tokenizer('w1')['input_ids']))"
    done = processes.run(
        "-c", WITHOUT_PACKAGE + asked + lines.replace("me/tiny", str(world / "rigpt")) + said, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("transformers_modules.rigpt.") and done.stdout.endswith(".modeling_rigpt 1\n")


def test_failed_measurements_are_not_in_the_table():
    failed = {
        "task": "outliers",
        "metric": "outliers",
        "models": {},
        "errors": {"RiGPT": "no memory"},
        "quantities": [],
    }
    half = EVALUATION["tasks"][0] | {"errors": {"GPT-2": "no memory"}}
    for tasks, shown in (([half, failed], True), ([failed], False)):
        evaluation = EVALUATION | {"tasks": tasks}
        text = render(replace(CASES["trained"], evaluation=evaluation), "me/my-rigpt")
        assert "no memory" not in text and ("## Evaluation" in text) is shown
        assert "outliers" in absent(replace(CASES["trained"], evaluation=evaluation))


def test_what_a_model_was_made_of(tmp_path, known_invariance):
    tiny_model().float().save_pretrained(tmp_path / "model")
    (tmp_path / "model/merge.json").write_text(json.dumps({"sources": ["/home/ada/a", "me/b"], "weights": [0.7, 0.3]}))
    (tmp_path / "model/finetune.json").write_text(json.dumps({"options": {"model": "/data/models/base"}}))
    text = card_text(tmp_path / "model")
    assert "- a, with weight 0.7\n- me/b, with weight 0.3" in text
    assert "in `finetune.json`, from base; its options" in text
    assert "As stated in `merge.json`:\n\n- a" in text
    assert "how it was trained" not in text and "/home" not in text and "/data" not in text


def test_how_a_model_was_made_smaller(tmp_path, known_invariance):
    tiny_model().float().save_pretrained(tmp_path / "model")
    about = {"source": "/home/ada/large", "calibrate": "default,/home/ada/text.txt"}
    pruned = about | asdict(Sizes(0.2)) | {"recover": 5}
    pruned["loss"] = {"before": {"documentation": 3.0}, "pruned": {"documentation": 3.25}}
    rounded = about | {"recipe": asdict(Recipe(group=32, tune=48, cache=4)), "loss": pruned["loss"]}
    for name, record in (("prune.json", pruned), ("quantize.json", rounded)):
        (tmp_path / "model" / name).write_text(json.dumps(record))
    text = card_text(tmp_path / "model")
    assert text.count("## Made smaller") == 2 and "/home" not in text
    assert "As stated in `prune.json`, from large:\n\n- 20% of the neurons left out\n- 5 steps of recovery" in text
    assert "- calibrated on documentation of installed packages and text.txt" in text
    named = card_text(tmp_path / "model", metadata=AuthorMetadata(base_model="me/pruned"))
    assert "Made from me/pruned. As stated in `quantize.json`:\n\n- 4 bits" in named
    assert "As stated in `prune.json`, from large:" in named, "the base is that of the last record"
    (tmp_path / "model" / "prune.json").write_text(json.dumps(pruned | {"lora": 16}))
    assert "- 5 steps of recovery by an adapter of rank 16\n" in card_text(tmp_path / "model")
    assert "- 48 steps of tuning\n- cache of 4 bits" in text and "| pruned | 3.2500 |" in text


def test_the_notebook_does_not_turn_codes(tmp_path, known_invariance):
    word_tokenizer(["<s>", " a", " b"]).save_pretrained(tmp_path / "plain")
    word_tokenizer(["<s>", " a", " b"]).save_pretrained(tmp_path / "codes")
    tiny_model().float().save_pretrained(tmp_path / "plain")
    quantized("tied").save_pretrained(tmp_path / "codes")
    assert "lets the model write and turns it.\n" in card_text(tmp_path / "plain")
    assert "lets the model write.\n" in card_text(tmp_path / "codes")


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0.034, "0.034 seconds"),
        (45.0, "45.0 seconds"),
        (59.97, "1.0 minutes"),
        (100.0, "1.7 minutes"),
        (7200.0, "2.0 hours"),
    ],
)
def test_a_time_has_the_unit_that_fits(seconds, words):
    short = known(training=replace(TRAINING, seconds=seconds, precision="no"))
    text = render(short)
    assert f"| time | {words} |\n" in text and "| precision | float32 |\n" in text


def test_tasks_on_one_text_are_told_apart_on_the_hub(world):
    known = gather(world / "rigpt", results=world / "out/results.json")
    task = known.evaluation["tasks"][0]
    again = task | {"task": "perplexity, again"}
    doubled = replace(known, evaluation=known.evaluation | {"tasks": [task, again]})
    found = ModelCard(render(doubled, "me/tiny")).data.eval_results
    assert {each.dataset_config for each in found} == {"perplexity", "perplexity, again"}
    assert all(each.metric_args["context"] == task["models"]["model"]["protocol"]["context"] for each in found)


def test_results_of_other_weights_are_refused(world, tmp_path):
    tiny_model().float().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`results` must be of this model, .* got those of model, baseline"):
        card_text(tmp_path / "other", results=world / "out/results.json")
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(ValueError, match="`results` must be a results.json of rigpt evaluate"):
        card_text(world / "rigpt", results=tmp_path / "r.json")
    newer = json.loads((world / "out/results.json").read_text()) | {"schema": 99}
    (tmp_path / "r.json").write_text(json.dumps(newer))
    with pytest.raises(ValueError, match="`results` must have the schema 1, got 99"):
        card_text(world / "rigpt", results=tmp_path / "r.json")


def test_metadata_of_authors(world, tmp_path, known_invariance):
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump({"title": "Tiny", "license": "mit", "language": "en"}))
    text = card_text(world / "rigpt", metadata=tmp_path / "facts.yaml")
    assert "# Tiny\n" in text and ModelCard(text).data.license == "mit"
    for content, message in (
        ("licence: mit", "`metadata` must hold some of title, .*, got 'licence'"),
        ("title: 3", "`title` in `metadata` must be some text, got 3"),
        ("{", "`metadata` must be a YAML file"),
        ("language: no", "`language` in `metadata` must be codes such as en, .*, got False"),
        ("language: English", "`language` in `metadata` must be codes such as en"),
        ("base_model: /home/me/gpt2 x", "`datasets` and `base_model` in `metadata` must be ids on the Hub"),
        ("datasets: [{a: 1}]", "`datasets` and `base_model` in `metadata` must be ids on the Hub"),
        ('title: "a\\nb"', "`title` in `metadata` must be one line"),
    ):
        (tmp_path / "facts.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            card_text(world / "rigpt", metadata=tmp_path / "facts.yaml")


def test_other_refusals(world, tmp_path):
    with pytest.raises(ValueError, match="`folder` must be the folder of a saved model"):
        card_text(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`folder` must hold a RiGPT, got a gpt2. Convert it with rigpt convert"):
        card_text(world / "gpt2")
    RiGPTForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="`folder` must hold a causal language model, got a RiGPTForSequenceCl"):
        card_text(tmp_path / "classifier")
    with pytest.raises(ValueError, match="`repo_id` must be a name such as me/my-model, got 'a b'"):
        card_text(world / "rigpt", repo_id="a b")


def test_the_command_does_not_replace_a_card(tmp_path, known_invariance):
    tiny_model().float().save_pretrained(tmp_path / "model")
    assert CliRunner().invoke(app, ["card", str(tmp_path / "model")]).exit_code == 0
    (tmp_path / "model/README.md").write_text("mine")
    result = CliRunner().invoke(app, ["card", str(tmp_path / "model")])
    assert "`FOLDER` must have no card yet" in str(result.exception)
    assert (tmp_path / "model/README.md").read_text() == "mine"
    result = CliRunner().invoke(app, ["card", str(tmp_path / "model"), "--force"])
    assert "`FOLDER` must have no card, or one that this program wrote there and nobody has" in str(result.exception)
    assert (tmp_path / "model/README.md").read_text() == "mine"
    (tmp_path / "model/README.md").unlink()
    assert CliRunner().invoke(app, ["card", str(tmp_path / "model")]).exit_code == 0
    assert CliRunner().invoke(app, ["card", str(tmp_path / "model"), "--force"]).exit_code == 0
    assert "preferred basis" in (tmp_path / "model/README.md").read_text()
    assert write_card(tmp_path / "model", force=True) == tmp_path / "model/README.md"
    # A link is a card even where nothing is at its end.
    (tmp_path / "model/README.md").unlink()
    (tmp_path / "model/README.md").symlink_to("gone.md")
    with pytest.raises(ValueError, match="`folder` must have no card yet"):
        write_card(tmp_path / "model")
    assert (tmp_path / "model/README.md").readlink() == Path("gone.md")
