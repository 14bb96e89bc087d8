"""Nothing is measured again, unless something that the result depends on has changed."""

import json
import shutil

import pytest

from rigpt_hf.checkpoints.disk import here
from rigpt_hf.checkpoints.written import WRITTEN
from rigpt_hf.checkpoints.written import fingerprint as what_is_at
from rigpt_hf.evaluation.harness import results as results_module
from rigpt_hf.evaluation.harness import runner
from rigpt_hf.evaluation.harness.cache import Cache, Parts, fingerprint
from rigpt_hf.evaluation.measures import quantization_robustness as quantization
from rigpt_hf.evaluation.models import EvaluatedModel
from tests.evaluation.small import WORDS, by_name, run
from tests.evaluation.toys import tiny_gpt2, word_tokenizer


def test_nothing_is_measured_twice(evaluation, world, monkeypatch):
    output, results = evaluation
    kept = {path.name: path.stat().st_mtime_ns for path in (output / "cache").iterdir()}
    assert len(kept) == 4 * 2 + 1

    def fail(*arguments, **more):
        raise AssertionError("measured again")

    monkeypatch.setattr(runner, "measure", fail)
    monkeypatch.setattr(runner, "measure_together", fail)
    monkeypatch.setattr(runner.writing, "write", lambda *given: None)
    again = run(world, output, against="gpt2")
    assert again["tasks"] == results["tasks"]
    assert kept == {path.name: path.stat().st_mtime_ns for path in (output / "cache").iterdir()}


@pytest.fixture(scope="module")
def brief(world, tmp_path_factory):
    """The output folder of a short run; to copy."""
    output = tmp_path_factory.mktemp("brief") / "out"
    run(world, output, suite="brief")
    return output


CHANGES = ("[]", "7", '"x"', "{}", "null", "", '{"sha256": null, "result": null}', "edited", "another's")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.by_default(3)
def test_a_kept_result_that_was_changed_is_not_taken_for_measured(change, world, brief, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(brief, output)
    path, other = sorted((output / "cache").iterdir())[:2]
    before = (output / "results.json").read_text()
    kept = json.loads(path.read_text())
    if change == "edited":
        kept["result"][next(iter(kept["result"]))] = 3.0
        change = json.dumps(kept)
    path.write_text(other.read_text() if change == "another's" else change)
    text = path.read_text()
    with pytest.raises(ValueError, match=f"`output` must have results as they were kept, got .*{path.name}', which"):
        run(world, output, suite="brief")
    assert path.read_text() == text and (output / "results.json").read_text() == before
    path.unlink()
    if change == CHANGES[0]:  # with nothing in its place, none makes a difference any more
        again = run(world, output, suite="brief")
        assert not any(task["errors"] for task in again["tasks"]) and path.exists()


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
        run(world, tmp_path / "out")
    assert len(list((tmp_path / "out/cache").iterdir())) == 2 and not (tmp_path / "out/results.json").exists()
    # No obstacle is what the run was writing.
    (tmp_path / "out/.results.json.abcd.partial").write_text("{")
    (left := tmp_path / "out/left").write_text('{"files": {}}')
    marks = f"{what_is_at(left)}00000000"
    left.rename(left.with_name(f".{WRITTEN}.{here()}-{2**22 + 1}-{marks}.previous"))
    rest = []
    monkeypatch.setattr(runner, "measure", lambda *given: rest.append(given[0].name) or original(*given))
    results = run(world, tmp_path / "out")
    assert measured == ["perplexity", "invariance"] and rest == ["outliers", "quantization_robustness"]
    assert results["baseline"] is None and not any(task["errors"] for task in results["tasks"])
    assert (tmp_path / "out/report.html").exists() and not list((tmp_path / "out").glob("*.previous"))


def test_other_weights_texts_and_arguments_are_measured_anew(world, tmp_path):
    output = tmp_path / "out"

    def kept(**more) -> int:
        run(world, output, suite="brief", **more)
        return len(list((output / "cache").iterdir()))

    count = kept()
    with pytest.raises(ValueError, match="`output` must hold results of the same weights in the same roles"):
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
        run(world, output, against="gpt2")
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
    other, special = tiny_gpt2(), word_tokenizer(WORDS)
    other.config.layer_norm_epsilon = 1e-3
    special.bos_token = WORDS[1]
    others = [
        EvaluatedModel(tiny_gpt2(seed=1), a.tokenizer),
        EvaluatedModel(other, a.tokenizer),
        *(EvaluatedModel(a.model, tokenizer) for tokenizer in (word_tokenizer(WORDS[::-1]), special, None)),
    ]
    assert len({fingerprint(model) for model in [a, *others]}) == 6


def test_other_names_take_what_is_there(evaluation, world, monkeypatch):
    output, results = evaluation
    monkeypatch.setattr(runner.writing, "write", lambda *given: None)
    monkeypatch.setattr(runner, "measure_together", None)
    monkeypatch.setattr(runner, "measure", None)
    renamed = run(world, output, against="gpt2", names=("A", "B"))
    speeds = [by_name(each, "throughput")["models"] for each in (results, renamed)]
    assert list(speeds[0].values()) == list(speeds[1].values()) and list(speeds[1]) == ["A", "B"]
    # The other way round it is another measurement: ratios are to the second.
    turned = run(world, output, model="gpt2", against="rigpt", force=True)["tasks"][-1]
    assert "'NoneType' object is not callable" in str(turned["errors"])


class Killed(BaseException):
    """An interruption that no handler of exceptions stops."""


def test_parts_of_what_takes_long_are_kept(evaluation, world, tmp_path, monkeypatch):
    """Scheme by scheme: of a run that was killed at the third of four, two are not measured again."""
    text = (world / "brief.yaml").read_text().partition("tasks:")[0]
    task = "{metric: quantization_robustness, arguments: {schemes: [W8A8, W3A3], frames: [identity, hadamard]}}"
    (tmp_path / "rounding.yaml").write_text(f"{text}tasks: [{task}]")
    whole, output, given = by_name(evaluation[1], "quantization_robustness"), tmp_path / "out", []
    of_one, suite = quantization.quantized, str(tmp_path / "rounding")

    def until_killed(model, *bits):
        if len(given) == 2:
            raise Killed
        given.append(bits[:2])
        return of_one(model, *bits)

    monkeypatch.setattr(quantization, "quantized", until_killed)
    with pytest.raises(Killed):
        run(world, output, suite=suite)
    # The loss before rounding, and two schemes.
    assert len(list((output / "cache").iterdir())) == 3
    rest = []
    monkeypatch.setattr(quantization, "quantized", lambda *values: rest.append(values[1:3]) or of_one(*values))
    results = run(world, output, suite=suite)
    assert given == rest == [(8, 8), (3, 3)]
    assert len(list((output / "cache").iterdir())) == 1
    assert by_name(results, "quantization_robustness")["models"]["RiGPT"] == whole["models"]["RiGPT"]


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
