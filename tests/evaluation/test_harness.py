"""The harness: what it measures is what the metrics give, and it fails in one line."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from rigpt_hf.evaluation.harness import report, runner, tables
from rigpt_hf.evaluation.harness import results as results_module
from rigpt_hf.evaluation.harness.suites import PACKAGED, TextOptions, load_suite
from rigpt_hf.evaluation.harness.tables import number
from rigpt_hf.evaluation.harness.texts import load_texts
from rigpt_hf.evaluation.measures.cloze import last_words
from rigpt_hf.evaluation.measures.multiple_choice import endings
from rigpt_hf.evaluation.measures.perplexity import perplexity
from tests.evaluation.small import WORDS, by_name, run, save
from tests.evaluation.toys import tiny_gpt2


def test_a_conversion_beside_its_source(evaluation):
    output, results = evaluation
    files = [".rigpt-written.json", "cache", "report.html", "results.json", "table.md"]
    assert sorted(path.name for path in output.iterdir()) == files
    assert json.loads((output / "results.json").read_text()) == results
    assert results["schema"] == 1 and results["baseline"] == "GPT-2"
    assert not any(task["errors"] for task in results["tasks"])
    loss = next(q for q in by_name(results, "perplexity")["quantities"] if q["name"] == "loss")
    # The same function: the same loss, and a difference that nobody calls one.
    assert loss["models"]["RiGPT"]["value"] == pytest.approx(loss["models"]["GPT-2"]["value"], rel=1e-5)
    assert loss["models"]["RiGPT"]["low"] < loss["models"]["RiGPT"]["value"] < loss["models"]["RiGPT"]["high"]
    assert abs(loss["difference"]["value"]) < 1e-4
    errors = by_name(results, "invariance")["quantities"][0]["models"]
    assert errors["RiGPT"]["value"] < 1e-11 and errors["GPT-2"]["value"] > 1e-2
    frames = by_name(results, "quantization_robustness")["models"]
    assert list(frames["RiGPT"]["rounded"]) == ["identity", "hadamard"]
    assert frames["GPT-2"]["protocol"]["converted"] is True


def test_results_say_what_was_run_and_no_path_of_the_machine(evaluation, world):
    output, results = evaluation
    assert results["models"]["RiGPT"]["source"] == "rigpt" and results["models"]["RiGPT"]["type"] == "rigpt"
    assert len(results["models"]["RiGPT"]["sha256"]) == 64 and results["versions"]["torch"] == torch.__version__
    assert results["suite"]["text"]["documents"] == 12
    for name in ("results.json", "table.md", "report.html"):
        text = (output / name).read_text()
        assert str(world) not in text and str(world.parent) not in text, name
    assert "samples" not in json.dumps(results["tasks"])


def test_numbers_are_those_of_the_metrics(evaluation, world):
    _, results = evaluation
    rows = load_texts(load_suite(str(world / "suite.yaml")).text).rows
    expected = perplexity(tiny_gpt2(), rows, context=32)
    found = by_name(results, "perplexity")["models"]["GPT-2"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-9) and found["tokens"] == 12 * 32


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "img", "path", "use", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open and self.open.pop() != tag:
                pass


def test_the_report_needs_nothing_else(evaluation):
    output, results = evaluation
    page = (output / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    names = [tag for tag, _ in tags.seen]
    assert names.count("svg") == 5 and names.count("section") == len(results["tasks"])
    assert "script" not in names and "link" not in names and "img" not in names
    for tag, attributes in tags.seen:
        for key in ("src", "href", "xlink:href"):
            value = attributes.get(key, "#")
            assert value.startswith("#"), f"<{tag}> loads {value!r}"
    assert not tags.open


def test_perplexity_has_the_interval_of_the_loss_and_no_test_of_its_own(evaluation):
    quantities = {each["name"]: each for each in by_name(evaluation[1], "perplexity")["quantities"]}
    perplexity, loss = quantities["perplexity"], quantities["loss"]
    assert "difference" in loss and "difference" not in perplexity
    for name in ("RiGPT", "GPT-2"):
        for key in ("value", "low", "high"):
            expected = math.exp(loss["models"][name][key])
            assert perplexity["models"][name][key] == pytest.approx(expected, rel=1e-9)
        assert loss["models"][name]["low"] < loss["models"][name]["high"]


def test_the_table_has_a_row_for_every_number(evaluation):
    output, results = evaluation
    lines = [line for line in (output / "table.md").read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + sum(len(task["quantities"]) for task in results["tasks"])
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_what_fails_is_one_line_and_the_rest_is_kept(world, tmp_path, monkeypatch):
    original = runner.measure

    def scarce(task, *given):
        if task.metric == "outliers":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB.")
        if task.metric == "invariance":
            raise RuntimeError("broken\nin two lines")
        if task.metric == "quantization_robustness":
            raise IndexError("index 7 is out of range")
        return original(task, *given)

    monkeypatch.setattr(runner, "measure", scarce)
    results = run(world, tmp_path / "out", batch_size=4)
    assert by_name(results, "outliers")["errors"] == {
        "RiGPT": "out of memory with `batch_size` 4. Give a smaller `batch_size`, or a smaller `context` or "
        "`prompt` in the suite, and run again."
    }
    assert by_name(results, "invariance")["errors"] == {"RiGPT": "RuntimeError: broken in two lines"}
    assert by_name(results, "quantization_robustness")["errors"] == {"RiGPT": "IndexError: index 7 is out of range"}
    assert by_name(results, "perplexity")["models"]["RiGPT"]["loss"] > 0
    assert "broken in two lines" in (tmp_path / "out/report.html").read_text()
    assert "failed: out of memory" in (tmp_path / "out/table.md").read_text()
    monkeypatch.setattr(runner, "measure", original)
    monkeypatch.setattr(runner.writing, "write", lambda *given: None)
    assert not any(task["errors"] for task in run(world, tmp_path / "out")["tasks"])


def test_a_tokenizer_that_does_not_fit_is_one_line(world, tmp_path):
    save(tmp_path / "model", tiny_gpt2(vocab_size=20))
    (tmp_path / "suite.yaml").write_text(f"text: {{source: {tmp_path}/text.txt}}\ntasks: [{{metric: perplexity}}]")
    (tmp_path / "text.txt").write_text("".join(WORDS[1:40]))
    suite = str(tmp_path / "suite")
    results = run(world, tmp_path / "out", str(tmp_path / "model"), suite=suite)
    (line,) = by_name(results, "perplexity")["errors"].values()
    assert "must give token ids from 0 to 19" in line and "Is this its tokenizer?" in line and "\n" not in line
    # Text begins where the tokenizer can.
    result = by_name(run(world, tmp_path / "other", suite=suite), "perplexity")["models"]["RiGPT"]
    assert result["protocol"]["bos"] is True and result["tokens"] == 39


def test_suites_that_are_refused(tmp_path):
    for text, message in (
        ("tasks: [{metric: bleu}]", "`metric` must be one of cloze, .*perplexity, .*, got 'bleu'"),
        ("tasks: []", "`tasks` must name at least one measurement"),
        ("tasks: [{metric: perplexity}, {metric: perplexity}]", "`tasks` must have different names"),
        ("tasks: [{metrik: perplexity}]", "`tasks` must hold some of metric, .*, got 'metrik'"),
        ("tasks: [{name: x}]", "`tasks` is incomplete"),
        ("tasks: [{metric: perplexity, documents: 0}]", "`documents` of perplexity must be at least 1, got 0"),
        ("text: {sauce: docs}\ntasks: [{metric: perplexity}]", "`text` must hold some of source, .*, got 'sauce'"),
        ("tusks: 1\ntasks: [{metric: perplexity}]", "`suite` must hold description, text and tasks, got 'tusks'"),
        ("tasks: {", "`suite` must be YAML"),
        ("nothing: here", "`suite` must hold a list of `tasks`"),
    ):
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_suite(str(tmp_path / "s.yaml"))


def test_packaged_suites_are_whole():
    assert PACKAGED == ("core", "full")
    for name in PACKAGED:
        suite = load_suite(name)
        assert {task.metric for task in suite.tasks} == set(load_suite("core").tasks[i].metric for i in range(7))
    with pytest.raises(ValueError, match="`suite` must be one of core, full or a YAML file, got 'huge'"):
        load_suite("huge")


def test_refusals_of_an_evaluation(world, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    save(tmp_path / "reversed", tiny_gpt2(), WORDS[::-1])
    ids = "`text` must be words where tokenizers differ, got the token ids of 'tokens"
    for message, given, more in (
        (r"`output` must be absent, empty or an earlier evaluation.*'thesis.tex'", (tmp_path / "mine",), {}),
        ("`output` must be a folder, got the file", (tmp_path / "mine/thesis.tex",), {}),
        (ids, (tmp_path / "out", "rigpt", str(tmp_path / "reversed")), {}),
        # Names that would be taken for markup.
        *(
            ("`names` must be letters, digits, spaces", (tmp_path / "out",), {"names": (name, "b")})
            for name in ("<b>x</b>", "[red]", "a$b$", "_hidden", "", "a|b")
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(world, *given, **more)


def test_only_what_an_evaluation_wrote_is_replaced(evaluation, world, tmp_path, monkeypatch):
    """Neither a person's file, there before or appearing meanwhile, nor an edited one is lost, even with `force`."""
    results, output = evaluation[1], tmp_path / "out"
    refused = r"`output` can be replaced only if all in it was written by this program and left as it was.* with {}\."
    monkeypatch.setattr(report, "as_html", lambda results: "the page")  # pictures take long

    def write(folder):
        results_module.write(results, folder, results_module.check_files(folder))

    write(output)
    whole = {path.name for path in output.iterdir()}
    # What it wrote itself is replaced, or this would prove nothing.
    stamp = (output / "report.html").stat().st_mtime_ns
    write(output)
    assert (output / "report.html").stat().st_mtime_ns > stamp
    for name in ("results.json", "table.md", "report.html"):
        for folder in (output, tmp_path / name):  # edited; of somebody else
            folder.mkdir(exist_ok=True)
            (folder / name).write_text("my own page")
            for force in (False, True):
                with monkeypatch.context() as patched, pytest.raises(ValueError, match=refused.format(name)):
                    patched.setattr(runner, "load_texts", None)  # refused before anything is read
                    run(world, folder, suite="brief", force=force)
            assert (folder / name).read_text() == "my own page"
            (folder / name).unlink()
        (folder / name).write_text("it appeared while models were measured")
        with pytest.raises(ValueError, match=refused.format(name)):
            results_module.write(results, folder, {})
        assert [path.name for path in folder.iterdir()] == [name] and "appeared" in (folder / name).read_text()
    # A page that appears while pictures are drawn.
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="report.html', which has appeared"):
        patched.setattr(tables, "as_markdown", lambda results: str((output / "report.html").write_text("my own page")))
        write(output)
    assert (output / "report.html").read_text() == "my own page" and not list(output.glob("*.partial"))
    (output / "report.html").unlink()
    write(output)
    assert {path.name for path in output.iterdir()} == whole and len(whole) == 4


