"""Checkpoints on disk: complete folders or none, bounded memory, everything beside the weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rigpt_hf.checkpoints.read import local_folder
from rigpt_hf.conversion import Certificate, CertificateError, convert_checkpoint, convert_model, export_checkpoint
from rigpt_hf.conversion import plan as plan_module
from rigpt_hf.conversion.folds import fold_reader

from ..checkpoints.folders import contents, save_tokenizer
from ..processes import ROOT, run
from .sources import SOURCES, over_sources, stock_model


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options):
    model = stock_model(name, dtype)
    model.save_pretrained(folder, **options)
    return model


@over_sources(["gpt2", "gpt2-untied", "llama-tied-biases", "mistral-wide-window", "qwen2-tied"])
def test_a_checkpoint_becomes_what_its_model_becomes(name, tmp_path):
    model = save(name, tmp_path / "source")
    certificate = convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert certificate.passed and Certificate.load(tmp_path / "out") == certificate
    expected = convert_model(model).state_dict()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(stored) == set(expected) - tied
    assert all(torch.equal(tensor, expected[key]) for key, tensor in stored.items())


def test_names_without_the_prefix_and_old_masks_are_understood(tmp_path):
    save("gpt2", tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 40, 40, dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    assert convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False).passed


def test_nothing_is_left_behind_by_a_failed_certificate_or_an_unknown_key(tmp_path, monkeypatch):
    save("gpt2", tmp_path / "source")
    with monkeypatch.context() as patch, pytest.raises(CertificateError, match="not the same function"):
        patch.setattr(
            plan_module, "fold_reader", lambda w, gain, c, scale, *others: fold_reader(w, None, c, 1, *others)
        )
        convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert contents(tmp_path) == {"source"}
    path = tmp_path / "source" / "model.safetensors"
    save_file(load_file(path) | {"transformer.extra.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="`transformer.extra.weight`"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert contents(tmp_path) == {"source"}


def test_a_single_file_comes_before_a_stale_index(tmp_path):
    """As for the library: whoever saves a model once more into its folder leaves the earlier shards."""
    source, out = tmp_path / "source", tmp_path / "out"
    old = save("gpt2", source, max_shard_size=20_000)
    new = stock_model("gpt2", torch.float32)
    with torch.no_grad():
        new.transformer.wte.weight.add_(1)
    save_file(
        {name: tensor for name, tensor in new.state_dict().items() if name != "lm_head.weight"},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert convert_checkpoint(source, out, progress=False).passed
    expected = convert_model(new).state_dict()["model.embed_tokens.weight"]
    stored = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(stored, expected) and not torch.equal(stored, old.transformer.wte.weight)
    next(source.glob("model-0*")).unlink()
    assert convert_checkpoint(source, out, progress=False, force=True).passed


def test_a_tokenizer_that_does_not_come_along_is_named(tmp_path, caplog):
    for files in (("tekken.json",), ("qwen.tiktoken",), ("encoder.json", "vocab.bpe")):
        source, out = tmp_path / files[0] / "source", tmp_path / files[0] / "out"
        save("gpt2", source)
        for file in files:
            (source / file).write_text("{}")
        caplog.clear()
        convert_checkpoint(source, out, progress=False)
        said = [record.getMessage() for record in caplog.records if "did not come along" in record.getMessage()]
        assert len(said) == 1 and all(file in said[0] for file in files)
    caplog.clear()
    save_tokenizer(source)
    convert_checkpoint(source, out, progress=False, force=True)
    assert not any(record.name.startswith("rigpt_hf") for record in caplog.records)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="`source` must be the folder of a saved model or the id.*no such folder"):
        local_folder(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="`revision` names a version on the Hub"):
        local_folder(str(tmp_path), "main")
    save("gpt2", tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has neither.*`convert_model`"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="`gguf_file` must be a file in"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", gguf_file="model.gguf", progress=False)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_a_folder_comes_back_as_a_stock_folder(name, tmp_path):
    save(name, tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "rigpt", progress=False)
    certificate = export_checkpoint(tmp_path / "rigpt", tmp_path / "back", target=name)
    assert certificate.passed and Certificate.load(tmp_path / "back") == certificate
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "back")) is SOURCES[name][0]
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="`source` must be a RiGPT"):
        export_checkpoint(tmp_path / "source", tmp_path / "again", target=name)
    assert contents(tmp_path) == {"source", "rigpt", "back"}


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    save("gpt2", tmp_path / "source")
    command = [ROOT / "training" / "convert.py", tmp_path / "source", tmp_path / "out", "--cpu"]
    done = run(*command, world=2, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal up to rounding") == 1
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) >= 2
    convert_checkpoint(tmp_path / "source", tmp_path / "alone", progress=False)
    together = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    alone = load_file(tmp_path / "alone" / "model.safetensors")
    assert set(together) == set(alone) and all(torch.equal(together[name], alone[name]) for name in alone)
    failing = run(*command, world=2, ACCELERATE_USE_CPU="true")
    assert failing.returncode != 0 and "`OUTPUT_DIR` must be empty or absent" in failing.stderr
    assert contents(tmp_path) == {"source", "out", "alone"}
