"""A suite is checked before anything is loaded, and text is measured as it was given."""

import json
import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from rich.progress import Progress

from rigpt_hf.checkpoints.source import names_of
from rigpt_hf.demo.run import documentation
from rigpt_hf.evaluation.harness import tasks
from rigpt_hf.evaluation.harness.runner import fitted
from rigpt_hf.evaluation.harness.suites import (
    METRICS,
    PACKAGED,
    Suite,
    Task,
    TextOptions,
    arguments_of,
    check_arguments,
    load_suite,
)
from rigpt_hf.evaluation.harness.texts import LONGEST, SHORTEST, Texts, load_texts, name_of
from rigpt_hf.evaluation.measures import MEASURES
from rigpt_hf.evaluation.measures.cloze import last_words
from rigpt_hf.evaluation.measures.multiple_choice import endings
from rigpt_hf.evaluation.models import EvaluatedModel
from rigpt_hf.text.corpus import gather_documentation
from rigpt_hf.text.sources import documents
from tests.evaluation.toys import tiny_gpt2, word_tokenizer


SLIPS = {
    "perplexity, arguments: ": "`arguments` of perplexity must be dict.*, got None. C",
    "perplexity, arguments: {context: '32'}": "`context` of perplexity must be int \\| None, got '32'. Correct the su",
    "perplexity, arguments: {context: true}": "`context` of perplexity must be int \\| None, got True",
    "perplexity, arguments: {bos: 1}": "`bos` of perplexity must be bool, got 1",
    "perplexity, arguments: {padding_side: up}": "must be Literal\\['left', 'right'\\], got 'up'",
    "perplexity, arguments: {contxt: 3}": "`arguments` of perplexity must be among context, stride, .*, got 'contxt'",
    "perplexity, arguments: {batch_size: 3}": "`arguments` of perplexity .* got 'batch_size'",
    "throughput, arguments: {progress: 3}": "`arguments` of throughput .* got 'progress'",
    "cloze, examples: ": "`examples` of cloze must be int, got None",
    "cloze, examples: 1.5": "`examples` of cloze must be int, got 1.5",
    "cloze, name: 3": "`name` of cloze must be str, got 3. Put it in quotes",
    "3": "`metric` of `tasks` must be str, got 3",
    "[]": r"`metric` of `tasks` must be str, got \[\]",
    "quantization_robustness, name: q, arguments: {schemes: W8A8}": r"`schemes` of q must be list\[str\].*'W8A8'",
    "quantization_robustness, arguments: {schemes: []}": r"`schemes` of q.* must hold at least one, got \[\]. N",
    "quantization_robustness, arguments: {schemes: [8]}": r"`schemes` of q.* must be list\[str\].*, got \[8\]",
}
HEADS = {
    "text: {documents: '12'}": "`documents` of `text` must be int, got '12'",
    "text: {source: }": "`source` of `text` must be str, got None",
    "text: {revision: 1234567}": "`revision` of `text` must be str \\| None, got 1234567. Put it in quotes",
    "description: 3": "`description` of the suite must be str, got 3",
    "text: []": r"`text` must hold source, .*, got \[\]",
}


def test_slips_are_one_line(tmp_path):
    slips = [(f"tasks: [{{metric: {task}}}]", message) for task, message in SLIPS.items()]
    for text, message in slips + [(f"{head}\ntasks: [{{metric: cloze}}]", line) for head, line in HEADS.items()]:
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            load_suite(str(tmp_path / "s.yaml"))
        assert "\n" not in str(caught.value)


