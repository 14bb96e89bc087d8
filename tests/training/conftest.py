"""Shards for tests of pretraining; a tokenizer, a small model and options for tests of fine-tuning."""

import os

import pytest
import torch

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.text.tokenizer import train_tokenizer
from rigpt_hf.training import loop, records
from rigpt_hf.training.finetune_options import FinetuneOptions
from rigpt_hf.training.options import RunOptions
from tests.models import tiny_config
from tests.training.runs import CALM, PEAK, make_data, pretrain
from tests.training.texts import TEXT


@pytest.fixture(scope="session", autouse=True)
def saved_curves():
    """The function that draws curves, which runs do without, as without the peak: both are half of a short one."""
    encoded = records.encoded
    with pytest.MonkeyPatch.context() as patched:
        # A kill spares the memory of the operating system, and a busy disk would take minutes.
        patched.setattr(os, "fsync", lambda descriptor: None)
        patched.setattr(records, "encoded", lambda figure: b"")
        patched.setattr(loop, "peak_flops", lambda device, dtype: PEAK)
        yield encoded


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The folder of a few shards of tokens."""
    return make_data(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="session")
def straight(data, saved_curves, tmp_path_factory):
    """The folder of a run of 12 steps, with dropout, that nothing happened to; to look at and to copy."""
    output = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(records, "encoded", saved_curves)
        pretrain(data, output, diagnose_steps=6)
    return output


@pytest.fixture(scope="session")
def plain(data, tmp_path_factory):
    """The same without dropout, so that the number of processes and the parts of a batch do not show; and tracked."""
    output = tmp_path_factory.mktemp("plain") / "run"
    pretrain(data, output, **CALM, report_to=RunOptions().report_to)
    return output


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([TEXT], 280)


@pytest.fixture
def with_template(tokenizer):
    """Sets the chat template for one test."""

    def use(template):
        tokenizer.chat_template = template
        return tokenizer

    yield use
    tokenizer.chat_template = None


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    end = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    config = tiny_config(vocab_size=len(tokenizer), num_hidden_layers=2, **end)
    RiGPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def options(model_folder, tmp_path):
    """Options for a few quick steps on TEXT, changed by the arguments."""

    def make(content=TEXT, name="data.txt", **changes):
        path = tmp_path / name
        path.write_text(content)
        defaults = {"max_steps": 12, "per_device_train_batch_size": 4, "context_length": 24, "learning_rate": 1e-2}
        defaults |= {"cpu": True, "quiet": True}
        places = {"model": str(model_folder), "data": str(path), "output_dir": str(tmp_path / "out")}
        return FinetuneOptions(**(places | defaults | changes))

    return make
