"""Facts of a training run, from what it wrote down."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rigpt_hf.model_cards.card import card_text, gather
from rigpt_hf.model_cards.metadata import sources_of_merge, tuned_from
from rigpt_hf.model_cards.runs import name_of_source, training_metadata
from rigpt_hf.model_cards.smaller import smaller_than
from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.symmetry.tokens import Representation, TokenSymmetry, symmetrize
from rigpt_hf.token_symmetry_rigpt import SYMMETRY_FRAME
from rigpt_hf.training.options import PretrainOptions
from rigpt_hf.training.records import bound
from tests.models import tiny_model
from tests.symmetry.options import generator


STEP = 32.0  # tokens


def run_of(folder: Path, entries: list[dict], data: str | None = "docs", cut: str = "", **run) -> Path:
    """The folder of a model whose run logged these entries, the last of them cut."""
    usual = {"max_steps": 9, "warmup_steps": 1, "global_batch_size": 4, "context_length": 8, "seed": 1}
    options = PretrainOptions(**(usual | {"learning_rate": 0.01} | run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + cut)
    (folder / "run.json").write_text(json.dumps(bound(options.facts() | {"data": data}, folder)))
    return folder


def test_training_is_read_from_the_run(tmp_path, known_invariance):
    entries = [{"step": 1, "tokens_per_second": 8.0}, {"step": 2, "tokens_per_second": 16.0, "validation_loss": 2.5}]
    tiny_model().float().save_pretrained(tmp_path)
    # The last line was being written when the run was killed.
    folder = run_of(tmp_path, entries, cut='{"step": 3, "tok')
    training = gather(folder).training
    # Two steps are in the log, whatever was planned.
    assert training.steps == 2 and training.tokens == 64 and training.loss == 2.5 and training.seconds == 6.0
    assert training.timed is None
    assert "| text | docs |" in card_text(folder)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="`folder` must lie in a whole run, .* without 'weights_sha256'. Move it"):
        gather(folder)


def test_a_run_is_that_of_its_weights_alone(tmp_path):
    """Not of others that were put there, nor of a model that was made elsewhere and lies beside the run's record."""
    folder = run_of(tmp_path, [])
    assert training_metadata(folder).steps == 9
    for name in ("model.safetensors", "model-00001-of-00002.safetensors"):
        (folder / name).write_bytes(b"others")
        assert training_metadata(folder) is None
        (folder / name).unlink()
    assert training_metadata(folder).steps == 9
    (tmp_path / "model").mkdir()
    assert training_metadata(tmp_path / "model") is None


def test_a_run_whose_record_or_log_was_changed_is_not_told_of(tmp_path, caplog):
    """And the last loss is that of the last step, or none is known."""
    entries = [{"step": step, "tokens_per_second": 8.0, "validation_loss": 2.5} for step in (1, 2)]
    folder = run_of(tmp_path, entries)
    assert training_metadata(folder).loss == 2.5
    run = json.loads((folder / "run.json").read_text())
    for name, value in (("seed", 77), ("learning_rate", 0.5), ("data", "Wikipedia"), ("log_sha256", "0"), ("new", 1)):
        (folder / "run.json").write_text(json.dumps(run | {name: value}))
        caplog.clear()
        assert training_metadata(folder) is None and "run.json or metrics.jsonl was changed since" in caplog.text
    (folder / "run.json").write_text(json.dumps(run, sort_keys=True))
    assert training_metadata(folder).seed == 1, "the order is nothing"
    log = (folder / "metrics.jsonl").read_text()
    for text in (log.replace("2.5", "0.5"), log + log.splitlines()[0] + "\n", ""):
        (folder / "metrics.jsonl").write_text(text)
        assert training_metadata(folder) is None
    del entries[1]["validation_loss"]
    assert training_metadata(run_of(tmp_path, entries)).loss is None


def test_the_record_is_that_which_a_run_leaves(tmp_path):
    """As `training/pretrain.py` writes it."""
    found = training_metadata(run_of(tmp_path, [], data=None))
    assert (found.steps, found.tokens, found.batch_size, found.context) == (9, 288, 4, 8)
    assert (found.optimizer, found.learning_rate, found.weight_decay) == ("equivariant", 0.01, 0.1)
    assert (found.precision, found.seed, found.start, found.source) == ("no", 1, None, None)
    assert replace(found, source="docs") == training_metadata(run_of(tmp_path, []))
    assert training_metadata(run_of(tmp_path, [], init_from="/home/ada/gpt2")).start == "gpt2"