def test_what_is_right_is_taken(tmp_path):
    (tmp_path / "s.yaml").write_text(
        "description:\ntext:\ntasks:\n"
        "  - {metric: perplexity, arguments: {context: 32, stride: null, bos: true, padding_side: left}}\n"
        "  - {metric: invariance, arguments: {frame: [stream], dtypes: [float64]}}\n"
        "  - {metric: invariance, name: other, arguments: {frame: stream}, documents: null}\n"
        "  - {metric: quantization_robustness, arguments: {modules_to_not_convert: [], frames: null, group_size: 8}}\n"
        "  - {metric: throughput, arguments: {batch_size: 2, memory: false}}\n"
    )
    suite = load_suite(str(tmp_path / "s.yaml"))
    assert len(suite.tasks) == 5 and suite.text == TextOptions() and suite.description == ""
    assert suite.tasks[0].arguments["stride"] is None
    assert all(load_suite(name).tasks for name in PACKAGED)
    for metric in METRICS:
        # Every default is of the type that it says it is.
        known = arguments_of(metric)
        assert known and not {"progress", "model", "texts", "tokenizer", "models"} & set(known)
        plain = {name: default for name, (_, default) in known.items() if not isinstance(default, tuple)}
        check_arguments(metric, metric, plain)


def test_local_documents_are_whole(tmp_path):
    long = "word " * 5000
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (long, "short")))
    assert [len(row) for row in load_texts(TextOptions(source=str(tmp_path / "a.jsonl"))).rows] == [len(long), 5]
    (tmp_path / "b.txt").write_text(long)
    assert len(long) > LONGEST and len(load_texts(TextOptions(source=str(tmp_path / "b.txt"))).rows[0]) > LONGEST
    (tmp_path / "b.txt").write_text(long + "<|endoftext|>" + long)
    assert len(load_texts(TextOptions(source=str(tmp_path / "b.txt"))).rows) == 2


def test_a_fraction_is_one_of_what_there_is(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"Document {index}."}) for index in range(10)))
    np.arange(100, dtype="<u2").tofile(tmp_path / "a.bin")
    few, many = (TextOptions(source=str(tmp_path / "a.jsonl"), documents=count) for count in (4, 128))
    for options, fraction, count in ((few, 0.5, 2), (many, 0.5, 5), (many, 0.25, 3), (many, 1e-9, 1), (many, 1.0, 10)):
        rows = load_texts(options, fraction).rows
        assert rows == [f"Document {index}." for index in range(count)]
    ids = load_texts(TextOptions(source=str(tmp_path / "a.bin"), window=10, documents=128), 0.3).rows
    assert [row[0] for row in ids] == [0, 45, 90]


def test_what_is_trained_on_is_not_measured_on(tmp_path, monkeypatch):
    """Whatever order, amount and packages."""
    draw = random.Random(0)

    def words(count):
        return " ".join("".join(draw.choices("abcdefgh", k=6)) for _ in range(count))

    paragraphs = [f"This is the paragraph {words(40)}." for _ in range(200)]
    (tmp_path / "page.md").write_text("\n\n".join(paragraphs))
    own = partial(gather_documentation, roots=[tmp_path])
    for module in ("rigpt_hf.text.corpus", "rigpt_hf.text.sources", "rigpt_hf.demo.run"):
        monkeypatch.setattr(f"{module}.gather_documentation", own)
    measured = set(load_texts(TextOptions(documents=10**6)).rows)
    assert 10 < len(measured) < 45
    assert measured == set(load_texts(TextOptions(documents=10**6)).rows)
    trained = set(documents("docs", megabytes=100))
    shown = set(documentation(100, 0, Progress(disable=True)))
    assert trained == shown == set(paragraphs) - measured
    assert measured | trained == set(own(10**9))
    # Of each that is held out, one that others have copied a part of, long enough or not.
    for count in (12, 13):
        parts = [" ".join(each.split()[5 : 5 + count]) for each in measured]
        copies = [f"Copied {part} {words(30)}." for part in parts for _ in range(7)]
        (tmp_path / "page.md").write_text("\n\n".join([*paragraphs, *copies]))
        found = set(own(10**9, part="held-out"))
        assert found >= measured if count == 12 else not found & measured


def test_of_documentation_those_of_a_usual_length_are_drawn(monkeypatch):
    pages = ["a" * size for size in (SHORTEST - 1, SHORTEST, LONGEST, LONGEST + 1)]
    monkeypatch.setattr("rigpt_hf.text.corpus.gather_documentation", lambda *given, **more: pages)
    assert load_texts(TextOptions()).rows == pages[1:3]


