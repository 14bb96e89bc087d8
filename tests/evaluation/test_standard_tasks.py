"""Tasks of lm-eval, offline from local files: they agree with our own accuracy, and end in tables and tests."""

import json
import shutil

import pytest
from rich.console import Console

from rigpt_hf.conversion import convert_model
from rigpt_hf.evaluation.harness.runner import EvaluateOptions, evaluate
from rigpt_hf.evaluation.harness.standard_tasks import (
    StandardOptions,
    check_standard_tasks,
    fingerprint_of_tasks,
    measure_standard_task,
    quantities,
)
from rigpt_hf.evaluation.measures.cloze import Cloze, cloze_accuracy
from rigpt_hf.evaluation.measures.multiple_choice import MultipleChoice, multiple_choice_accuracy
from rigpt_hf.evaluation.models import EvaluatedModel
from tests.evaluation.toys import rows, tiny_gpt2, word_tokenizer


lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
WORDS = ["<s>", *[f" w{index}" for index in range(60)]]
TASK = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


LAST_WORD = """
task: tiny_last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{choices[0]}}}}"
target_delimiter: ""
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
GROUP = """
group: tiny_group
task: [tiny_choices]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of twenty questions, and the questions."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = []
    for index, row in enumerate(rows(20, 12, 60, seed=4)):
        words = [f" w{each}" for each in row]
        choices = [words[8], words[9] + words[10], words[11]]
        questions.append({"prompt": "".join(words[:8])[1:], "choices": choices, "answer": index % 3})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "tiny_choices.yaml").write_text(TASK.format(data=folder / "questions.jsonl"))
    (folder / "tiny_last_word.yaml").write_text(LAST_WORD.format(data=folder / "questions.jsonl"))
    (folder / "tiny_group.yaml").write_text(GROUP)
    return folder, questions


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    """What the library of data sets makes of the questions stays in the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)


def test_the_library_and_our_own_accuracy_agree(tasks):
    folder, questions = tasks
    subject = EvaluatedModel(convert_model(tiny_gpt2()).eval(), word_tokenizer(WORDS), "rigpt")
    found = measure_standard_task("tiny_choices", subject, StandardOptions(include_path=str(folder)), batch_size=4)
    examples = [MultipleChoice(each["prompt"], each["choices"], each["answer"]) for each in questions]
    own = multiple_choice_accuracy(subject, examples)
    assert found["examples"] == 20 and 0 < own["accuracy"] < 1
    assert found["metrics"] == {
        "acc": pytest.approx(own["accuracy"]),
        "acc_norm": pytest.approx(own["accuracy_normalized"]),
    }
    assert [bool(each) for each in found["samples"]["acc"]] == own["samples"]["accuracy"]
    assert found["protocol"]["lm_eval"] and found["protocol"]["fewshot"] == 0


def test_perplexity_of_last_words_is_tested_by_its_logarithm(tasks):
    folder, questions = tasks
    subject = EvaluatedModel(tiny_gpt2(), word_tokenizer(WORDS), "gpt2")
    found = measure_standard_task("tiny_last_word", subject, StandardOptions(include_path=str(folder)), batch_size=4)
    own = cloze_accuracy(subject, [Cloze(each["prompt"], each["choices"][0]) for each in questions])
    assert found["metrics"]["perplexity"] == pytest.approx(own["target_perplexity"], rel=1e-5)
    assert "perplexity" not in found["samples"]
    assert found["samples"]["log perplexity"] == pytest.approx(own["samples"]["nats"], rel=1e-4)
    assert [bool(each) for each in found["samples"]["acc"]] == own["samples"]["accuracy"]
    # And the model with less of it is the better one.
    assert {each.name: each.better for each in quantities(found)} == {
        "perplexity": "less",
        "log perplexity": "less",
        "acc": "more",
    }


def test_solved_examples_come_before_a_question(tasks):
    folder, _ = tasks
    subject = EvaluatedModel(tiny_gpt2(), word_tokenizer(WORDS), "gpt2")
    found = {}
    for shots, seed in ((None, 0), (0, 0), (2, 0), (2, 1)):
        options = StandardOptions(include_path=str(folder), fewshot=shots, seed=seed)
        found[shots, seed] = measure_standard_task("tiny_last_word", subject, options, batch_size=4)
        assert found[shots, seed]["protocol"]["fewshot"] == (shots or 0)
    nats = {key: each["samples"]["log perplexity"] for key, each in found.items()}
    assert nats[None, 0] == nats[0, 0]
    # What is read before each word is something else, and other examples are something else again.
    assert all(a != b for a, b in zip(nats[0, 0], nats[2, 0], strict=True))
    assert sum(a != b for a, b in zip(nats[2, 0], nats[2, 1], strict=True)) > 10


def test_tasks_that_take_no_examples_say_so(tasks, tmp_path):
    """As those of BLiMP; alone and in a group with others."""
    shutil.copytree(tasks[0], tmp_path / "tasks")
    text = (tmp_path / "tasks/tiny_choices.yaml").read_text()
    (tmp_path / "tasks/tiny_zero.yaml").write_text(
        text.replace("tiny_choices", "tiny_zero").replace("metadata:", "num_fewshot: 0\nmetadata:")
    )
    group = (tmp_path / "tasks/tiny_group.yaml").read_text()
    (tmp_path / "tasks/tiny_group.yaml").write_text(group.replace("[tiny_choices]", "[tiny_choices, tiny_zero]"))
    subject = EvaluatedModel(tiny_gpt2(), word_tokenizer(WORDS), "gpt2")
    options = StandardOptions(include_path=str(tmp_path / "tasks"), fewshot=3)
    asked = {name: measure_standard_task(name, subject, options, 4) for name in ("tiny_zero", "tiny_choices")}
    assert [each["protocol"]["fewshot"] for each in asked.values()] == [0, 3]
    reason = {"with 3 solved examples": "tiny_zero has 0 by itself, which is what was measured."}
    assert asked["tiny_zero"]["absent"] == reason and "absent" not in asked["tiny_choices"]
    both = measure_standard_task("tiny_group", subject, options, 4)
    assert both["protocol"]["fewshot"] == [0, 3]
    reason = {"with 3 solved examples": "tiny_group has 0 and 3 by itself, which is what was measured."}
    assert both["absent"] == reason


def test_running_text_has_no_examples_and_written_answers_are_cut_too(tasks, tmp_path):
    shutil.copytree(tasks[0], tmp_path / "tasks")
    text = (tmp_path / "tasks/tiny_last_word.yaml").read_text()
    head = text[: text.index("output_type")]
    (tmp_path / "tasks/tiny_rolling.yaml").write_text(
        head.replace("tiny_last_word", "tiny_rolling") + 'output_type: loglikelihood_rolling\ndoc_to_text: ""\n'
        'doc_to_target: "{{prompt}}"\nmetric_list:\n  - {metric: bits_per_byte}\n'
    )
    (tmp_path / "tasks/tiny_written.yaml").write_text(
        head.replace("tiny_last_word", "tiny_written") + 'output_type: generate_until\ndoc_to_text: "{{prompt}}"\n'
        'doc_to_target: "{{choices[0]}}"\ntarget_delimiter: ""\ngeneration_kwargs: {max_gen_toks: 2, until: ["."]}\n'
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    tokenizer = word_tokenizer(WORDS)
    tokenizer.eos_token = WORDS[0]
    subject = EvaluatedModel(tiny_gpt2(), tokenizer, "gpt2")
    options = StandardOptions(include_path=str(tmp_path / "tasks"), fewshot=2, limit=3)
    rolling = measure_standard_task("tiny_rolling", subject, options, 1)
    assert rolling["protocol"]["fewshot"] == 0 and rolling["protocol"]["cut"] == 0 and "absent" in rolling
    for context, cut in ((60, 0), (12, 3)):
        written = measure_standard_task("tiny_written", subject, options, 1, context)
        assert written["protocol"]["fewshot"] == 2 and written["protocol"]["cut"] == cut


def test_a_prompt_is_read_whole_or_said_to_be_cut(tasks):
    """Not only 1,024 tokens of it, where the model takes more."""
    folder, _ = tasks
    subject = EvaluatedModel(tiny_gpt2(n_positions=2048), word_tokenizer(WORDS), "gpt2")
    lengths = []
    subject.model.register_forward_pre_hook(
        lambda module, given, more: lengths.append(given[0].shape[1]), with_kwargs=True
    )
    options = StandardOptions(include_path=str(folder), fewshot=19, limit=2)
    whole = measure_standard_task("tiny_last_word", subject, options, 1)
    longest = max(lengths)
    assert whole["protocol"]["context"] == 2048 and whole["protocol"]["cut"] == 0 and 100 < longest < 2048
    lengths.clear()
    part = measure_standard_task("tiny_last_word", subject, options, 1, context=60)
    assert part["protocol"]["context"] == 60 and part["protocol"]["cut"] == 2 and max(lengths) == 60
    assert part["samples"]["log perplexity"] != whole["samples"]["log perplexity"]


def test_groups_are_tested_on_the_examples_of_their_tasks(tasks):
    folder, _ = tasks
    subject = EvaluatedModel(tiny_gpt2(), word_tokenizer(WORDS), "gpt2")
    options = StandardOptions(include_path=str(folder))
    whole, part = (measure_standard_task(name, subject, options, 4) for name in ("tiny_group", "tiny_choices"))
    assert whole["metrics"]["acc"] == part["metrics"]["acc"] and whole["samples"]["acc"] == part["samples"]["acc"]
    assert whole["examples"] == 20


def test_other_files_are_other_tasks(tasks, tmp_path):
    folder, _ = tasks
    shutil.copytree(folder, tmp_path / "tasks")
    options = StandardOptions(include_path=str(tmp_path / "tasks"))
    before = fingerprint_of_tasks(options)
    assert before == fingerprint_of_tasks(StandardOptions(include_path=str(folder)))
    with (tmp_path / "tasks/questions.jsonl").open("a") as file:
        file.write("\n")
    assert fingerprint_of_tasks(options) != before


def test_they_are_part_of_an_evaluation(tasks, tmp_path):
    folder, _ = tasks
    for name, seed in (("a", 0), ("b", 1)):
        tiny_gpt2(seed=seed).save_pretrained(tmp_path / name)
        word_tokenizer(WORDS).save_pretrained(tmp_path / name)
    suite = tmp_path / "suite.yaml"
    (tmp_path / "text.txt").write_text("".join(WORDS[1:40]))
    suite.write_text(f"text: {{source: {tmp_path / 'text.txt'}}}\ntasks: [{{metric: perplexity}}]")
    options = EvaluateOptions(
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        str(suite),
        tmp_path / "out",
        standard_tasks=("tiny_choices",),
        standard=StandardOptions(include_path=str(folder), limit=10),
        device="cpu",
    )
    results = evaluate(options, Console(quiet=True))
    task = results["tasks"][-1]
    assert task["metric"] == "lm-eval" and not task["errors"]
    assert task["models"]["model"]["examples"] == 10
    accuracy = next(each for each in task["quantities"] if each["name"] == "acc")
    assert set(accuracy["difference"]) >= {"value", "low", "high", "p_value", "significant"}
    assert "tiny_choices" in (tmp_path / "out/table.md").read_text()


@pytest.mark.parametrize(
    "names, options, message",
    [
        (("no_such_task",), {}, "`standard_tasks` must be tasks that lm-eval knows, got 'no_such_task'"),
        (("arc_*",), {}, "`standard_tasks` must be tasks that lm-eval knows, got 'arc_\\*'"),
        (("hellaswag",), {"limit": 0}, "`limit` must be at least 1, got 0"),
        (("hellaswag",), {"max_length": 1}, "`max_length` must be at least 2, got 1"),
        (("hellaswag",), {"fewshot": -1}, "`fewshot` must not be negative, got -1"),
        ((), {"fewshot": 5}, "`fewshot` is for `standard_tasks`, got 5 and no such task"),
        (("hellaswag",), {"include_path": "/no/such"}, "`include_path` must be a folder of task files"),
    ],
)
def test_refusals(names, options, message):
    with pytest.raises(ValueError, match=message):
        check_standard_tasks(names, StandardOptions(**options))


def test_the_standard_names_are_known():
    check_standard_tasks(
        ("lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "blimp"), StandardOptions()
    )


def test_without_the_library_there_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'`standard_tasks` need lm-eval. Install it with pip install "rigpt-hf\[lm'):
        check_standard_tasks(("piqa",), StandardOptions())