@pytest.mark.parametrize(
    "source, name",
    [
        ("/home/ada/large", "large"),
        ("/home/ada/runs/trained/model/", "trained"),
        ("runs/trained/model", "trained"),
        ("C:\\data\\trained\\model", "trained"),
        ("me/model", "me/model"),
        ("/home/ada/model", "model"),
        ("/model", "model"),
        ("../../model", "model"),
        ("model", "model"),
    ],
)
def test_a_source_that_is_called_model_has_the_name_of_the_folder_around_it(source, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name_of_source(source) == name


def test_a_folder_that_is_there_is_named_by_the_one_around_it(tmp_path, monkeypatch):
    (tmp_path / "trained/model").mkdir(parents=True)
    for place, source in ((tmp_path, "trained/model"), (tmp_path / "trained", "model")):
        monkeypatch.chdir(place)
        assert name_of_source(source) == "trained"


def test_the_time_is_that_of_all_steps_and_not_of_those_in_the_log(tmp_path):
    """Every hundredth step is logged, and those that were looked at."""
    speeds = {100: STEP / 36, 150: STEP / 18, 200: STEP / 36, 300: STEP / 36}
    entries = [{"step": step, "tokens_per_second": speed} for step, speed in speeds.items()]
    training = training_metadata(run_of(tmp_path, entries, max_steps=300))
    assert training.seconds == pytest.approx(100 * 36 + 50 * 18 + 50 * 36 + 100 * 36)
    assert training.timed == 4 and training.steps == 300
    # The same run with every step in its log.
    whole = [{"step": step, "tokens_per_second": STEP / (18 if 100 < step <= 150 else 36)} for step in range(1, 301)]
    every = training_metadata(run_of(tmp_path, whole, max_steps=300))
    assert every.seconds == pytest.approx(training.seconds) and every.timed is None


def test_a_time_that_cannot_be_known_is_left_out(tmp_path):
    for steps in ([], [2, 1], [1, 1]):
        training = training_metadata(run_of(tmp_path, [{"step": step, "tokens_per_second": 8.0} for step in steps]))
        assert training.seconds is None and training.timed is None
        assert training_metadata(run_of(tmp_path, [{"step": 1, "tokens_per_second": 8.0}])).seconds == 4


def test_records_of_another_kind_are_refused_in_one_line(tmp_path):
    """Numbers that are none, lists for objects, and what JSON holds besides."""
    tiny_model().float().save_pretrained(tmp_path)
    folder = run_of(tmp_path, [])
    run = json.loads((tmp_path / "run.json").read_text())
    broken = [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        run | {"global_batch_size": "<b>"},
        run | {"global_batch_size": float("inf")},
        {name: value for name, value in run.items() if name != "init_from"},
    ]
    merged = ["[]", {"sources": 5, "weights": 5}, {"sources": ["a"], "weights": ["x"]}]
    merged += [{"sources": ["a"], "weights": [number]} for number in (float("nan"), float("inf"), None, [])]
    tuned = ["null", {"options": 5}, {"options": {"model": {"a": 1}}}]
    good = {"source": "a", "calibrate": "none", "neurons": 0.2, "heads": 0, "rank": None, "recover": 0}
    good["loss"] = {"before": {"x": 1.0}, "pruned": {"x": 2.0}}
    (folder / "prune.json").write_text(json.dumps(good))
    assert smaller_than(folder)
    changes = [{"loss": {}}, {"loss": {"before": {"x": 1.0}}}, {"recover": "<b>"}, {"neurons": 2}, {"rank": -1}]
    changes += [{"loss": {"before": {"x": 1.0}, "pruned": values}} for values in ({}, {"x": "a"}, {"x": float("nan")})]
    pruned = ["null", *(good | change for change in changes)]
    quantized = [good, good | {"recipe": 5}, good | {"recipe": {"bits": 99}}, good | {"recipe": {"colour": 1}}]
    for path, contents, read in (
        (folder / "quantize.json", quantized, smaller_than),
        (folder / "prune.json", pruned, smaller_than),
        (tmp_path / "run.json", broken, training_metadata),
        (folder / "merge.json", merged, sources_of_merge),
        (folder / "finetune.json", tuned, tuned_from),
    ):
        for content in contents:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
            with pytest.raises(ValueError, match=f"`folder` must .*{path.name}") as error:
                read(folder)
            assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_values_that_no_run_or_merge_writes_are_refused(tmp_path):
    """By the rules of the run, and of the merge."""
    folder = run_of(tmp_path, [])
    run = json.loads((folder / "run.json").read_text())

    def refused(read, path: Path, content: str) -> str:
        before = path.read_text() if path.exists() else None
        path.write_text(content)
        try:
            read(folder)
        except ValueError as error:
            line = str(error)
            assert "\n" not in line and line.startswith("`folder` must") and path.name in line, line
            return line
        finally:
            path.unlink() if before is None else path.write_text(before)
        return ""

    assert not refused(training_metadata, tmp_path / "run.json", json.dumps(run))
    for name, value, rule in (
        ("learning_rate", -0.1, "`learning_rate` must be positive, got -0.1."),
        ("learning_rate", float("inf"), "`learning_rate` must be positive, got inf."),
        ("learning_rate", "<b>", "`learning_rate`: '<b>' is not a valid float."),
        ("weight_decay", -1, "`weight_decay` must be at least 0, got -1.0."),
        ("optim", "magic", "`optim`: 'magic' is not one of 'equivariant', 'adamw', 'muon'."),
        ("mixed_precision", "int1", "`mixed_precision`: 'int1' is not one of"),
        ("global_batch_size", -4, "`global_batch_size` must be at least 1, got -4."),
        ("global_batch_size", 2.5, "`global_batch_size`: 2.5 is not a valid int."),
        ("context_length", 0, "`context_length` must be at least 2, got 0."),
        ("max_steps", 0, "`max_steps` must be at least 1, got 0."),
        ("seed", None, "`seed`: None is not a valid int."),
    ):
        assert rule in refused(training_metadata, tmp_path / "run.json", json.dumps(run | {name: value})), rule
    entry = {"step": 1, "tokens_per_second": 8.0, "validation_loss": 2.5}
    log = tmp_path / "metrics.jsonl"
    for loss in (0, float("nan"), float("inf")):
        assert not refused(training_metadata, log, json.dumps(entry | {"validation_loss": loss}) + "\n")
    for name, value, rule in (
        ("validation_loss", -3.0, "`validation_loss` must be at least 0, got -3.0."),
        ("validation_loss", "<b>", "`validation_loss` must be at least 0, got '<b>'."),
        ("step", -2560, "`step` must be a whole number from 1, got -2560."),
        ("step", 1.5, "`step` must be a whole number from 1, got 1.5."),
        ("step", float("inf"), "`step` must be a whole number from 1, got inf."),
        ("tokens_per_second", -8.0, "`tokens_per_second` must be positive, got -8.0."),
    ):
        assert rule in refused(training_metadata, log, json.dumps(entry | {name: value}) + "\n"), rule
    for weights, method, rule in (
        ([0.5, 0.5], "linear", ""),
        ([1.5, -0.5], "linear", ""),
        ([0.5, 7], "linear", "sum to 1, got [0.5, 7.0]"),
        ([1.0], "linear", "`weights` must be 2 numbers"),
        ([1.5, -0.5], "spherical", "must not be negative"),
        ([0.5, 0.5], "magic", "`method` must be one of linear, spherical"),
    ):
        merged = {"sources": ["a", "b"], "weights": weights, "method": method}
        line = refused(sources_of_merge, folder / "merge.json", json.dumps(merged))
        assert rule in line and bool(line) is bool(rule), (merged, line)


@pytest.mark.full
def test_a_recorded_symmetry_is_held_against_the_weights(tmp_path, known_invariance):
    symmetry = TokenSymmetry.named("cyclic", [range(5, 10)], 61)
    model = tiny_model(dtype=torch.float32)
    representation = Representation.choose(model.config, symmetry)
    symmetric, turn = symmetrize(model, representation), GaugeTransformation.random(model.config, generator())
    cases = {"holds": (symmetric, representation), "not": (model, representation)}
    cases["turned"] = turn(symmetric), representation.conjugated(turn)
    # No gauge transformation: the weights are in the space that it names, and the function has no symmetry.
    stretch = torch.eye(model.config.hidden_size).double() + 0.1 * torch.randn(2 * [model.config.hidden_size]).double()
    skew = GaugeTransformation(model.config, {"stream": stretch[None]})
    cases["skew"] = skew(symmetric), representation.conjugated(skew)
    for name, (saved, recorded) in cases.items():
        saved.save_pretrained(tmp_path / name)
        recorded.save(tmp_path / name)
        found = gather(tmp_path / name).symmetry
        assert (found.order, found.tokens, found.shown) == ("5", 5, ["5", "6", "7", "8"])
        assert (found.distance > 0.1) is (name == "not") and (found.error > 0.1) is (name in ("not", "skew"))
        assert found.holds is (name in ("holds", "turned"))
        text = card_text(tmp_path / name)
        assert "A group of order 5 exchanges 5 tokens, such as 5, 6, 7, 8." in text and f"{found.distance:.1e}" in text
        assert ("does not have this symmetry" in text) is not found.holds and f"{found.error:.1e}" in text
    (tmp_path / "turned" / SYMMETRY_FRAME).unlink()
    with pytest.raises(ValueError, match="must hold the frame that its `token_symmetry` names"):
        gather(tmp_path / "turned")
    model.save_pretrained(tmp_path / "without")
    assert gather(tmp_path / "without").symmetry is None and "exchanges" not in card_text(tmp_path / "without")