def test_too_few_documents_say_what_a_document_is():
    unit = "a .txt file is one document unless <|endoftext|> parts it, each row of JSONL or parquet is one"
    with pytest.raises(
        ValueError, match="`documents` must be at least 4 of sixteen words or more, got 1. Give"
    ) as few:
        endings(["word " * 40], 5)
    with pytest.raises(ValueError, match="`documents` must hold one with a sentence that ends") as none:
        last_words(["No end"], 5)
    assert unit in str(few.value) and unit in str(none.value)


def test_a_folder_has_its_name_however_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert name_of(".") == name_of(str(tmp_path / "model")) == name_of("../model/") == "model"
    assert name_of("me/model") == "me/model"


def test_a_folder_called_model_has_the_name_of_the_one_around_it(tmp_path, monkeypatch):
    for name in ("a/run/model", "b/run/model", "b/tuned", "model"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert names_of(["a/run/model", "b/tuned", "me/model"]) == ["run", "tuned", "me/model"]
    monkeypatch.chdir(tmp_path / "a/run/model")
    assert names_of([".", "../../../b/tuned/"], "-") == ["run", "tuned"]
    monkeypatch.chdir(tmp_path)
    # As many parts as tell them apart, and one name for one place.
    assert names_of(["a/run/model", "b/run/model"], "-") == ["a-run-model", "b-run-model"]
    assert names_of(["b/tuned", str(tmp_path / "b/tuned")]) == ["tuned", "tuned"] and names_of([""]) == [""]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names_of(["model"]) == ["model"], "the name of a home"


def of_positions(count: int | None) -> EvaluatedModel:
    return EvaluatedModel(SimpleNamespace(config=SimpleNamespace(max_position_embeddings=count)))


def test_windows_are_the_same_for_both_models():
    for metric in [metric for metric in METRICS if metric != "throughput"]:

        def context(*positions, metric=metric, **arguments):
            suite = Suite("s", TextOptions(), (Task(metric, arguments=arguments),))
            models = {str(index): of_positions(count) for index, count in enumerate(positions)}
            return fitted(suite, models).tasks[0].arguments

        assert context(64, 48)["context"] == 48 == context(48, None)["context"]
        assert context(64, 48, context=None)["context"] == 48
        assert context(64, 48, context=32) == {"context": 32} and context(64, 48, context=50)["context"] == 48
        if metric == "invariance":  # which reads 128 tokens, or what a model takes
            assert context(512, 256) == {} and context(64, 64) == {"context": 64}
        else:
            # Models that take the same, and those that take more than any reads, need not be told.
            assert context(64, 64) == context(4096, 2048) == context(64) == {}
        if metric == "perplexity":
            assert context(64, 48, stride=60) == {"context": 48, "stride": 48}
            # What is impossible as it stands in the suite is not mended in silence.
            assert context(64, 64, context=16, stride=500) == {"context": 16, "stride": 500}
            assert context(64, 48, context=60, stride=61) == {"context": 48, "stride": 61}
            assert context(64, 48, context=60, stride=60) == {"context": 48, "stride": 48}
            # What is impossible is not made possible in silence.
            assert context(64, 48, context=0) == {"context": 0}


def test_what_rounding_costs_is_counted_on_the_same_tokens_as_perplexity(monkeypatch):
    """Texts begin as they do for perplexity, and a task's own detokenizer goes along; token ids are as they are."""
    given = []
    record = MEASURES["quantization_robustness"]
    called = replace(record, run=lambda *values, **more: given.append(more) or {})
    monkeypatch.setitem(tasks.MEASURES, record.name, called)
    model = EvaluatedModel(tiny_gpt2(), word_tokenizer(["<s>", " a"]))
    for arguments, rows in (({"detokenizer": "wikitext"}, [" a"]), ({"bos": False}, [" a"]), ({}, [[1, 1]])):
        check_arguments("quantization_robustness", "q", arguments)
        tasks.measure(Task("quantization_robustness", arguments=arguments), model, Texts(rows, {}), 2)
    assert [(each.get("bos"), each.get("detokenizer")) for each in given] == [
        (True, "wikitext"),
        (False, None),
        (None, None),
    ]
