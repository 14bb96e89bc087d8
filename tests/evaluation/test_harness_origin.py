"""Results say where they are from, replace no others, and name the models that a metric does not apply to."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import CodeGenConfig, CodeGenForCausalLM, MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

from rigpt_hf.cli import app
from rigpt_hf.conversion import convert_model
from rigpt_hf.evaluation.harness import runner
from rigpt_hf.evaluation.harness.cache import Cache, code_fingerprint
from rigpt_hf.evaluation.harness.results import build, commit
from rigpt_hf.evaluation.harness.runner import EvaluateOptions, EvaluationJob, check_same_models, one_line
from rigpt_hf.evaluation.harness.suites import Suite, Task, TextOptions
from rigpt_hf.evaluation.harness.tasks import measure, measure_together
from rigpt_hf.evaluation.harness.texts import Texts
from rigpt_hf.evaluation.measure import NotApplicable
from rigpt_hf.evaluation.models import EvaluatedModel
from tests.evaluation.toys import tiny_gpt2


def git(folder, *arguments: str) -> str:
    who = ["-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A repository with the folders of this one, and a second commit that changes the model only."""
    folder = tmp_path / "checkout"
    for name in ("rigpt_hf/model.py", "evaluation/harness/results.py", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1\n")
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    (folder / "rigpt_hf/model.py").write_text("2\n")
    git(folder, "commit", "-q", "-a", "-m", "second")
    return folder


def test_the_commit_is_that_of_the_whole_code(checkout):
    here = checkout / "evaluation/harness/results.py"
    head, first = git(checkout, "rev-parse", "--short", "HEAD"), git(checkout, "rev-parse", "--short", "HEAD~")
    assert commit(here) == head != first
    (checkout / "README.md").write_text("2\n")
    (checkout / "rigpt_hf/new.py").write_text("not tracked\n")
    assert commit(here) == head
    (checkout / "rigpt_hf/model.py").write_text("3\n")
    assert commit(here) == head + "+"
    git(checkout, "add", "rigpt_hf/model.py")
    assert commit(here) == head + "+"
    (checkout / "rigpt_hf/model.py").unlink()
    assert commit(here) == head + "+"


def test_outside_of_a_checkout_there_is_no_commit(checkout, tmp_path):
    assert commit(tmp_path / "nowhere/results.py") is None
    installed = checkout / "venv/results.py"
    installed.parent.mkdir()
    installed.write_text("1\n")
    assert commit(installed) is None
    git(checkout, "add", "venv/results.py")
    assert commit(installed) is not None


def test_results_of_other_models_are_not_replaced(tmp_path):
    a, b, c = ("a" * 64, "b" * 64, "c" * 64)
    check_same_models(tmp_path, {"model": a})
    (tmp_path / "results.json").write_text(json.dumps({"models": {"model": {"sha256": a}, "baseline": {"sha256": b}}}))
    # The same models by any name, and more of them.
    check_same_models(tmp_path, {"model": a, "baseline": b})
    check_same_models(tmp_path, {"x": a, "y": b, "z": c})
    rule = "`output` must hold results of the same weights in the same roles or none, got"
    wrong = [
        ({"model": c, "baseline": b}, "model"),
        ({"model": a}, "baseline"),
        ({"model": a, "baseline": c}, "baseline"),
    ]
    # In each other's place every difference would have another sign.
    wrong.append(({"model": b, "baseline": a}, "model"))
    for hashes, role in wrong:
        with pytest.raises(ValueError, match=f"{rule} .* with other weights as {role}. .*`force=True`"):
            check_same_models(tmp_path, hashes)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=f"{rule} .* with a results.json that cannot be read"):
        check_same_models(tmp_path, {"model": a})


def test_without_an_output_each_pair_of_models_has_a_folder_of_its_own(tmp_path):
    for name in ("runs/smoke/model", "tuned"):
        (tmp_path / name).mkdir(parents=True)
    smoke, tuned = (str(tmp_path / name) for name in ("runs/smoke/model", "tuned"))
    folders = {
        EvaluateOptions(smoke).folder: "smoke",
        EvaluateOptions(smoke, tuned).folder: "smoke-against-tuned",
        EvaluateOptions(tuned, smoke).folder: "tuned-against-smoke",
        EvaluateOptions(tuned, "me/gpt2").folder: "tuned-against-me-gpt2",
    }
    assert folders == {Path("runs/evaluation", name): name for name in folders.values()} and len(folders) == 4
    assert EvaluateOptions(smoke, tuned, output=tmp_path).folder == tmp_path


def codegen() -> CodeGenForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
    return CodeGenForCausalLM(CodeGenConfig(**sizes, n_positions=64, n_ctx=64)).eval()


SUITE = """
text: {{source: {source}, documents: 6, window: 17}}
tasks:
  - {{metric: perplexity, arguments: {{context: 16}}}}
  - {{metric: invariance, arguments: {{draws: 1, dtypes: [float64]}}}}
  - {{metric: quantization_robustness, arguments: {{context: 16, schemes: [W8A8], frames: [identity, hadamard]}}}}
  - {{metric: throughput, arguments: {{prompt: 4, new_tokens: 2, turns: 3, memory: false}}}}
"""


