"""What was measured before is not measured again, unless something that it depends on has changed."""

import pytest
from rich.console import Console

from rigpt_hf.evaluation.harness import results as results_module
from rigpt_hf.evaluation.harness import runner
from rigpt_hf.evaluation.harness.cache import Cache, Parts, fingerprint
from rigpt_hf.evaluation.harness.runner import evaluate
from rigpt_hf.evaluation.measures import quantization_robustness as quantization
from rigpt_hf.evaluation.models import EvaluatedModel
from tests.evaluation.small import WORDS, by_name, options
from tests.evaluation.toys import tiny_gpt2, word_tokenizer


def test_nothing_is_measured_twice(evaluation, world, monkeypatch):
    output, results = evaluation
    kept = {path.name: path.stat().st_mtime_ns for path in (output / "cache").iterdir()}
    assert len(kept) == 4 * 2 + 1

    def fail(*arguments, **more):
        raise AssertionError("measured again")

    monkeypatch.setattr(runner, "measure", fail)
    monkeypatch.setattr(runner, "measure_together", fail)
    again = evaluate(options(world, output, against="gpt2"), Console(quiet=True))
    assert again["tasks"] == results["tasks"]
    assert kept == {path.name: path.stat().st_mtime_ns for path in (output / "cache").iterdir()}


def test_a_run_that_was_killed_goes_on(world, tmp_path, monkeypatch):
    measured = []
    original = runner.measure

    def until_killed(task, *given):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(task.name)
        return original(task, *given)

    monkeypatch.setattr(runner, "measure", until_killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options(world, tmp_path / "out"), Console(quiet=True))
    assert len(list((tmp_path / "out/cache").iterdir())) == 2 and not (tmp_path / "out/results.json").exists()
    rest = []
    monkeypatch.setattr(runner, "measure", lambda *given: rest.append(given[0].name) or original(*given))
    results = evaluate(options(world, tmp_path / "out"), Console(quiet=True))
    assert measured == ["perplexity", "invariance"] and rest == ["outliers", "quantization_robustness"]
    assert results["baseline"] is None and not any(task["errors"] for task in results["tasks"])
    assert (tmp_path / "out/report.html").exists()


def test_other_weights_texts_and_arguments_are_measured_anew(world, tmp_path):
    output, brief = tmp_path / "out", {"suite": str(world / "brief.yaml")}

    def kept(**more) -> int:
        evaluate(options(world, output, **brief, **more), Console(quiet=True))
        return len(list((output / "cache").iterdir()))

    count = kept()
    with pytest.raises(ValueError, match="`output` must hold results of the same weights or none"):
        kept(model="other")
    assert len(list((output / "cache").iterdir())) == count == 2
    assert kept(model="other", force=True) == 2 * count
    # Speed does not depend on the text.
    assert kept(model="other", documents=10) == 3 * count - 1


def test_what_another_device_measured_is_measured_again(evaluation, world, monkeypatch):
    output, _ = evaluation
    own = results_module.hardware

    def asked():
        names = []
        monkeypatch.setattr(runner, "measure", lambda task, *given: names.append(task.name) or {"loss": 1.0})
        monkeypatch.setattr(runner.writing, "build", lambda *given: {"models": {}})
        monkeypatch.setattr(runner.writing, "write", lambda *given: None)
        monkeypatch.setattr(Cache, "put", lambda *given: None)
        evaluate(options(world, output, against="gpt2"), Console(quiet=True))
        return names

    assert asked() == []
    # Other threads add in another order too, but that is what every two runs may differ by.
    monkeypatch.setattr(results_module, "hardware", lambda device: own(device) | {"threads": 77})
    assert asked() == []
    monkeypatch.setattr(results_module, "hardware", lambda device: own(device) | {"device": "cuda", "gpu": "H"})
    assert len(asked()) == 8


