"""Checkpoints on disk: complete folders or none, bounded memory, everything beside the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from rigpt_hf.checkpoints.read import local_folder
from rigpt_hf.checkpoints.write import parse_size
from rigpt_hf.conversion import Certificate, CertificateError, convert_checkpoint, convert_model, export_checkpoint
from rigpt_hf.conversion import plan as plan_module
from rigpt_hf.conversion.folds import fold_reader

from .sources import SOURCES, stock_model


PROJECT = Path(__file__).resolve().parents[2]


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options):
    model = stock_model(name, dtype)
    model.save_pretrained(folder, **options)
    return model


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", SOURCES)
def test_a_checkpoint_becomes_what_its_model_becomes(name, tmp_path):
    model = save(name, tmp_path / "source")
    certificate = convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert certificate.passed and Certificate.load(tmp_path / "out") == certificate
    expected = convert_model(model).state_dict()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(stored) == set(expected) - tied
    assert all(torch.equal(tensor, expected[key]) for key, tensor in stored.items())


def test_the_folder_holds_all_that_a_user_needs(tmp_path):
    model = save("llama", tmp_path / "source")
    GenerationConfig(temperature=0.6, do_sample=True, eos_token_id=[2, 5]).save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    (tmp_path / "source" / "notes.txt").write_text("private")
    convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert {"config.json", "model.safetensors", "certificate.json", "modeling_rigpt.py"} <= contents(tmp_path / "out")
    assert "notes.txt" not in contents(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["RiGPTForCausalLM"] and config["dtype"] == "float32"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_rigpt.RiGPTForCausalLM"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.temperature == 0.6 and loaded.generation_config.eos_token_id == [2, 5]
    first, second = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("source", "out"))
    assert first("c a b")["input_ids"] == second("c a b")["input_ids"] == [2, 0, 1]
    chat = [{"role": "user", "content": "a"}]
    assert second.apply_chat_template(chat, tokenize=False) == "<user>a"
    assert loaded.config.vocab_size == model.config.vocab_size


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    fast.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)


@pytest.mark.slow
def test_a_folder_loads_in_a_fresh_process_without_the_package(tmp_path):
    save("gpt2", tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    code = (
        "import sys; sys.modules['rigpt_hf'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True)\n"
        "print(type(model).__name__, model.lm_head.weight is model.model.embed_tokens.weight)"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.split() == ["RiGPTForCausalLM", "True"], done.stderr[-2000:]


def test_shards_in_and_out(tmp_path):
    model = save("gpt2", tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    convert_checkpoint(tmp_path / "source", tmp_path / "out", max_shard_size="30KB", progress=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 3
    assert sum(os.path.getsize(tmp_path / "out" / file) for file in files) > index["metadata"]["total_size"]
    expected = convert_model(model).state_dict()
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as handle:
            assert torch.equal(handle.get_tensor(name), expected[name])


def test_names_without_the_prefix_and_old_masks_are_understood(tmp_path):
    save("gpt2", tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 40, 40, dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    assert convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False).passed


@pytest.mark.parametrize("stored, asked", [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", None)])
def test_dtypes(stored, asked, tmp_path):
    save("llama-tied", tmp_path / "source", getattr(torch, stored))
    dtype = asked and getattr(torch, asked)
    certificate = convert_checkpoint(tmp_path / "source", tmp_path / "out", dtype=dtype, progress=False)
    assert certificate.dtype == (asked or stored)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype is getattr(torch, asked or stored)


class TestNothingIsLeftBehind:
    def test_by_a_failed_certificate(self, tmp_path, monkeypatch):
        save("gpt2", tmp_path / "source")
        monkeypatch.setattr(
            plan_module, "fold_reader", lambda w, gain, centred, scale, dtype: fold_reader(w, None, centred, 1, dtype)
        )
        with pytest.raises(CertificateError, match="not the same function"):
            convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
        assert contents(tmp_path) == {"source"}

    def test_by_an_unknown_key_which_is_named(self, tmp_path):
        save("gpt2", tmp_path / "source")
        path = tmp_path / "source" / "model.safetensors"
        save_file(load_file(path) | {"transformer.extra.weight": torch.ones(2)}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="`transformer.extra.weight`"):
            convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
        assert contents(tmp_path) == {"source"}

    def test_by_an_interruption(self, tmp_path, monkeypatch):
        save("gpt2", tmp_path / "source")

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("rigpt_hf.checkpoints.write.save_config", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
        assert contents(tmp_path) == {"source"}

    def test_and_an_earlier_model_survives(self, tmp_path, monkeypatch):
        save("gpt2", tmp_path / "source")
        convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
        before = (tmp_path / "out" / "config.json").read_bytes()
        monkeypatch.setattr(plan_module, "fold_reader", lambda w, *_: torch.zeros_like(w, dtype=torch.float32))
        with pytest.raises(CertificateError):
            convert_checkpoint(tmp_path / "source", tmp_path / "out", force=True, progress=False)
        assert (tmp_path / "out" / "config.json").read_bytes() == before
        assert contents(tmp_path) == {"source", "out"}


class TestOutputs:
    def test_an_earlier_model_is_replaced_only_by_force(self, tmp_path):
        save("gpt2", tmp_path / "source")
        convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
        (tmp_path / "out" / "old.txt").touch()
        with pytest.raises(ValueError, match="`output_dir` must be empty or absent.*`force=True`"):
            convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
        convert_checkpoint(tmp_path / "source", tmp_path / "out", force=True, progress=False)
        assert "old.txt" not in contents(tmp_path / "out") and contents(tmp_path) == {"source", "out"}

    def test_folders_that_are_no_models_are_never_replaced(self, tmp_path):
        save("gpt2", tmp_path / "source")
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.tex").touch()
        with pytest.raises(ValueError, match="no `config.json`"):
            convert_checkpoint(tmp_path / "source", tmp_path / "home", force=True, progress=False)
        with pytest.raises(ValueError, match="must not hold the source"):
            convert_checkpoint(tmp_path / "source", tmp_path / "source", force=True, progress=False)
        with pytest.raises(ValueError, match="must be a folder, got the file"):
            convert_checkpoint(tmp_path / "source", tmp_path / "home" / "thesis.tex", progress=False)
        assert contents(tmp_path / "home") == {"thesis.tex"}

    @pytest.mark.parametrize("size, number", [("500MB", 5 * 10**8), ("1.5 GB", 15 * 10**8), (7, 7)])
    def test_sizes(self, size, number):
        assert parse_size(size) == number

    @pytest.mark.parametrize("size", ["big", "5", "0GB", 0])
    def test_impossible_sizes(self, size):
        with pytest.raises(ValueError, match="`max_shard_size` must be"):
            parse_size(size)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="`source` must be a folder or the id.*no such folder"):
        local_folder(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="`revision` names a version on the Hub"):
        local_folder(str(tmp_path), "main")
    save("gpt2", tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has neither.*`convert_model`"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="`gguf_file` must be a file in"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", gguf_file="model.gguf", progress=False)


@pytest.mark.parametrize("name, target", [("gpt2", "gpt2"), ("qwen2", "qwen2")])
def test_a_folder_comes_back_as_a_stock_folder(name, target, tmp_path):
    save(name, tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "rigpt", progress=False)
    certificate = export_checkpoint(tmp_path / "rigpt", tmp_path / "back", target=target)
    assert certificate.passed and Certificate.load(tmp_path / "back") == certificate
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "back")) is SOURCES[name][0]
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="`source` must be a RiGPT"):
        export_checkpoint(tmp_path / "source", tmp_path / "again", target=target)
    assert contents(tmp_path) == {"source", "rigpt", "back"}


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    save("gpt2", tmp_path / "source")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT), "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [str(PROJECT / "training" / "convert.py"), str(tmp_path / "source")]
    command = [*launcher, *program, str(tmp_path / "out"), "--cpu", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal up to rounding") == 1
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) >= 2
    convert_checkpoint(tmp_path / "source", tmp_path / "alone", progress=False)
    together = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    alone = load_file(tmp_path / "alone" / "model.safetensors")
    assert set(together) == set(alone) and all(torch.equal(together[name], alone[name]) for name in alone)
    failing = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert failing.returncode != 0 and "`output_dir` must be empty or absent" in failing.stderr
    assert contents(tmp_path) == {"source", "out", "alone"}
