"""Folders that verbs and programs read: no code of theirs runs, nothing from outside comes along."""

import ast
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from rigpt_hf.conversion import convert_model, export_model
from tests.cli.conftest import in_one_line
from tests.cli.folders import copied, edit, tensors
from tests.conversion.sources import stock_model
from tests.models import tiny_model
from tests.processes import ROOT


def calls(model: Path, good: Path, text: Path, out: Path):
    """Every verb and program that reads a model, on one."""
    yield from (
        ("rigpt", "convert", model, out),
        ("rigpt", "export", model, out),
        ("rigpt", "verify", model, good),
        ("rigpt", "verify", good, model),
        ("rigpt", "verify", model, model, "--text", text),
        ("rigpt", "info", model),
        ("rigpt", "rotate", model, out),
        ("rigpt", "canonicalize", model, out),
        ("rigpt", "diff", model, good),
        ("rigpt", "merge", good, model, out),
        ("rigpt", "charges", model),
        ("rigpt", "card", model),
        ("rigpt", "publish", model, "me/x", "--dry-run"),
        ("rigpt", "demo", "--model", model, "--output", out),
        ("convert.py", model, out, "--cpu"),
        ("pretrain", "--data", text, "--init-from", model, "--output-dir", out),
        ("pretrain", "--data", text, "--tokenizer", model, "--output-dir", out),
        ("finetune", model, text, out),
    )


AUTO = {"AutoConfig": "foreign.Config", "AutoModel": "foreign.Model", "AutoModelForCausalLM": "foreign.Model"}
FOREIGN = {
    "of a configuration": ("config.json", {"model_type": "foreign", "auto_map": AUTO}),
    "of a model": ("config.json", {"model_type": "clip", "auto_map": AUTO}),
    "of a tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": ["foreign.Tokenizer", "foreign.Tokenizer"]}},
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_code_from_a_folder_never_runs(kind, folders, answer, tmp_path):
    from rigpt_hf.evaluation.models import evaluated
    from rigpt_hf.publishing.rotation_view import load_subjects

    model, out, canary = copied(folders / "rigpt", tmp_path / "model"), tmp_path / "out", tmp_path / "canary"
    (model / "foreign.py").write_text(f"open({str(canary)!r}, 'w').close()\nraise SystemExit(3)\n")
    (model / "custom_generate").mkdir()
    shutil.copy(model / "foreign.py", model / "custom_generate" / "generate.py")
    file, values = FOREIGN[kind]
    edit(model, file, **values)
    refused = 0
    for call in calls(model, folders / "rigpt", folders / "text.txt", out):
        code, _, err = answer(*call)
        assert not canary.exists(), call
        refused += code == 2
        assert code == 2 or kind == "of a tokenizer", call
        if kind == "of a configuration" and call[1] in ("verify", "info", "rotate"):
            assert "asks for code from its folder" in err and "convert_model" in err, err
        shutil.rmtree(out, ignore_errors=True)
    assert refused >= 3
    for load in (evaluated, load_subjects):
        try:
            load(str(model))
        except ValueError as error:
            assert "\n" not in str(error)
        assert not canary.exists()