def test_what_does_not_apply_is_no_failure(world, tmp_path):
    """A model of a family that nobody converts, beside one whose frames can be turned."""
    codegen().save_pretrained(tmp_path / "codegen/model")
    (tmp_path / "suite.yaml").write_text(SUITE.format(source=world / "tokens.bin"))
    models = [str(tmp_path / "codegen/model"), "--against", str(world / "rigpt"), "--names", "CodeGen,RiGPT"]
    where = ["--suite", str(tmp_path / "suite.yaml"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    done = CliRunner().invoke(app, ["evaluate", *models, *where])
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert re.fullmatch("[0-9a-f]{64}", results["code"]["sha256"]) and results["code"]["sha256"] == code_fingerprint()
    assert [each["source"] for each in results["models"].values()] == ["codegen", "rigpt"]
    tasks = {task["task"]: task for task in results["tasks"]}
    assert not any(task["errors"] for task in tasks.values())
    reason = r"`model_type='codegen'` cannot be converted"
    (whole,), (frame,) = tasks["invariance"]["absent"], tasks["quantization_robustness"]["absent"]
    assert (whole["model"], whole["what"]) == ("CodeGen", "") and reason in whole["reason"]
    assert (frame["model"], frame["what"]) == ("CodeGen", "frame hadamard") and reason in frame["reason"]
    # Nothing is absent of the other model, nor of what applies to both.
    assert list(tasks["invariance"]["models"]) == ["RiGPT"]
    rounded = {name: list(each["rounded"]) for name, each in tasks["quantization_robustness"]["models"].items()}
    assert rounded == {"CodeGen": ["identity"], "RiGPT": ["identity", "hadamard"]}
    assert tasks["perplexity"]["absent"] == tasks["throughput"]["absent"] == []
    assert tasks["throughput"]["arguments"]["prompt"] == 4
    table, page = ((tmp_path / "out" / name).read_text() for name in ("table.md", "report.html"))
    assert f"| invariance |  |  | not applicable: {reason}" in table
    assert f"| quantization_robustness | frame hadamard |  | not applicable: {reason}" in table
    assert "Not applicable to CodeGen: " in page and "Not applicable to CodeGen (frame hadamard): " in page
    assert "failed" not in table and "Not applicable to RiGPT" not in page


def test_only_other_frames_of_a_model_without_any_are_none():
    texts = Texts([list(range(12))] * 2, {})
    task = Task("quantization_robustness", arguments={"frames": ["hadamard"], "schemes": ["W8A8"]})
    with pytest.raises(NotApplicable, match="codegen"):
        measure(task, EvaluatedModel(codegen()), texts, 2)
    assert list(measure(task, EvaluatedModel(tiny_gpt2()), texts, 2)["rounded"]) == ["hadamard"]


def test_models_without_a_cache_of_keys_do_not_take_turns():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    mamba = EvaluatedModel(MambaForCausalLM(MambaConfig(**sizes)).eval())
    rigpt = EvaluatedModel(convert_model(tiny_gpt2()).eval())
    task = Task("throughput", arguments={"prompt": 4, "new_tokens": 2, "turns": 3, "memory": False})
    subjects = {"mamba": mamba, "rigpt": rigpt}
    found = measure_together(task, {str(index): each for index, each in enumerate(subjects.values())})
    assert list(found["models"]) == ["1"]
    line = "MambaForCausalLM takes no `past_key_values`, with which decoding is timed."
    assert found["absent"] == {"0": line}
    with pytest.raises(NotApplicable, match="takes no `past_key_values`"):
        measure_together(task, {"0": mamba})
    suite = Suite("s", TextOptions(), (task,))
    texts = Texts([[1]], {"source": "t", "documents": 1, "sha256": "", "revision": None})
    hashes = dict.fromkeys(subjects, "0" * 64)
    cells = [EvaluationJob(task.name, tuple(subjects), "k", None, True)]
    results = build(SimpleNamespace(batch_size=2), suite, texts, subjects, hashes, cells, {"k": found}, {})
    (entry,) = results["tasks"]
    assert entry["absent"] == [{"model": "mamba", "what": "", "reason": line}] and not entry["errors"]
    assert list(entry["models"]) == ["rigpt"]


def test_what_does_not_apply_is_kept_as_a_result(tmp_path):
    def refuse(**given):
        raise NotApplicable("nothing to say")

    cache = Cache(tmp_path)
    cell = EvaluationJob("t", ("m",), cache.key(a=1), refuse)
    assert runner._run([cell], cache, Console(quiet=True), 2) == {}
    assert cache.get(cell.key) == {"not applicable": "nothing to say"}

    def fail(**given):
        raise ValueError("wrong")

    other = EvaluationJob("t", ("m",), cache.key(a=2), fail)
    assert runner._run([other], cache, Console(quiet=True), 2) == {other.key: "wrong"}


def test_lines_of_failures_have_no_path_of_the_machine():
    assert one_line(ValueError("no /home/somebody/data/x.txt, in\ntwo lines")) == "no x.txt, in two lines"
    assert one_line(ValueError("`a/b` and 3 tokens/s")) == "`a/b` and 3 tokens/s"


def test_one_process_prints_and_the_options_reach_the_evaluation(monkeypatch, tmp_path):
    results, given = {"models": {"model": {}}, "tasks": []}, []
    tiny_gpt2().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(runner, "evaluate", lambda options, console: given.append(options) or results)
    for is_main, more in ((True, []), (False, ["--force"])):
        monkeypatch.setattr("accelerate.PartialState", lambda: SimpleNamespace(is_main_process=is_main))  # noqa: B023
        done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "model"), "--output", str(tmp_path / "out"), *more])
        assert done.exit_code == 0, done.output
        assert ("Report in" in done.output and "  model" in done.output) is is_main
        assert is_main or not done.output.strip()
    assert [options.force for options in given] == [False, True]


def test_help_says_what_a_document_is():
    shown = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "100", "TERM": "dumb"}).output
    text = re.sub(r"[\s│|]+", " ", shown)
    assert "A .txt file is one document unless < endoftext > stands" in text and "row of JSONL or parquet" in text
