"""What is read from folders by every verb and program: never code, and damage ends in one line that names the file."""

import ast
import io
import json
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from rigpt_hf.conversion import convert_model, export_model
from tests.checkpoints.folders import save_tokenizer
from tests.cli.conftest import in_one_line
from tests.conversion.sources import stock_model
from tests.models import tiny_model
from tests.processes import ROOT


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A RiGPT, the same in shards, and a stock model, each with a tokenizer; and a text."""
    place = tmp_path_factory.mktemp("folders")
    tiny_model().save_pretrained(place / "rigpt")
    tiny_model().save_pretrained(place / "shards", max_shard_size=20_000)
    tiny_model(tie_word_embeddings=False).save_pretrained(place / "rigpt-untied")
    stock_model("gpt2", torch.float32).save_pretrained(place / "gpt2")
    for folder in list(place.iterdir()):
        save_tokenizer(folder)
    (place / "text.txt").write_text("\n\n".join("a b c a a b c" + n * " a" for n in range(200)))
    return place


@pytest.fixture
def answer(rigpt, monkeypatch, capsys, tmp_path):
    """Runs a verb or program on folders below `tmp_path`, with `yes` on standard input."""

    def run(program, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
        if program == "rigpt":
            return rigpt(*arguments)
        code = main_of(program)([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def main_of(program: str):
    from rigpt_hf.training import finetune, pretrain
    from training import convert

    return {"convert.py": convert.main, "pretrain": pretrain.main, "finetune": finetune.main}[program]


def copied(source: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(source, to)
    return to


def edit(folder: Path, name: str, **values) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


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


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[20] ^= 0xFF
    (folder / "model.safetensors").write_bytes(content)


def tensors(change):
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        stored = load_file(path)
        save_file(change(stored) or stored, path, metadata={"format": "pt"})

    return damage


def put(name: str, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def shard_map(change):
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": change(json.loads(path.read_text())["weight_map"])}))

    return damage


def grown(stored: dict) -> None:
    name = "model.embed_tokens.weight"
    stored[name] = torch.cat([stored[name], torch.zeros(30, stored[name].shape[1])])


def spoilt(stored: dict) -> None:
    stored["model.embed_tokens.weight"][3:6] = float("nan")


def lost(stored: dict) -> None:
    del stored[UP]


UP = "model.layers.1.mlp.up_proj.weight"
# What is wrong: the folder, the damage, and what the line says.
DAMAGED = {
    "cut weights": ("rigpt", cut, ("model.safetensors'", "cut or damaged")),
    "flipped header": ("rigpt", flip, ("model.safetensors'", "cut or damaged")),
    "cut configuration": ("rigpt", put("config.json", '{"a":'), ("config.json'", "no JSON at line 1")),
    "no configuration": ("rigpt", lambda folder: (folder / "config.json").unlink(), ("has no `config.json`",)),
    "empty configuration": ("rigpt", put("config.json", ""), ("config.json'", "no JSON at line 1, column 1")),
    "not UTF-8": ("rigpt", put("config.json", b'{"\xff": 1}'), ("config.json'", "not UTF-8 at byte 2")),
    "two tables that are tied": (
        "rigpt-untied",
        lambda folder: edit(folder, "config.json", tie_word_embeddings=True),
        ("`lm_head.weight` differs from `model.embed_tokens.weight`", "tie_word_embeddings"),
    ),
    "a list": ("rigpt", put("config.json", "[1]"), ("config.json'", "a list and no object")),
    "deep": ("rigpt", put("config.json", '{"a":' * 99999 + "1" + "}" * 99999), ("config.json'", "nested too deeply")),
    "generation": ("rigpt", put("generation_config.json", "{"), ("generation_config.json'", "no JSON")),
    "a wrong type": (
        "rigpt",
        lambda f: edit(f, "config.json", num_hidden_layers="two"),
        ("`num_hidden_layers`", "two"),
    ),
    "an odd map": ("rigpt", lambda f: edit(f, "config.json", auto_map=-1), ("whose 'auto_map' is a dict, got -1",)),
    "an odd dtype": ("rigpt", lambda f: edit(f, "config.json", dtype=1.5), ("whose 'dtype' is a str, got 1.5",)),
    "odd codes": (
        "rigpt",
        lambda f: edit(f, "config.json", quantization_config="x"),
        ("'quantization_config' is",),
    ),
    "absurd tokens of a stock model": (
        "gpt2",
        lambda f: edit(f, "config.json", vocab_size=10**30),
        ("`vocab_size` must be at most 2147483647, got 1e+30",),
    ),
    "codes": (
        "rigpt",
        lambda f: edit(f, "config.json", quantization_config={"quant_method": 7}),
        ("`quantization_config`",),
    ),
    "complex numbers": ("rigpt", tensors(lambda w: w.update({UP: w[UP].to(torch.complex64)})), (UP, "C64")),
    "whole numbers": ("rigpt", tensors(lambda w: w.update({UP: w[UP].long()})), (UP, "I64")),
    "a long value": (
        "rigpt",
        lambda f: edit(f, "config.json", hidden_act="x" * 9999),
        ("`hidden_act` must be one of",),
    ),
    "too many layers": (
        "rigpt",
        lambda f: edit(f, "config.json", num_hidden_layers=5000),
        ("`num_hidden_layers`", "5000"),
    ),
    "absurd layers": (
        "rigpt",
        lambda f: edit(f, "config.json", num_hidden_layers=10**9),
        ("`num_hidden_layers`", "1e+09"),
    ),
    "absurd tokens": (
        "rigpt",
        lambda f: edit(f, "config.json", vocab_size=10**9),
        ("embed_tokens", "[61, 32], not [1000"),
    ),
    "a lost tensor": ("rigpt", tensors(lost), ("lacks", UP)),
    "a tensor too many": (
        "rigpt",
        tensors(lambda stored: stored.update({"model.more.weight": torch.ones(2)})),
        ("has no place for `model.more.weight`",),
    ),
    "another shape": (
        "rigpt",
        tensors(grown),
        ("another shape to `model.embed_tokens.weight` ([91, 32], not [61, 32])",),
    ),
    "no numbers": ("rigpt", tensors(spoilt), ("`model.embed_tokens.weight`", "3 of 61 rows, the first of them row 3")),
    "no index": ("shards", put("model.safetensors.index.json", "{"), ("index.json'", "no JSON")),
    "no map": ("shards", put("model.safetensors.index.json", '{"a": 1}'), ("index.json'", "`weight_map`")),
    "a map of numbers": ("shards", shard_map(lambda files: dict.fromkeys(files, 3)), ("index.json'", "`weight_map`")),
    "a file above": ("shards", shard_map(lambda files: dict.fromkeys(files, "../x")), ("own folder", "'../x'")),
    "a file anywhere": (
        "shards",
        shard_map(lambda files: dict.fromkeys(files, "/etc/passwd")),
        ("own folder", "passwd"),
    ),
    "a lost shard": (
        "shards",
        lambda folder: next(folder.glob("model-00002*")).unlink(),
        ("names the shard 'model-00002", "is missing"),
    ),
    "an adapter beside": (
        "rigpt",
        put("adapter_config.json", "{}"),
        ("an adapter (`adapter_config.json`). Merge it",),
    ),
    "an adapter's link": (
        "rigpt",
        lambda folder: (folder / "adapter_config.json").symlink_to("nothing"),
        ("an adapter (`adapter_config.json`). Merge it",),
    ),
    "an adapter alone": (
        "rigpt",
        lambda f: (put("adapter_config.json", "{}")(f), (f / "config.json").unlink()),
        ("an adapter (`adapter_config.json`). Merge it",),
    ),
}
# Of the library, or of Python.
UPSTREAM = ("Traceback", "Error:", "ignore_mismatched", "Errno", "Exception", "x" * 100, "Validation error")


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_named_in_one_line(damage, folders, answer, tmp_path):
    source, spoil, words = DAMAGED[damage]
    model, out = copied(folders / source, tmp_path / "model"), tmp_path / "out"
    spoil(model)
    read = [("rotate", model, out), ("export", model, out), ("verify", model, model), ("card", model)]
    for call in read:
        line = in_one_line(answer("rigpt", *call))
        if call[0] != "card":
            assert all(word in line for word in words), line
            assert not any(word in line for word in UPSTREAM) and len(line) < 700, line
    line = in_one_line(answer("finetune", model, folders / "text.txt", out))
    assert not any(word in line for word in UPSTREAM), line
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_weights_of_a_stock_model_are_no_booleans(folders, answer, tmp_path):
    """Masks of old files are, under names that end like those of biases."""
    model, out, name = copied(folders / "gpt2", tmp_path / "model"), tmp_path / "out", "transformer.h.1.ln_1.bias"
    tensors(lambda w: w.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}))(model)
    assert answer("rigpt", "convert", model, tmp_path / "good")[0] == 0
    tensors(lambda w: w.update({name: w[name].bool()}))(model)
    for call in (("convert", model, out), ("verify", model, model), ("demo", "--model", model, "--output", out)):
        line = in_one_line(answer("rigpt", *call))
        assert name in line and "floating point" in line and not out.exists(), line


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
    for file in ("config.json", "model.safetensors"):
        line = in_one_line(answer("rigpt", "publish", model, "me/x", "--dry-run"))
        assert "holds an adapter (`adapter_config.json`)" in line and "hf upload REPO" in line
        (model / file).unlink()
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
        (("convert", folders / "text.txt", out), "which is a file"),
        (("diff", tmp_path / "link", folders / "rigpt"), "a link that leads nowhere"),
    ):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert time.perf_counter() - begun < 20


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