def test_a_folder_that_takes_files_needs_no_more(tmp_path, monkeypatch):
    """As one of several people, in a folder in which nobody may make others; what takes none is refused first."""
    touch, output = Path.touch, tmp_path / "mine"
    output.mkdir()

    def refuse(path, *arguments, **options):
        if path.parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        touch(path, *arguments, **options)

    monkeypatch.setattr(Path, "touch", refuse)
    assert runner.check_output(output) == {} and not list(output.iterdir())
    for place in (tmp_path / "other", Path("/proc/other")):
        with pytest.raises(ValueError, match="`output` must be a place that can be written to, got .*other/results"):
            runner.check_output(place)


def test_of_two_evaluations_at_once_the_later_refuses(world, tmp_path, monkeypatch):
    """Of other models, into one folder that had nothing; and what the first has written stays."""
    measure, output = runner._run, tmp_path / "out"

    def meanwhile(*arguments, **options):
        monkeypatch.setattr(runner, "_run", measure)
        run(world, output, suite="brief", model="other")
        return measure(*arguments, **options)

    monkeypatch.setattr(runner, "_run", meanwhile)
    with pytest.raises(
        ValueError, match="`output` must stay as it is while this runs.*results.json, which has appeared"
    ):
        run(world, output, suite="brief")
    assert json.loads((output / "results.json").read_text())["models"]["RiGPT"]["source"] == "other"


