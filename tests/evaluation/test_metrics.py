"""The modules for the `evaluate` library: they load offline, from a checkout and where installed."""

import subprocess
import sys
from pathlib import Path

import evaluate
import pytest

from rigpt_hf.evaluation import metrics
from rigpt_hf.evaluation.measures.outliers import outliers
from rigpt_hf.evaluation.measures.perplexity import perplexity
from tests.evaluation.toys import rows, tiny_gpt2, word_tokenizer
from tests.models import tiny_model


CHECKOUT = Path(__file__).parents[2]
NAMES = ["accuracy", "invariance", "outliers", "perplexity", "quantization_robustness", "throughput"]


def test_all_metrics_are_there():
    assert list(metrics.NAMES) == NAMES
    with pytest.raises(ValueError, match="`name` must be one of accuracy, .*, got 'bleu'"):
        metrics.load("bleu")


def test_metrics_say_what_they_are():
    for name in NAMES:
        module = metrics.load(name)
        assert len(module.description) > 200 and "Returns" in module.inputs_description
        # A unit, and a source or a protocol.
        assert any(word in module.description for word in ("imensionless", "nats", "per second", "Between 0 and 1"))


def test_perplexity_takes_objects_and_paths(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    tokenizer = word_tokenizer([f" w{index}" for index in range(61)])
    tokenizer.save_pretrained(tmp_path)
    texts = ["".join(f" w{index}" for index in row) for row in rows()]
    expected = perplexity(tiny_gpt2(), rows(), context=16)
    module = metrics.load("perplexity")
    for options in (
        {"predictions": texts, "model": str(tmp_path)},
        {"predictions": texts, "model": tiny_gpt2(), "tokenizer": tokenizer},
        {"predictions": rows(), "model": tiny_gpt2()},
    ):
        found = module.compute(context=16, **options)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert found["tokens"] == expected["tokens"]
        assert ("word_perplexity" in found) is isinstance(options["predictions"][0], str)


def test_others_give_what_their_functions_give():
    model = tiny_model()
    assert metrics.load("outliers").compute(predictions=rows(), model=model, context=20) == outliers(
        model, rows(), context=20
    )
    found = metrics.load("invariance").compute(predictions=rows(), model=model, frame="stream", dtypes=["float64"])
    assert found["largest"]["float64"] < 1e-11
    found = metrics.load("quantization_robustness").compute(
        predictions=rows(), model=model, schemes=["W4A4"], frames=["identity"]
    )
    assert found["rounded"]["identity"]["W4A4"]["increase"] != 0
    found = metrics.load("throughput").compute(
        predictions=["a", "b"], models=[model, tiny_gpt2()], prompt=8, new_tokens=2, turns=3, memory=False
    )
    assert list(found["ratios"]) == ["a"]


def test_accuracy_of_both_kinds():
    tokenizer = word_tokenizer([f" w{index}" for index in range(61)])
    module, model = metrics.load("accuracy"), tiny_gpt2()
    found = module.compute(
        predictions=[" w1 w2", " w3"],
        choices=[[" w4", " w5"], [" w6", " w7"]],
        references=[0, 1],
        model=model,
        tokenizer=tokenizer,
    )
    assert found["examples"] == 2 and found["chance"] == 0.5
    found = module.compute(
        predictions=[" w1 w2", " w3"], choices=[[], []], references=[" w4", " w5"], model=model, tokenizer=tokenizer
    )
    assert "target_perplexity" in found


def test_a_checkout_loads_by_its_relative_path(monkeypatch):
    """As the documentation says, from the folder of the checkout."""
    monkeypatch.chdir(CHECKOUT)
    module = evaluate.load("evaluation/metrics/perplexity")
    assert type(module).__name__ == "Perplexity" and len(module.description) > 100


@pytest.mark.full
def test_a_checkout_loads_in_a_fresh_process(tmp_path):
    code = (
        "import evaluate; m = evaluate.load('evaluation/metrics/perplexity'); "
        "print(type(m).__name__, len(m.description) > 100)"
    )
    environment = {
        "HF_EVALUATE_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "Perplexity True", done.stderr[-2000:]