def test_no_other_place_calls_an_auto_class():
    """And each that is there says that no code is to run."""
    seen = 0
    for path in (
        path for room in ("rigpt_hf", "training", "evaluation", "model_cards") for path in (ROOT / room).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            named = ast.unparse(node.func)
            if not (named.endswith(("from_pretrained", "from_config")) and ("Auto" in named or path.stem == "read")):
                continue
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert path.relative_to(ROOT) == Path("rigpt_hf/checkpoints/read.py"), f"{path}: {named}"
            assert keywords["trust_remote_code"] == "False", f"{path}: {named}"
            seen += 1
    assert seen >= 5


class Canary:
    """What a pickle runs when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_never_run(folders, answer, tmp_path):
    model, canary, out = copied(folders / "rigpt", tmp_path / "model"), tmp_path / "canary", tmp_path / "out"
    torch.save(Canary(canary), model / "training_args.bin")
    assert answer("rigpt", "rotate", model, out)[0] == 0
    (model / "model.safetensors").unlink()
    for content in (
        lambda path: path.write_bytes(pickle.dumps(Canary(canary))),
        lambda path: torch.save({"a": Canary(canary)}, path),
    ):
        content(model / "pytorch_model.bin")
        for call in calls(model, folders / "rigpt", folders / "text.txt", tmp_path / "other"):
            if call[1] == "info" or "--tokenizer" in call:  # which read no weights
                continue
            code, _, err = answer(*call)
            assert code == 2 and "weights_only" not in err and "Traceback" not in err, (call, err)
        assert not canary.exists()


def test_files_that_are_links_out_of_the_folder_do_not_come_along(folders, answer, tmp_path):
    model = copied(folders / "gpt2", tmp_path / "model")
    (tmp_path / "secret").write_text("SECRET_KEY")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/own.jinja").write_text("{{ 1 }}")
    (model / "additional_chat_templates/.env").write_text("SECRET_KEY")
    for name in ("chat_template.jinja", "additional_chat_templates/x.jinja"):
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(tmp_path / "secret")
        line = in_one_line(answer("rigpt", "convert", model, tmp_path / "out"))
        assert "`SOURCE` must hold itself what comes along, got" in line and name in line
        assert {path.name for path in tmp_path.iterdir()} == {"model", "secret"}
        (model / name).unlink()
    assert answer("rigpt", "convert", model, tmp_path / "out")[0] == 0
    texts = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert texts["own.jinja"] == b"{{ 1 }}" and ".env" not in texts


def test_adapters_are_said_to_be_adapters(folders, answer, tmp_path):
    model = copied(folders / "rigpt", tmp_path / "model")
    (model / "adapter_config.json").write_text("{}")
    for problem in ("holds an adapter (`adapter_config.json`) beside a model", "without adapter_model.safetensors"):
        line = in_one_line(answer("rigpt", "publish", model, "me/x", "--dry-run"))
        assert problem in line
        (model / "config.json").unlink(missing_ok=True)
    stock = stock_model("gpt2", torch.float32)
    with_layers = stock_model("gpt2", torch.float32)
    with_layers.add_adapter(peft.LoraConfig(r=2))
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    for function, wrapped in (
        (convert_model, peft.get_peft_model(stock, peft.LoraConfig(r=2))),
        (convert_model, with_layers),
        (export_model, adapted),
    ):
        with pytest.raises(ValueError, match="must be a model without adapters, got a .*merge_and_unload"):
            function(wrapped)


def test_a_path_that_is_wrong_is_answered_before_anything_is_imported(folders, tmp_path):
    """In a process of its own, which must not import torch."""
    script = (
        "import sys; from rigpt_hf.cli import app; from rigpt_hf.command_line import execute; "
        "code = execute(app, 'rigpt', sys.argv[1:]); sys.exit(code + 10 * ('torch' in sys.modules))"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    out, here = tmp_path / "out", "no such folder"
    for words, message in (
        (("rotate", tmp_path / "mistyped", out), here),
        (("verify", "mistyped", "mistyped"), here),
        (("evaluate", "me/mistyped"), here),
        (("convert", folders / "gpt2", tmp_path / "full"), "must be empty or absent"),
        (("export", folders / "text.txt", out), "which is a file"),
        (("diff", tmp_path / "link", folders / "rigpt"), "a link that leads nowhere"),
    ):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert time.perf_counter() - begun < 20


@pytest.mark.parametrize("name", ["modle", "runs/modle", "place/none/modle"])
def test_a_name_that_is_like_a_folder_beside_is_a_slip_of_spelling(rigpt, tmp_path, monkeypatch, name):
    """Said before anything of the Hub, which is asked where the name could be an id."""
    for folder in ("model", "runs/model", "runs/other"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    line = in_one_line(rigpt("verify", name, name))
    near = "there is 'model'" if name == "modle" else "there is 'runs/model'"
    assert "no such folder. Look at the spelling" in line and "other" not in line
    assert (near in line) is ("none" not in name)
    assert ("As an id: the Hub " in line) is (name == "modle")


@pytest.mark.full
def test_names_of_wrapped_models_lose_what_stands_in_front(folders, answer, caplog, tmp_path):
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        for source, call in (("rigpt", "rotate"), ("gpt2", "convert")):
            model, out = copied(folders / source, tmp_path / "model"), tmp_path / "out"
            tensors(lambda stored, prefix=prefix: {f"{prefix}{name}": part for name, part in stored.items()})(model)
            caplog.clear()
            assert answer("rigpt", call, model, out)[0] == 0
            assert f"begin with {prefix!r}, which is left out" in caplog.text
            assert not any(name.startswith(prefix) for name in load_file(out / "model.safetensors"))
            assert answer("rigpt", "verify", model, folders / source)[0] == 0
            shutil.rmtree(out)


def test_outputs_that_cannot_be_are_refused_by_the_program_too(folders, answer, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "link"):
        for words in (("convert.py", folders / "gpt2", out, "--cpu"), ("rigpt", "convert", folders / "gpt2", out)):
            line = in_one_line(answer(*words))
            assert "Errno" not in line and str(out) in line
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "empty")
    for out in (tmp_path / "linked", tmp_path / "[red]x[" / "b]"):
        assert answer("convert.py", folders / "gpt2", out, "--cpu")[0] == 0
        assert (out / "model.safetensors").is_file()
    assert (tmp_path / "linked").is_symlink()
