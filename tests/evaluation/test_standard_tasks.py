"""Tasks of lm-eval, offline from local files: they agree with our own accuracy, and end in tables and tests."""

import json
import shutil
from pathlib import Path

import pytest

from rigpt_hf.conversion import convert_model
from rigpt_hf.evaluation.harness.standard_tasks import (
    StandardOptions,
    _manager_of,
    check_standard_tasks,
    fingerprint_of_tasks,
    measure_standard_task,
    quantities,
)
from rigpt_hf.evaluation.measures.cloze import Cloze, cloze_accuracy
from rigpt_hf.evaluation.measures.multiple_choice import MultipleChoice, multiple_choice_accuracy
from rigpt_hf.evaluation.models import EvaluatedModel
from tests.evaluation.small import WORDS, by_name, run
from tests.evaluation.toys import rows, tiny_gpt2, word_tokenizer


lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
FOLDERS = ("lambada", "hellaswag", "piqa", "arc", "winogrande", "blimp")
NAMES = ("lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "blimp")
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
target_delimiter: ""
metadata: {{version: 1.0}}
"""
CHOICES = """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
LAST_WORD = """
output_type: loglikelihood
doc_to_text: "{{prompt}}"
doc_to_target: "{{choices[0]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: bits_per_byte}]
"""
WRITTEN = """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {max_gen_toks: 2, until: ["."]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
TASKS = {
    "tiny_choices": CHOICES,
    "tiny_zero": CHOICES + "num_fewshot: 0\n",
    "tiny_last_word": LAST_WORD,
    "tiny_rolling": ROLLING,
    "tiny_written": WRITTEN,
}
GROUP = """
group: {name}
task: [{members}]
aggregate_metric_list: [{{metric: acc, aggregation: mean, weight_by_size: true}}]
metadata: {{version: 1.0}}
"""


# What would run code that the folder names, and what it is refused for.
CODE = {
    "doc_to_text: !function evil.f": "constructor for the tag '!function'",
    "class: !function evil.A": "constructor for the tag '!function'",
    "process_docs: {folder}/evil.f": "key 'process_docs'",
    "custom_dataset: {folder}/evil.f": "key 'custom_dataset'",
    "doc_to_text: \"{{{{ cycler.__init__.__globals__.os.system('touch {folder}/canary') }}}}\"": "a template may have",
    "description: \"{{% for a in ''.__class__.__mro__ %}}{{{{a}}}}{{% endfor %}}\"": "a template may have",
    'doc_to_choice: [a, "{{{{{{{{prompt}}}}}}}}"]': "a template may have",
    "doc_to_choice: [a, \"{{{{prompt|attr('x')}}}}\"]": "a template may have",
    "metric_list: [{{metric: {folder}}}]": "metric '",
    "metric_list: [{{metric: acc, hf_evaluate: true}}]": "key of a metric 'hf_evaluate'",
    "dataset_path: {folder}": "`dataset_path`",
    "dataset_kwargs: {{trust_remote_code: true}}": "key of `dataset_kwargs` 'trust_remote_code'",
    "include: other.yml": "key 'include'",
    "task: [{{task: a, process_docs: {folder}/evil.f}}]": "tasks of a group must be names",
    "a: !!python/object/apply:os.system [touch {folder}/canary]": "constructor for the tag",
    "- a": "it is no mapping",
    "a: [": "while parsing",
}


@pytest.mark.parametrize("line", CODE)
@pytest.mark.by_default(9)
def test_no_code_of_a_folder_of_tasks_is_run(line, tasks, tmp_path):
    """Neither functions nor classes nor templates; without the line the task is taken."""
    shutil.copytree(tasks[0], tmp_path / "own")
    canary = tmp_path / "own/canary"
    (tmp_path / "own/evil.py").write_text(f"open({str(canary)!r}, 'w')\nf = A = dict\n")
    options = StandardOptions(include_path=str(tmp_path / "own"))
    check_standard_tasks(("tiny_choices",), options)
    said = line.format(folder=tmp_path / "own")
    gone = (f"{said.partition(':')[0]}:", *(["  - {metric"] if "metric" in said else []))
    old = (tmp_path / "own/tiny_choices.yaml").read_text().splitlines()
    text = said if said[0] == "-" else "\n".join([*(row for row in old if not row.startswith(gone)), said])
    (tmp_path / "own/sub").mkdir()
    (tmp_path / "own/sub/evil.yaml").write_text(text.replace("task: tiny_choices", "task: evil"))
    with pytest.raises(ValueError, match="`include_path` must hold task files that are data.*sub/evil.yaml'") as told:
        check_standard_tasks(("evil",), options)
    assert CODE[line] in str(told.value) and "\n" not in str(told.value) and not canary.exists()


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory):
    """
    The library with the tasks of a few of its folders, as all ten thousand files take seconds, and without asking pip
    what is installed after every task. Its data sets stay in the test.
    """
    from lm_eval.tasks import TaskManager

    class FewTasks(TaskManager):
        def __init__(self, include_path: str | None = None):
            own = [Path(lm_eval.__file__).parent / "tasks" / name for name in FOLDERS]
            super().__init__(include_path=[*own, *([include_path] if include_path else [])], include_defaults=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.tasks.TaskManager", FewTasks)
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
        yield
    _manager_of.cache_clear()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with tasks of twenty questions, and the questions."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = []
    for index, row in enumerate(rows(20, 12, 60, seed=4)):
        words = [f" w{token}" for token in row]
        choices = [words[8], words[9] + words[10], words[11]]
        questions.append({"prompt": "".join(words[:8])[1:], "choices": choices, "answer": index % 3})
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, questions)))
    for name, body in TASKS.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, data=data) + body)
    for name, members in (("tiny_group", "tiny_choices"), ("tiny_mixed", "tiny_choices, tiny_zero")):
        (folder / f"{name}.yaml").write_text(GROUP.format(name=name, members=members))
    return folder, questions


@pytest.fixture(scope="module")
def measured(tasks):
    """A function that measures the same model by a task."""
    model = EvaluatedModel(tiny_gpt2(), word_tokenizer(WORDS), "gpt2")

    def measure(name, batch_size=4, context=None, model=model, **more):
        return measure_standard_task(
            name, model, StandardOptions(include_path=str(tasks[0]), **more), batch_size, context
        )

    return measure


def test_the_library_and_our_own_accuracy_agree(tasks, measured):
    model = EvaluatedModel(convert_model(tiny_gpt2()).eval(), word_tokenizer(WORDS), "rigpt")
    result = measured("tiny_choices", model=model)
    examples = [MultipleChoice(**question) for question in tasks[1]]
    own = multiple_choice_accuracy(model, examples)
    assert result["examples"] == 20 and 0 < own["accuracy"] < 1
    assert result["metrics"] == {
        "acc": pytest.approx(own["accuracy"]),
        "acc_norm": pytest.approx(own["accuracy_normalized"]),
    }
    assert [bool(value) for value in result["samples"]["acc"]] == own["samples"]["accuracy"]
    assert result["protocol"]["lm_eval"] and result["protocol"]["fewshot"] == 0


def test_perplexity_of_last_words_is_tested_by_its_logarithm(tasks, measured):
    model = EvaluatedModel(tiny_gpt2(), word_tokenizer(WORDS), "gpt2")
    result = measured("tiny_last_word", model=model)
    own = cloze_accuracy(model, [Cloze(question["prompt"], question["choices"][0]) for question in tasks[1]])
    assert result["metrics"]["perplexity"] == pytest.approx(own["target_perplexity"], rel=1e-5)
    assert "perplexity" not in result["samples"]
    assert result["samples"]["log perplexity"] == pytest.approx(own["samples"]["nats"], rel=1e-4)
    assert [bool(value) for value in result["samples"]["acc"]] == own["samples"]["accuracy"]
    # And the model with less of it is the better one.
    assert {quantity.name: quantity.better for quantity in quantities(result)} == {
        "perplexity": "less",
        "log perplexity": "less",
        "acc": "more",
    }


def test_solved_examples_come_before_a_question(measured):
    nats = {}
    for shots, seed in ((None, 0), (0, 0), (2, 0), (2, 1)):
        result = measured("tiny_last_word", fewshot=shots, seed=seed)
        assert result["protocol"]["fewshot"] == (shots or 0)
        nats[shots, seed] = result["samples"]["log perplexity"]
    assert nats[None, 0] == nats[0, 0]
    # Another text is read before each word, and with other examples another one again.
    assert all(a != b for a, b in zip(nats[0, 0], nats[2, 0], strict=True))
    assert sum(a != b for a, b in zip(nats[2, 0], nats[2, 1], strict=True)) > 10


def test_tasks_that_take_no_examples_say_so(measured):
    """As those of BLiMP; alone and in a group with others."""
    for name, shots, said in (("tiny_zero", 0, "0"), ("tiny_choices", 3, None), ("tiny_mixed", [0, 3], "0 and 3")):
        result = measured(name, fewshot=3)
        reason = {"with 3 solved examples": f"{name} has {said} by itself, which is what was measured."}
        assert result["protocol"]["fewshot"] == shots and result.get("absent") == (reason if said else None)


def test_running_text_has_no_examples_and_written_answers_are_cut_too(measured):
    tokenizer = word_tokenizer(WORDS)
    tokenizer.eos_token = WORDS[0]
    more = {"model": EvaluatedModel(tiny_gpt2(), tokenizer, "gpt2"), "fewshot": 2, "limit": 3, "batch_size": 1}
    rolling = measured("tiny_rolling", **more)
    assert rolling["protocol"]["fewshot"] == 0 and rolling["protocol"]["cut"] == 0 and "absent" in rolling
    for context, cut in ((60, 0), (12, 3)):
        written = measured("tiny_written", context=context, **more)
        assert written["protocol"]["fewshot"] == 2 and written["protocol"]["cut"] == cut


def test_a_prompt_is_read_whole_or_said_to_be_cut(measured):
    """Not only 1,024 tokens of it, where the model takes more."""
    model, lengths = EvaluatedModel(tiny_gpt2(n_positions=2048), word_tokenizer(WORDS), "gpt2"), []
    model.model.register_forward_pre_hook(
        lambda module, given, more: lengths.append(given[0].shape[1]), with_kwargs=True
    )
    more = {"model": model, "fewshot": 19, "limit": 2, "batch_size": 1}
    whole = measured("tiny_last_word", **more)
    assert whole["protocol"]["context"] == 2048 and whole["protocol"]["cut"] == 0 and 100 < max(lengths) < 2048
    lengths.clear()
    part = measured("tiny_last_word", context=60, **more)
    assert part["protocol"]["context"] == 60 and part["protocol"]["cut"] == 2 and max(lengths) == 60
    assert part["samples"]["log perplexity"] != whole["samples"]["log perplexity"]


def test_groups_are_tested_on_the_examples_of_their_tasks(measured):
    whole, part = (measured(name) for name in ("tiny_group", "tiny_choices"))
    assert whole["metrics"]["acc"] == part["metrics"]["acc"] and whole["samples"]["acc"] == part["samples"]["acc"]
    assert whole["examples"] == 20


def test_other_files_are_other_tasks(tasks, tmp_path):
    folder = shutil.copytree(tasks[0], tmp_path / "tasks")
    own = StandardOptions(include_path=str(folder))
    before = fingerprint_of_tasks(own)
    assert before == fingerprint_of_tasks(StandardOptions(include_path=str(tasks[0])))
    with (folder / "questions.jsonl").open("a") as file:
        file.write("\n")
    assert fingerprint_of_tasks(own) != before


def test_they_are_part_of_an_evaluation(tasks, world, tmp_path):
    standard = StandardOptions(include_path=str(tasks[0]), limit=10)
    more = {"suite": "brief", "standard_tasks": ("tiny_choices",), "standard": standard, "names": ("a", "b")}
    task = by_name(run(world, tmp_path, "gpt2", "other", **more), "tiny_choices")
    assert task["metric"] == "lm-eval" and not task["errors"]
    assert task["models"]["a"]["examples"] == 10
    accuracy = next(quantity for quantity in task["quantities"] if quantity["name"] == "acc")
    assert set(accuracy["difference"]) >= {"value", "low", "high", "p_value", "significant"}
    assert "tiny_choices" in (tmp_path / "table.md").read_text()


def test_refusals(monkeypatch):
    own = ("hellaswag",)
    for names, given, message in (
        (("no_such_task",), {}, "`standard_tasks` must be tasks that lm-eval knows, got 'no_such_task'"),
        (("arc_*",), {}, r"`standard_tasks` must be tasks that lm-eval knows, got 'arc_\*'"),
        (own, {"limit": 0}, "`limit` must be at least 1, got 0"),
        (own, {"max_length": 1}, "`max_length` must be at least 2, got 1"),
        (own, {"fewshot": -1}, "`fewshot` must not be negative, got -1"),
        (own, {"include_path": "/no/such"}, "`include_path` must be a folder of task files"),
        ((), {"fewshot": 5}, "`fewshot` is for `standard_tasks`, got 5 and no such task"),
        ((), {"limit": 10}, "`limit` is for `standard_tasks`, got 10 and no such task. Name some, or leave it out"),
        ((), {"include_path": "tasks"}, "`include_path` is for `standard_tasks`, got 'tasks' and no such task"),
    ):
        with pytest.raises(ValueError, match=message):
            check_standard_tasks(names, StandardOptions(**given))
    check_standard_tasks((), StandardOptions())
    check_standard_tasks(NAMES, StandardOptions())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'`standard_tasks` need lm-eval. Install it with pip install "rigpt-hf\[lm'):
        check_standard_tasks(NAMES, StandardOptions())


@pytest.mark.full
def test_the_standard_names_are_known_among_all(monkeypatch):
    from lm_eval.tasks.manager import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", TaskManager)
    _manager_of.cache_clear()
    check_standard_tasks(NAMES, StandardOptions())
    _manager_of.cache_clear()
