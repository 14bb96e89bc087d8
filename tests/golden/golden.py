"""
Golden results: what a change of the house must leave alone, bit by bit.

    python -m tests.golden.golden record     # write tests/golden/golden.json
    python -m tests.golden.golden check      # make everything anew and name what differs; exit code 1 if any

Six small stock models are converted, rotated with a fixed seed, canonicalised, merged and exported; 60 steps of the
smoke preset are trained, once in one go and once killed on the way and resumed; a model is fine-tuned and two are
evaluated. Kept are SHA-256 of weights tensor by tensor, figures of certificates, logs and results without times.
Names are compared without the prefix `model.`, so that a parameter may move between the base model and its head.

Bits depend on the processor and on torch: `golden.json` says on which it was recorded.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORD = HERE / "golden.json"
WORDS = ["<s>", *[f"w{index}" for index in range(60)]]
TOKENS = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = TOKENS | {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = TOKENS | {"n_positions": 64, "n_embd": 24, "n_layer": 3, "n_head": 4, "summary_type": "cls_index"}
# name: class, fields of its config, dtype, and what it exports to
SOURCES: dict[str, tuple[str, dict[str, Any], torch.dtype, str]] = {
    "gpt2": ("GPT2", GPT2, torch.float32, "gpt2"),
    "gpt2-relu-scaled": (
        "GPT2",
        GPT2 | {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
        torch.float64,
        "gpt2",
    ),
    "llama": ("Llama", LLAMA, torch.float32, "llama"),
    "llama-biases": (
        "Llama",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"},
        torch.float64,
        "llama",
    ),
    "mistral": ("Mistral", LLAMA | {"sliding_window": None}, torch.bfloat16, "llama"),
    "qwen2": ("Qwen2", LLAMA | {"tie_word_embeddings": True}, torch.float32, "qwen2"),
}
SUITE = """
text: {{source: {text}, documents: 12, window: 33}}
tasks:
  - {{metric: perplexity, arguments: {{context: 32}}}}
  - {{metric: invariance, documents: 2, arguments: {{draws: 1}}}}
  - {{metric: outliers, arguments: {{context: 32, windows: 4}}}}
  - {{metric: quantization_robustness, arguments: {{schemes: [W8A8, W3A3], frames: [identity, hadamard]}}}}
