"""The peak of memory stays below the checkpoint's size plus 1 GB, and does not grow faster than the checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


PROJECT = Path(__file__).resolve().parents[2]
GIGABYTE = 10**9

# Not `ru_maxrss`: it survives exec, so it would report the peak of the process that runs the tests.
CODE = """
import sys
from rigpt_hf.conversion import convert_checkpoint
certificate = convert_checkpoint(sys.argv[1], sys.argv[2], progress=False)
assert certificate.passed
status = dict(line.split(":") for line in open("/proc/self/status"))
print(status["VmHWM"].split()[0])
"""

MODELS = {
    "gpt2-float32": (GPT2LMHeadModel, GPT2Config(vocab_size=8000, n_embd=896, n_layer=10, n_head=14), torch.float32),
    "llama-bfloat16": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=20000,
            hidden_size=1280,
            intermediate_size=3456,
            num_hidden_layers=10,
            num_attention_heads=20,
            tie_word_embeddings=True,
        ),
        torch.bfloat16,
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_stays_below_the_size_plus_one_gigabyte(name, tmp_path):
    model_class, config, dtype = MODELS[name]
    torch.manual_seed(0)
    model_class(config).to(dtype).save_pretrained(tmp_path / "source")
    size = sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors"))
    assert size > 0.35 * GIGABYTE  # holding two models would show
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, str(tmp_path / "source"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split()[-1]) * 1024
    print(f"checkpoint {size / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, {(peak - size) / 1e6:.0f} MB above it")
    assert peak < size + GIGABYTE