def test_part_of_a_suite_has_all_measurements_of_fewer_documents(world, tmp_path):
    whole, part = load_suite("full"), load_suite("full").part(0.25)
    assert [task.arguments for task in part.tasks] == [task.arguments for task in whole.tasks]
    # How much text there is, is known where it is read.
    assert part.text == whole.text and part.fraction == 0.25
    assert [(task.documents, task.examples) for task in part.tasks] == [
        (None if task.documents is None else task.documents // 4, task.examples // 4) for task in whole.tasks
    ]
    assert whole.part(1.0) == whole
    for fraction in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="`fraction` must be above 0 and at most 1"):
            whole.part(fraction)
    results = run(world, tmp_path / "out", fraction=0.5, suite="brief")
    assert results["suite"]["fraction"] == 0.5 and results["suite"]["text"]["documents"] == 6
    assert "a share of 0.5 of it, on 6 documents" in (tmp_path / "out/table.md").read_text()
    assert not any(task["errors"] for task in results["tasks"])


def test_questions_are_made_of_documents():
    text = "The cat that sat near the other cat was larger than what we had called the small cat. More follows here."
    (question,) = last_words([text, "Too short."], 5)
    assert question.target == " cat" and question.prompt.endswith("the small")
    documents = [" ".join(f"{letter}{index}" for index in range(40)) for letter in "abcdefg"]
    questions = endings(documents, 5)
    assert len(questions) == 5 and {each.answer for each in questions} <= {0, 1, 2, 3}
    for each in questions:
        letter = each.prompt[0]
        assert [choice[1] == letter for choice in each.choices].index(True) == each.answer
        assert sum(choice[1] == letter for choice in each.choices) == 1