"""
# The programs' own words for what is asked of them here.
PRETRAIN = (
    "--config {preset} --init-from {start} --data {text} --data-dir {data} --tokenizer train:512 --eval-share 0.1 "
    "--eval-batches 4 --output-dir {output} --max-steps 60 --report-to none --deterministic"
)
FINETUNE = (
    "{model} {rows} {output} --max-steps 12 --per-device-train-batch-size 4 --logging-steps 1 --context-length 48 "
    "--optim equivariant --cpu --quiet --learning-rate 0.003"
)
# What a log or a result says of the machine and the moment, and what follows from the inputs.
PASSING = {"tokens_per_second", "mfu", "seconds", "created", "code", "versions", "source", "target", "folder", "path"}
PASSING |= {"checked"}


def sha256(tensor: torch.Tensor) -> str:
    """16 hexadecimal digits of the SHA-256 of a tensor's dtype, shape and bytes."""
    head = f"{tensor.dtype} {list(tensor.shape)}".encode()
    return hashlib.sha256(head + tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def weights_of(folder: Path) -> dict[str, str]:
    """Hashes of all tensors of a saved model, by name without `model.`."""
    return {
        name.removeprefix("model."): sha256(tensor)
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def lasting(value: Any) -> Any:
    """JSON without what passes: times, dates, places, versions; parameters by name without `model.`."""
    if isinstance(value, dict):
        return {key.removeprefix("model."): lasting(entry) for key, entry in value.items() if key not in PASSING}
    return [lasting(entry) for entry in value] if isinstance(value, list) else value


def certificate_of(folder: Path) -> dict[str, Any]:
    """The figures of a certificate; its hash of weights depends on names."""
    figures = lasting(json.loads((folder / "certificate.json").read_text()))
    return {key: value for key, value in figures.items() if key != "weights_sha256"}


def run(*arguments: str | Path, watch: Callable[[subprocess.Popen], None] | None = None) -> None:
    """A program of the project in a process of its own, from the root of the checkout."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if watch is not None:
        watch(process)
    output, _ = process.communicate()
    if process.returncode and watch is None:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output}")


def rigpt(*arguments: str | Path) -> None:
    """One verb of the command line."""
    from rigpt_hf.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code:
        raise RuntimeError(f"rigpt {' '.join(map(str, arguments))} ended with {result.exit_code}:\n{result.output}")


def write_sources(folder: Path) -> None:
    """The stock models with random gains, biases and weights, a tokenizer beside each."""
    for index, (name, (family, fields, dtype, _)) in enumerate(SOURCES.items()):
        config = getattr(transformers, f"{family}Config")(**fields)
        heads = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
        torch.manual_seed(index)
        model = getattr(transformers, heads)(config).to(torch.float64)
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        model.to(dtype).save_pretrained(folder / name)
        tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<s>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>").save_pretrained(folder / name)


def write_start(folder: Path) -> tuple[Path, Path]:
    """
    The smoke preset without its model, and that model with weights of our own: those that a seed gives depend on the
    order in which its parts are made.
    """
    preset = yaml.safe_load((ROOT / "training/presets/smoke.yaml").read_text())
    model = RiGPTForCausalLM(RiGPTConfig(vocab_size=512, **preset.pop("config_overrides")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0].removeprefix("model.")):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder / "start")
    (folder / "smoke.yaml").write_text(yaml.safe_dump(preset))
    return folder / "smoke.yaml", folder / "start"


def write_texts(folder: Path) -> None:
    """Text in which each word tells something of the next, as a file and as rows."""
    draw = random.Random(0)
    documents = []
    for _ in range(3000):
        word, words = draw.randrange(60), []
        for _ in range(draw.randint(8, 60)):
            words.append(f"w{word}")
            word = (3 * word + draw.choice((1, 1, 1, 2, 7))) % 60
        documents.append(" ".join(words))
    (folder / "text.txt").write_text("<|endoftext|>".join(documents))
    with (folder / "rows.jsonl").open("w") as rows:
        rows.writelines(json.dumps({"text": document}) + "\n" for document in documents[:200])


def models_in_other_frames(folder: Path) -> dict[str, Any]:
    """Convert, rotate, canonicalise, merge and export every source."""
    results: dict[str, Any] = {}
    for name, (_, _, _, target) in SOURCES.items():
        places = {
            verb: folder / f"{name}-{verb}" for verb in ("converted", "rotated", "canonical", "merged", "exported")
        }
        rigpt("convert", folder / name, places["converted"])
        rigpt("rotate", places["converted"], places["rotated"], "--frames", "all", "--seed", "3")
        rigpt("canonicalize", places["rotated"], places["canonical"])
        rigpt("merge", places["converted"], places["rotated"], places["merged"], "--weights", "0.7,0.3")
        rigpt("export", places["converted"], places["exported"], "--to", target)
        for verb, place in places.items():
            results[f"{name}/{verb}"] = {"weights": weights_of(place)}
            if (place / "certificate.json").is_file():
                results[f"{name}/{verb}"]["certificate"] = certificate_of(place)
    return results


def log_of(output: Path) -> list[Any]:
    return [lasting(json.loads(line)) for line in (output / "metrics.jsonl").read_text().splitlines()]


def training_runs(folder: Path) -> dict[str, Any]:
    """Sixty steps of the smoke preset at once, and the same killed after 40 and resumed from the checkpoint before."""

    def kill(process: subprocess.Popen) -> None:
        log = folder / "resumed/metrics.jsonl"
        while process.poll() is None:
            if log.is_file() and len(log.read_text().splitlines()) > 40:
                process.send_signal(signal.SIGKILL)
                return
            time.sleep(0.01)

    results = {}
    preset, start = write_start(folder)
    for name in ("whole", "resumed"):
        output = folder / name
        places = {"preset": preset, "start": start, "text": folder / "text.txt", "data": folder / "shards"}
        arguments = PRETRAIN.format(**places, output=output).split()
        if name == "resumed":
            run("training/pretrain.py", *arguments, watch=kill)
        run("training/pretrain.py", *arguments)
        results[f"pretraining/{name}"] = {"log": log_of(output), "weights": weights_of(output / "model")}
    return results


def fine_tuning(folder: Path) -> dict[str, Any]:
    """Twelve steps of a converted model on rows of text."""
    output = folder / "tuned"
    arguments = FINETUNE.format(model=folder / "llama-converted", rows=folder / "rows.jsonl", output=output).split()
    run("training/finetune.py", *arguments)
    return {"fine-tuning": {"weights": weights_of(output)}}


def evaluation(folder: Path) -> dict[str, Any]:
    """A conversion beside its source on all measures but the speed."""
    suite, output = folder / "suite.yaml", folder / "evaluation"
    suite.write_text(SUITE.format(text=folder / "text.txt"))
    models_compared = folder / "gpt2-converted", "--against", folder / "gpt2"
    rigpt("evaluate", *models_compared, "--suite", suite, "--output", output, "--device", "cpu")
    results = lasting(json.loads((output / "results.json").read_text()))
    for model in results["models"].values():
        del model["sha256"]  # which depends on names
    return {"evaluation": results}


def everything(parts: list[str]) -> dict[str, Any]:
    """All golden results, made anew in a temporary folder."""
    makers = {
        "frames": models_in_other_frames,
        "pretraining": training_runs,
        "tuning": fine_tuning,
        "evaluation": evaluation,
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sources(folder)
        write_texts(folder)
        if "frames" not in parts and {"tuning", "evaluation"} & set(parts):
            for source in ("gpt2", "llama"):
                rigpt("convert", folder / source, folder / f"{source}-converted")
        for part in tqdm([part for part in makers if part in parts], desc="Golden results", unit="part"):
            results |= makers[part](folder)
        # Nothing of the temporary place may stay in what is compared.
        return json.loads(json.dumps(results).replace(name, "FOLDER"))


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """Where two results differ, as paths of keys."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [line for key in keys for line in differences(before.get(key), now.get(key), f"{place}/{key}")]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            line
            for index, pair in enumerate(zip(before, now, strict=True))
            for line in differences(*pair, f"{place}/{index}")
        ]
    return [] if before == now else [f"{place}: {str(before)[:60]} -> {str(now)[:60]}"]


def machine() -> dict[str, str]:
    """What the bits depend on besides the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"processor": name, "torch": torch.__version__, "transformers": transformers.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument(
        "--parts",
        default="frames,pretraining,tuning,evaluation",
        help="which results, separated by commas (default: %(default)s)",
    )
    given = parser.parse_args()
    parts = given.parts.split(",")
    torch.set_num_threads(1)
    if given.action == "record":
        RECORD.write_text(json.dumps({"machine": machine(), "results": everything(parts)}, indent=0) + "\n")
        return 0
    kept = json.loads(RECORD.read_text())
    if kept["machine"] != machine():
        print(f"golden: recorded on {kept['machine']}, this is {machine()}; bits may differ for that alone")
    now = everything(parts)
    before = (
        kept["results"]
        if given.parts == parser.get_default("parts")
        else {key: kept["results"].get(key) for key in now}
    )
    lines = differences(before, now)
    print("\n".join(lines) or f"golden: {len(now)} results, all equal bit by bit")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