def test_fingerprints_know_weights_config_and_tokenizer():
    a = EvaluatedModel(tiny_gpt2(), word_tokenizer(WORDS))
    assert fingerprint(a) == fingerprint(EvaluatedModel(tiny_gpt2(), word_tokenizer(WORDS)))
    others = [
        EvaluatedModel(tiny_gpt2(seed=1), a.tokenizer),
        EvaluatedModel(a.model, word_tokenizer(WORDS[::-1])),
        EvaluatedModel(a.model),
    ]
    other = tiny_gpt2()
    other.config.layer_norm_epsilon = 1e-3
    others.append(EvaluatedModel(other, a.tokenizer))
    assert len({fingerprint(each) for each in [a, *others]}) == 5


def test_other_names_take_what_is_there(evaluation, world, monkeypatch):
    output, results = evaluation
    monkeypatch.setattr(runner, "measure_together", None)
    monkeypatch.setattr(runner, "measure", None)
    renamed = evaluate(options(world, output, against="gpt2", names=("A", "B")), Console(quiet=True))
    speeds = [by_name(each, "throughput")["models"] for each in (results, renamed)]
    assert list(speeds[0].values()) == list(speeds[1].values()) and list(speeds[1]) == ["A", "B"]
    # The other way round it is another measurement: ratios are to the second.
    assert "'NoneType' object is not callable" in str(
        evaluate(options(world, output, model="gpt2", against="rigpt"), Console(quiet=True))["tasks"][-1]["errors"]
    )
    evaluate(options(world, output, against="gpt2"), Console(quiet=True))


def test_what_a_killed_run_was_writing_is_no_obstacle(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.results.json.abcd.partial").write_text("{")
    brief = options(world, tmp_path / "out", suite=str(world / "brief.yaml"))
    assert evaluate(brief, Console(quiet=True))["tasks"]


def test_tokenizers_with_other_special_tokens_have_other_fingerprints():
    a, b = word_tokenizer(WORDS), word_tokenizer(WORDS)
    b.bos_token = WORDS[1]
    model = tiny_gpt2()
    assert fingerprint(EvaluatedModel(model, a)) != fingerprint(EvaluatedModel(model, b))


class Killed(BaseException):
    """What no handler of exceptions stops."""


def test_parts_of_what_takes_long_are_kept(world, tmp_path, monkeypatch):
    """Scheme by scheme: of a run that was killed at the third of four, two are not measured again."""
    of_one = quantization.quantized
    rounded = []

    def until_killed(model, *given):
        if len(rounded) == 2:
            raise Killed
        rounded.append(given[:2])
        return of_one(model, *given)

    monkeypatch.setattr(quantization, "quantized", until_killed)
    with pytest.raises(Killed):
        evaluate(options(world, tmp_path / "out"), Console(quiet=True))
    # Three tasks that are whole, the loss before rounding, and two schemes.
    assert len(list((tmp_path / "out/cache").iterdir())) == 6
    rest = []
    monkeypatch.setattr(quantization, "quantized", lambda *given: rest.append(given[1:3]) or of_one(*given))
    results = evaluate(options(world, tmp_path / "out"), Console(quiet=True))
    assert rounded == rest == [(8, 8), (3, 3)]
    assert len(list((tmp_path / "out/cache").iterdir())) == 5
    monkeypatch.undo()
    whole = evaluate(options(world, tmp_path / "whole"), Console(quiet=True))
    assert by_name(results, "quantization_robustness") == by_name(whole, "quantization_robustness")


def test_parts_belong_to_their_model_and_their_arguments(tmp_path):
    cache = Cache(tmp_path)
    made = []

    def make():
        made.append({"value": len(made)})
        return made[-1]

    a, b = (Parts(cache, cache.key(model=name)) for name in "ab")
    assert a("W8A8", make) == a("W8A8", make) == {"value": 0}
    assert b("W8A8", make) == {"value": 1} and a("W4A4", make) == {"value": 2}
    a.drop()
    assert len(list(tmp_path.iterdir())) == 1
    assert b("W8A8", make) == {"value": 1} and a("W8A8", make) == {"value": 3}