def test_texts_are_the_same_every_time_and_say_where_they_are_from(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"Document {index}."}) for index in range(9)))
    texts = load_texts(TextOptions(source=str(tmp_path / "a.jsonl"), documents=5, split="train"))
    assert texts.rows == [f"Document {index}." for index in range(5)] and texts.source["source"] == "a.jsonl"
    assert texts.source == load_texts(TextOptions(source=str(tmp_path / "a.jsonl"), documents=5, split="train")).source
    with pytest.raises(ValueError, match="`documents` must be at least 1"):
        load_texts(TextOptions(documents=0))


def test_numbers_are_shown_with_the_digits_that_mean_something():
    shown = {3.14159: "3.142", 31.4159: "31.42", 0.0314159: "0.03142", 31415.9: "31,416", 3.1e-7: "3.1e-07", 0: "0"}
    assert {value: number(value) for value in shown} == shown
    assert number(None) == "–" and number(5e8, "bytes") == "500 MB"


def test_a_model_that_is_broken_does_not_cost_the_other(world, tmp_path):
    broken = tiny_gpt2()
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_fc.weight.fill_(3e38)  # finite, and its outputs are not
    save(tmp_path / "broken", broken)
    results = run(world, tmp_path / "out", against=str(tmp_path / "broken"), suite="brief", names=("RiGPT", "broken"))
    assert by_name(results, "perplexity")["models"]["RiGPT"]["loss"] > 0
    loss = next(entry for entry in by_name(results, "perplexity")["quantities"] if entry["name"] == "loss")
    assert set(loss["models"]) == {"RiGPT"} and not loss.get("difference")
    assert "must give finite losses, got nan" in by_name(results, "perplexity")["errors"]["broken"]
    for name in ("results.json", "table.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "NaN" not in text and ">nan<" not in text, name


def test_windows_fit_into_the_smallest_model(world, tmp_path):
    save(tmp_path / "short", tiny_gpt2(n_positions=9))
    results = run(world, tmp_path / "out", against=str(tmp_path / "short"), suite="brief")
    assert not any(task["errors"] for task in results["tasks"])
    for name in ("RiGPT", "GPT-2"):
        assert by_name(results, "perplexity")["models"][name]["protocol"]["context"] == 9
        assert by_name(results, "throughput")["models"][name]["protocol"]["prompt"] == 8
