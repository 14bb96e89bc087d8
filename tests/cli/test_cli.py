"""The command line as a person meets it: what it prints, what it refuses, and how it ends."""

import inspect
import json
import re
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import rigpt_hf
from rigpt_hf import cli
from rigpt_hf.checkpoints.read import quiet_loading
from rigpt_hf.conversion.families import ARCHITECTURES
from tests.checkpoints.folders import save_tokenizer
from tests.cli.conftest import in_one_line
from tests.conversion.programs import nanogpt
from tests.models import randomise_, tiny_model
from tests.processes import run


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2)
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    randomise_(GPT2LMHeadModel(config), 0).save_pretrained(folder)
    return folder


def test_convert_verify_info_export_and_back(done, gpt2_folder, tmp_path):
    assert "equal up to rounding" in done("convert", gpt2_folder, tmp_path / "rigpt")
    assert json.loads((tmp_path / "rigpt" / "certificate.json").read_text())["passed"]
    out = " ".join(done("verify", gpt2_folder, tmp_path / "rigpt").split())
    assert "equal up to rounding" in out and "loss on random tokens" in out
    assert f"{gpt2_folder} (GPT2LMHeadModel)" in out and f"{tmp_path / 'rigpt'} (RiGPTForCausalLM)" in out
    out = done("info", tmp_path / "rigpt", "--json", tmp_path / "info.json")
    facts = json.loads((tmp_path / "info.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "rigpt")
    assert facts["parameters"] == model.num_parameters() and facts["config"]["model_type"] == "rigpt"
    assert facts["dimension"] == sum(one["dimension"] for one in facts["frames"]) > 0
    assert facts["axes"]["model.embed_tokens.weight"]["shape"] == [*model.model.embed_tokens.weight.shape]
    for expected in ("stream", "O(24)", "head_qk", "model.layers.*.self_attn.q_proj.weight", "stream:covector"):
        assert expected in out
    assert f"{AutoModelForCausalLM.from_pretrained(tmp_path / 'rigpt').num_parameters():,} parameters" in out
    for name, options in {"back": (), "named": ("--to", "gpt2"), "auto": ("--to", "auto")}.items():
        done("export", tmp_path / "rigpt", tmp_path / name, *options)
        assert json.loads((tmp_path / name / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    done("verify", gpt2_folder, tmp_path / "back")


def test_names_of_parameters_are_whole_where_there_is_little_room(done, tmp_path):
    tiny_model(post_norm=True, qk_norm=True).save_pretrained(tmp_path / "rigpt")
    out = done("info", tmp_path / "rigpt", "--json", tmp_path / "info.json", columns=80)
    names = json.loads((tmp_path / "info.json").read_text())["axes"]
    assert max(map(len, names)) > 36 and all(f" {name} " in out for name in names)
    assert "…" not in out and max(len(line) for line in out.splitlines() if line[:1] in ("│", "┏", "└")) <= 80


def test_an_export_goes_where_it_can(rigpt, gpt2_folder, done, tmp_path, caplog):
    done("convert", gpt2_folder, tmp_path / "rigpt", "--dropout", "none")
    caplog.clear()
    done("export", tmp_path / "rigpt", tmp_path / "auto", "--to", "auto")
    assert "is 'gpt2': it is exact with tied embeddings" in caplog.records.pop().message and not caplog.records
    line = in_one_line(rigpt("export", tmp_path / "rigpt", tmp_path / "other", "--to", "llama"))
    assert "no counterpart in Llama" in line and line.rstrip().endswith(
        "Try `--to gpt2`, `--to gpt_neo` or `--to opt`."
    )
    config = json.loads((tmp_path / "rigpt" / "config.json").read_text())
    assert config["converted_from"] == "gpt2"
    for record in (None, "gpt5"):
        (tmp_path / "rigpt" / "config.json").write_text(json.dumps(config | {"converted_from": record}))
        line = in_one_line(rigpt("export", tmp_path / "rigpt", tmp_path / "other"))
        assert "`--to` must be named for a model that has" in line and ("'gpt5'" in line) is (record is not None)
        assert "Take 'gpt2', 'gpt_neo' or 'opt', which have its options" in line
    assert not (tmp_path / "other").exists()


def test_a_file_of_another_program_is_converted_too(rigpt, done, tmp_path):
    path, *_ = nanogpt(tmp_path / "source")
    out = " ".join(done("convert", path, tmp_path / "rigpt").split())
    assert "equal up to rounding" in out and f"{path} (GPT2LMHeadModel)" in out
    line = in_one_line(rigpt("convert", path, tmp_path / "other", "--revision", "main"))
    assert "`--revision` belongs to a folder or an id, got 'main'" in line
    (tmp_path / "text.txt").write_text("once upon a time there was a file")
    line = in_one_line(rigpt("convert", tmp_path / "text.txt", tmp_path / "other"))
    assert "`SOURCE` must be a folder, an id on the Hub, or one file" in line


@pytest.mark.full
def test_families_are_shown(done, tmp_path):
    """In the width of a terminal no name of a class or an option is cut."""
    out = done("families", "--json", tmp_path / "families.json", columns=80)
    facts = json.loads((tmp_path / "families.json").read_text())
    assert {row["name"] for row in facts["families"]} == {*ARCHITECTURES} and facts["refused"]
    assert all({*row["parameters"]} == {"tied", "untied"} for row in facts["families"])
    for expected in (*ARCHITECTURES, "nothing", "gpt2", "bitnet", "nanoGPT"):
        assert expected in out
    for entry in ARCHITECTURES.values():
        for expected in (entry.class_name, *entry.refused):
            assert all(word in out for word in expected.split()), expected
    assert max(map(len, out.splitlines())) <= 80


def test_verify_tells_different_models_apart(rigpt, gpt2_folder, tmp_path):
    other = GPT2LMHeadModel.from_pretrained(gpt2_folder)
    with torch.no_grad():
        other.transformer.h[0].ln_1.weight[3] *= 1.01
    other.save_pretrained(tmp_path / "other")
    code, out, _ = rigpt("verify", gpt2_folder, tmp_path / "other")
    assert code == 1 and "NOT EQUAL" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("convert", "no/such/folder", "OUT"),
            "`SOURCE` must be the folder of a saved model or the id of a repository",
        ),
        (("convert", "GPT2", "GPT2"), "`OUTPUT` must not replace what is read"),
        (("convert", "GPT2", "OUT", "--dtype", "int8"), "`--dtype` must be one of float64, float32"),
        (("convert", "GPT2", "OUT", "--dropout", "half"), "`--dropout` must be one of"),
        (("export", "GPT2", "OUT"), "`SOURCE` must be a RiGPT"),
        (("verify", "GPT2", "GPT2", "--text", "missing.txt"), "`--text` must be a file"),
        (("convert", "GPT2", "OUT", "--device", "nowhere"), "`--device` must be one that PyTorch can use here"),
        (("convert", "GPT2", "OUT", "--device", "meta"), "such as cpu, got 'meta': it holds no numbers"),
        (("diff", "GPT2", "GPT2", "--device", "meta"), "such as cpu, got 'meta': it holds no numbers"),
        (("convert", "GPT2", "FULL"), "or pass `--force` to replace it"),
        (("info", "no/such/folder"), "`SOURCE` must be the folder of a saved model or the id"),
        (("verify", "GPT2", "OTHER"), "`B` must be a folder with `model.safetensors` or"),
        (("verify", "GPT2", "GPT2", "--text", "TEXT", "--random-tokens"), "`--text` and `--random-tokens` exclude"),
        (("verify", "GPT2", "TEXT"), "`B` must be a folder, an id on the Hub, or one file"),
        (("verify", "GPT2", "GPT2", "--text", "TEXT"), "`--text` needs a tokenizer, and"),
        (("convert", "GPT2"), "Missing argument 'output'. See rigpt convert --help"),
        (("convert", "--no-such-option"), "No such option: --no-such-option. See rigpt convert --help"),
        (("finetune", "--lr"), "No such option: --lr (Possible options: --learning-rate, --lr-scheduler-type). See"),
        (("finetune", "--epochs"), "No such option: --epochs (Possible options: --num-train-epochs). See"),
        (("finetune", "--sede"), "No such option: --sede (Possible options: --seed). See"),
        (("convret", "GPT2", "OUT"), "No such command 'convret'. Did you mean 'convert'?"),
        (("demo", "--steps", "many"), "Invalid value for '--steps'"),
        (("demo", "--steps", "0"), "`--steps` must be at least 1, got 0"),
        (("demo", "--text", "a.txt", "--model", "GPT2"), "`--text` is what a model is trained on"),
        (("demo", "--output", "FULL"), "`--output` must be empty or absent"),
        (("demo", "--output", "FULL", "--force"), "`--output` can be replaced only if all in it was written by"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_ends_in_one_line(rigpt, gpt2_folder, tmp_path, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep me")
    (tmp_path / "text.txt").write_text("Some text.")
    GPT2Config(vocab_size=62).save_pretrained(tmp_path / "other")
    places = {"GPT2": gpt2_folder, "OUT": tmp_path / "out", "FULL": tmp_path / "full"}
    places |= {"OTHER": tmp_path / "other", "TEXT": tmp_path / "text.txt"}
    assert message in in_one_line(rigpt(*(places.get(argument, argument) for argument in arguments)))
    assert (tmp_path / "full" / "precious.txt").read_text() == "keep me"
    assert not (tmp_path / "out").exists()
    assert (gpt2_folder / "model.safetensors").is_file()


def test_a_message_is_printed_as_it_is(rigpt, monkeypatch):
    def fails():
        raise ValueError("`x` must be one of\n  [red] and [batch, seq].")

    monkeypatch.setattr(cli, "app", lambda *arguments, **options: fails())
    assert rigpt("info", "x")[2] == "rigpt: `x` must be one of [red] and [batch, seq].\n"


def test_a_token_in_the_place_of_something_else_is_not_shown(rigpt):
    token = "hf_" + "aB3" * 12
    for arguments in (("info", f"./{token}"), ("rotate", f"./{token}/x", "out"), ("info", f"./a/{token}", "--spin")):
        code, out, err = rigpt(*arguments)
        assert code == 2 and "aB3aB3" not in out + err
        assert ("[token]" in err) is (arguments[-1] != "--spin")


def test_what_nobody_foresaw_ends_in_one_line_too(rigpt, monkeypatch):
    def fails():
        raise KeyError("lost")

    monkeypatch.setattr(cli, "app", lambda *arguments, **options: fails())
    line = in_one_line(rigpt("info", "x"))
    assert "KeyError" in line and "rigpt --debug" in line
    with pytest.raises(KeyError):
        rigpt("--debug", "info", "x")


def test_help_teaches(done):
    for verb in (
        *("demo", "convert", "export", "verify", "info", "families"),
        *("rotate", "canonicalize", "diff", "merge", "transport", "charges"),
    ):
        out = done(verb, "--help")
        assert out.count(f"rigpt {verb}") >= 2, "no example beside the usage line"
        options = re.findall(r"^  (--\S+|-h, --help).*", out, re.MULTILINE)
        assert "-h, --help" in options
        assert " ".join(out.split()).count("[default:") == len(options) - 1, verb


def test_help_cuts_nothing_and_leaves_examples_as_they_are_typed(done):
    out = done("finetune", "--help", columns=80)
    assert "  --gradient-checkpointing / --no-gradient-checkpointing\n" in out and "…" not in out
    assert "\n      rigpt finetune my-rigpt book.txt my-book\n      rigpt finetune" in out
    text, _, options = out.partition("\nArguments:\n")
    assert max(map(len, options.splitlines())) <= 80 < max(map(len, text.splitlines())), "an example is not wrapped"
    assert "\n      rigpt convert nanoGPT/out/ckpt.pt my-rigpt\n" in done("convert", "--help", columns=80)
    assert "\nOptions of rigpt demo alone" in done("demo", "--help", columns=80)


def test_no_verb_at_all_shows_the_help(done):
    out = done()
    assert "convert" in out and "--debug" in out
    assert done("--version") == f"rigpt {rigpt_hf.__version__}\n"


def test_declarations_name_what_there_is():
    """They are plain values, so that the help waits for nothing."""
    from rigpt_hf.cli import arguments, conversion, merging
    from rigpt_hf.conversion.dropout import CHOICES
    from rigpt_hf.conversion.export import TARGETS
    from rigpt_hf.symmetry.merging import METHODS

    def help_of(verb, name):
        return inspect.signature(verb).parameters[name].annotation.__metadata__[0].help

    assert all(getattr(torch, name).is_floating_point for name in arguments.DTYPES)
    for choices, verb, name in (
        (CHOICES, conversion.convert, "dropout"),
        (TARGETS, conversion.export, "to"),
        (METHODS, merging.merge, "method"),
    ):
        assert len(choices) >= 2 and all(choice in help_of(verb, name) for choice in choices)


STOPPED = """
import os, sys
from rigpt_hf.checkpoints import write
from rigpt_hf.cli import app
from rigpt_hf.command_line import execute
write_shards = write.write_shards

def stop(*arguments):
    write_shards(*arguments)
    os.kill(os.getpid(), int(sys.argv[1]))

write.write_shards = stop
sys.exit(execute(app, "rigpt", sys.argv[2:]))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_in_one_line_and_leave_nothing(number, code, gpt2_folder, tmp_path):
    done = run("-c", STOPPED, int(number), "convert", gpt2_folder, tmp_path / "out")
    assert done.returncode == code and list(tmp_path.iterdir()) == []
    assert re.search("^rigpt: stopped (by SIGTERM|from the keyboard)", done.stderr, re.MULTILINE), done.stderr
    assert "Traceback" not in done.stderr


def test_a_text_in_tokens_that_the_model_has_no_row_for(rigpt, tmp_path):
    """By a tokenizer of another model; every verb that measures on a text says so."""
    with quiet_loading():
        tiny_model().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {word: 1000 + index for word, index in content["model"]["vocab"].items()}
    path.write_text(json.dumps(content))
    (tmp_path / "text.txt").write_text("a b c a b")
    source, text = tmp_path / "model", ("--text", tmp_path / "text.txt")
    for call in (
        ("verify", source, source, *text),
        ("merge", source, source, tmp_path / "out", *text),
        ("charges", source, "--measure", *text),
    ):
        line = in_one_line(rigpt(*call))
        assert "`--text` must give tokens that the model has an embedding for, ids from 0 to 60, got 1002 by" in line
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt"}
