"""Refusals and remarks in the words of whoever typed: what it was, the rule, the value, and what to do."""

import io
import logging
import re
import shutil

import pytest
import torch

from rigpt_hf.terminal import Console, notices_after, notices_held, say_notices
from tests.checkpoints.folders import save_tokenizer
from tests.cli.conftest import in_one_line
from tests.cli.folders import tensors
from tests.models import tiny_config, tiny_model


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("merge A A out --learn 5", "`--learn` needs a text to learn on, got 5 without one. Add `--text FILE`."),
        ("merge A A out --learn 0", "`--learn` must be a number of steps, at least 1, got 0. Take 400, or leave it"),
        ("merge A A out --learn 5 --text T --unaligned", "got 5 beside `--unaligned`. Leave one of the two out."),
        ("transport v.safetensors out --from A", "got `--from` 'A' alone. Add `--to MODEL`, or `--transformation"),
        ("transport v.safetensors out --to A", "got `--to` 'A' alone. Add `--from MODEL`, or `--transformation"),
        ("transport v.safetensors out", "got none of these. Add `--from MODEL --to MODEL`, or `--transformation FILE"),
        ("transport v.safetensors out --transformation T", "got 'T' without one. Add `--from MODEL`."),
        ("pretrain --config smok", "`--config` must be a readable YAML file or a preset, got 'smok': No such file or"),
        ("pretrain --config smok", "Did you mean 'smoke'? See rigpt pretrain --help"),
        ("pretrain --max-steps 0", "`--max-steps` must be at least 1, got 0. Take 500, as without it."),
        ("publish A me/x", "The token of `hf auth login` or `HF_TOKEN` must be an access token of the Hub, got none."),
        ("publish gone me/x", "`FOLDER` must be the folder of a saved model, got 'gone': no such folder. Check the"),
        ("publish gone me/x --space", "got 'gone': no such folder. Check the path."),
        ("publish gone me/x --dry-run", "got 'gone': no such folder. Check the path."),
        (
            "finetune A gone.txt out",
            "`DATA` must be a file, a folder or the id of a data set, got 'gone.txt': no such",
        ),
        ("finetune A gone.txt out", "no such file. Check the path."),
        ("finetune A T out --eval-share 2", "`--eval-share` must be at least 0 and below 1, got 2.0. Take 0.05, as"),
        ("finetune A T out --lora 0", "`--lora` must be at least 1, got 0. Take another, or leave it out."),
        ("convert T out", "one file: a .gguf, or a checkpoint of nanoGPT or llama2.c, got 'T'"),
    ],
)
def test_a_refusal_says_what_was_typed_and_what_to_do(words, said, rigpt, folders, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rigpt_hf.publishing.hub.get_token", lambda: None)
    (tmp_path / "A").symlink_to(folders / "rigpt")
    (tmp_path / "T").write_text("a b c")
    save_file({"blocks.0.hook_resid_post": torch.ones(2, 24)}, tmp_path / "v.safetensors")
    line = in_one_line(rigpt(*words.split()))
    assert said in line and "None" not in line, line
    assert not (tmp_path / "out").exists()


def test_a_card_in_a_copy_is_known_to_be_one(rigpt, folders, tmp_path):
    """What is advised first works."""
    shutil.copytree(folders / "rigpt", tmp_path / "model")
    assert rigpt("card", tmp_path / "model")[0] == 0
    assert "Pass `--force` to replace it." in in_one_line(rigpt("card", tmp_path / "model"))
    assert rigpt("card", tmp_path / "model", "--force")[0] == 0
    shutil.copytree(tmp_path / "model", tmp_path / "copy", copy_function=shutil.copyfile)
    for force in ((), ("--force",)):
        line = in_one_line(rigpt("card", tmp_path / "copy", *force))
        assert "changed or copied there. Move or remove it yourself, then say this again." in line
    (tmp_path / "copy/README.md").unlink()
    assert rigpt("card", tmp_path / "copy")[0] == 0


def test_verify_says_what_was_read(done, folders):
    for options, inputs in (
        ((), "of the documentation of Python"),
        (("--text", folders / "text.txt"), f"of {folders / 'text.txt'}"),
        (("--random-tokens",), "random, seed 0"),
    ):
        out = " ".join(done("verify", folders / "rigpt", folders / "rigpt", *options).split())
        assert f"tokens, {inputs}, sha256" in out and "given" not in out


def test_a_notice_that_is_held_twice_is_said_once(caplog):
    logger = logging.getLogger("rigpt_hf.conversion")
    with notices_after(logger.name):
        with notices_held(logger.name) as kept:
            logger.warning("kept")
        with notices_held(logger.name):
            logger.warning("dropped")
        say_notices(kept)
        assert not caplog.records
    assert [record.message for record in caplog.records] == ["kept"] and logger.propagate and not logger.handlers


def test_an_export_says_once_that_its_head_is_another(rigpt, tmp_path, caplog, monkeypatch):
    """And who only lists what would be published hears nothing of it."""
    monkeypatch.chdir(tmp_path)
    tiny_model(embedding_size=tiny_config().hidden_size).save_pretrained("model")
    save_tokenizer(tmp_path / "model")

    def unlike_a_gain(stored):
        weight = stored["model.project_out.weight"]
        weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    tensors(unlike_a_gain)(tmp_path / "model")
    caplog.clear()
    assert rigpt("export", "model", "out", "--to", "auto")[0] == 0
    said = [record.message for record in caplog.records if "table of its own" in record.message]
    assert len(said) == 1, caplog.records
    caplog.clear()
    assert rigpt("publish", "model", "me/x", "--space", "--dry-run")[0] == 0
    assert not [record for record in caplog.records if "table of its own" in record.message]


def test_sentences_are_wrapped_on_a_terminal_alone(monkeypatch):
    from rigpt_hf.cli import common

    sentence = "word " * 40
    for is_terminal, lines in ((True, 3), (False, 1)):
        file = io.StringIO()
        console = Console(file=file, width=80, force_terminal=is_terminal)
        monkeypatch.setattr(common, "Console", lambda console=console: console)
        common.say([sentence])
        assert len(file.getvalue().splitlines()) == lines
        assert not re.search(r"\bwor$|\bwo$|\bw$", file.getvalue(), re.MULTILINE)
