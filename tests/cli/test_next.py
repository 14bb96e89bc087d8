"""Every verb ends with what may come next, as a line that can be typed."""

import importlib
import inspect
import re
import shlex

import pytest
import typer
from transformers import ApertusConfig, ApertusForCausalLM

from rigpt_hf.cli import VERBS, app
from rigpt_hf.command_line import hyphenated, typed_again
from tests.cli.test_documented_lines import BRIEFLY, laid_out, place  # noqa: F401  fixtures


COMMANDS = typer.main.get_command(app).commands
# By verb, what is typed, and how the next line begins; exit codes are those of what was found.
CASES = {
    "demo": [("demo", "rigpt generate runs/demo/model TEXT")],
    "convert": [("convert openai-community/gpt2 out", "rigpt finetune out TEXT")],
    "export": [("export my-rigpt out --to llama", "rigpt verify my-rigpt out")],
    "verify": [
        ("verify A B --random-tokens", "rigpt generate B TEXT"),
        ("verify A openai-community/gpt2 --random-tokens", "rigpt diff A openai-community/gpt2"),
        ("verify odd odd --random-tokens", "rigpt verify odd odd --random-tokens --seed 1"),
    ],
    "info": [("info A", "rigpt rotate A OUTPUT")],
    "families": [("families", "rigpt info SOURCE")],
    "pretrain": [
        ("pretrain --config smoke --output-dir out --prepare-only", "rigpt pretrain --config smoke --output-dir out"),
        ("pretrain --config smoke --output-dir out", "rigpt generate out/model TEXT"),
    ],
    "finetune": [("finetune A text.txt out", "rigpt generate out TEXT")],
    "rotate": [("rotate A out", "rigpt verify A out")],
    "canonicalize": [("canonicalize A out", "rigpt verify A out")],
    "merge": [("merge A B out", "rigpt evaluate out --against A")],
    "transport": [("transport my-adapter out --from A --to B", "rigpt generate B TEXT --adapter out")],
    "charges": [
        ("charges A", "rigpt charges A --measure"),
        ("charges A --measure --time 0.02", "rigpt charges A --measure --"),
        ("charges A --measure --time 0.02 --weight-decay 0.5", "rigpt c"),
    ],
    "fingerprint": [
        ("fingerprint A", "rigpt fingerprint A --output A.fingerprint"),
        ("fingerprint A openai-community/gpt2 B", "rigpt diff A B"),
        ("fingerprint A --output known/A.fingerprint", "rigpt identify MODEL --against known"),
        ("fingerprint known/A.fingerprint", "rigpt identify MODEL --against known"),
        ("fingerprint A openai-community/gpt2 --output several", "rigpt identify MODEL --against several"),
    ],
    "identify": [
        ("identify B --against known", "rigpt diff A B"),
        ("identify openai-community/gpt2 --against known", "rigpt fingerprint MODEL --output known/MODEL.fingerprint"),
    ],
    "diff": [
        ("diff A B", "rigpt transport ADAPTER OUTPUT --from A --to B"),
        ("diff A A", "rigpt verify A A"),
        ("diff A openai-community/gpt2", "rigpt identify openai-community/gpt2 --against FINGERPRINTS"),
    ],
    "quantize": [("quantize A out --calibrate text.txt", "rigpt generate out TEXT")],
    "prune": [("prune A out --neurons 0.2 --calibrate text.txt", "rigpt finetune out TEXT")],
    "evaluate": [
        ("evaluate A --output out", "rigpt card A --results out/results.json"),
        ("evaluate openai-community/gpt2 --output other", "rigpt generate openai-community/gpt2 TEXT"),
    ],
    "card": [("card A", "rigpt publish A OWNER/NAME --dry-run")],
    "publish": [("publish my-rigpt me/my-rigpt --dry-run --private", "rigpt publish my-rigpt me/my-rigpt --private")],
    "lab": [
        ("lab", "rigpt lab gpt"),
        ("lab gauge-fixing --output 'a b'", "rigpt lab gpt --output 'a b'"),
        ("lab lifting --output 'a b'", "rigpt lab local-frames --output 'a b'"),
    ],
}


def test_all_verbs_are_here():
    """But for the one whose output is a text."""
    assert {verb.__name__ for verb in VERBS} == {*CASES, "generate"}


def made(pictures) -> None:
    for path in pictures:
        path.parent.mkdir(exist_ok=True)
        path.touch()


@pytest.mark.parametrize("verb", CASES)
def test_a_verb_names_the_next_step(verb, place, rigpt, monkeypatch):  # noqa: F811
    # What takes long and says nothing of what comes next.
    monkeypatch.setattr("rigpt_hf.demo.run.run_demo", lambda options: None)
    monkeypatch.setattr(
        importlib.import_module("rigpt_hf.cli.lab"), "make", lambda name, output, seed, seen, console: made(seen)
    )
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ApertusForCausalLM(ApertusConfig(**sizes, **heads)).save_pretrained("odd")  # which loads, and does not convert
    if verb == "identify":
        rigpt("fingerprint", "A", "--output", "known/A.fingerprint")
    for line, following in CASES[verb]:
        words = shlex.split(line)
        briefly = [word for key, more in BRIEFLY.items() if {*key.split()} <= {*words} for word in more]
        code, out, err = rigpt(*words, *briefly)
        assert code in (0, 1), err
        named = re.findall(r"^(?:Next: |      )(rigpt .*)", out, re.MULTILINE)
        assert out.count("Next: ") == 1 and named[0].startswith(following), out
        assert out.rstrip().splitlines()[-1].removeprefix("Next: ").strip() == named[-1] or verb == "rotate", out
        for _, then, *others in map(shlex.split, named):
            COMMANDS[then].make_context(then, hyphenated(others))


def test_quiet_verbs_name_none(place, rigpt):  # noqa: F811
    for line in ("verify A A --random-tokens", "publish my-rigpt me/x --dry-run", "lab", "charges A", "fingerprint A"):
        assert rigpt(*line.split(), "--quiet") == (0, "", ""), line


def test_a_measurement_that_failed_is_tried_again(place, rigpt, monkeypatch):  # noqa: F811
    """By the same line."""
    monkeypatch.setattr("rigpt_hf.evaluation.harness.results.failures", lambda results: ["perplexity"])
    code, out, _ = rigpt("evaluate", "A", "--suite", "brief.yaml", "--device", "cpu", "--output", "a b")
    assert code == 1
    assert out.rstrip().splitlines()[-1] == "Next: rigpt evaluate A --suite brief.yaml --device cpu --output 'a b'"


def test_the_words_that_were_typed_hold_no_token(rigpt):
    token = "hf_" + "aB3" * 12
    rigpt("info", "gone", "--revision", token)
    assert typed_again("info") == ["rigpt", "info", "gone", "--revision", "[token]"]


EXAMPLES = [
    pytest.param(line, id=line[:60])
    for verb in VERBS
    for line in re.findall(r"^ *(.*\b(?:rigpt|rigpt_hf\.cli) .+)$", inspect.getdoc(verb) or "", re.MULTILINE)
    if line.startswith(("rigpt ", "accelerate ", "cat "))
]


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_in_the_help_is_a_line_that_parses(line):
    words = shlex.split(line.rpartition("|")[2])
    verb, *others = words[words.index("rigpt" if "rigpt" in words else "rigpt_hf.cli") + 1 :]
    COMMANDS[verb].make_context(verb, hyphenated(others))


def test_every_help_has_an_example_and_all_are_looked_at(done):
    shown = {verb.__name__: done(verb.__name__, "--help", columns=300) for verb in VERBS}
    lines = [line.strip() for out in shown.values() for line in out.splitlines() if line.startswith("      ")]
    typed = [line for line in lines if re.match(r"(rigpt|accelerate|cat) ", line)]
    assert sorted(typed) == sorted(example.values[0] for example in EXAMPLES)
    assert all(re.search(rf"(rigpt|cli) {verb}\b", "\n".join(out.splitlines()[3:])) for verb, out in shown.items())
