"""The good inputs that cases are made from, and the command lines that take them."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from tests import processes


class Command(NamedTuple):
    """A command line that succeeds, the files that it makes, and what it looks at in which models."""

    words: list[str]
    makes: list[str]
    reads: str
    models: list[str]


MODELS = {"in/rigpt", "in/other", "in/learned", "in/gpt2", "in/llama"}
SHORT = {
    "MODEL": "out/config.json out/model.safetensors",
    "RUN": "--max-steps 2 --warmup-steps 1 --global-batch-size 2 --context-length 16 --report-to none",
    "TUNE": "out --max-steps 1 --context-length 16 --cpu --quiet",
    "DESCENT": "--text in/text.txt --time 0.02 --learning-rates 0.02,0.01",
}
# Name; what it looks at in models (c: configuration, w: weights, t: tokenizer); what it makes; the command line.
TABLE = """
convert         | cwt | MODEL out/certificate.json | rigpt convert in/gpt2 out
convert.py      | cwt | MODEL | convert.py in/llama out --cpu --quiet
export          | cwt | MODEL | rigpt export in/rigpt out --to llama
export-gpt2     | cw  | MODEL | rigpt export in/learned out
verify          | cw  | | rigpt verify in/rigpt in/other
verify-stock    | cwt | | rigpt verify in/gpt2 in/learned --text in/text.txt
info            | c   | | rigpt info in/rigpt
rotate          | cwt | MODEL | rigpt rotate in/rigpt out
rotate-file     | cw  | MODEL out.st | rigpt rotate in/rigpt out --transformation in/turn.st --save-transformation out.st
canonicalize    | cw  | MODEL | rigpt canonicalize in/rigpt out
diff            | cw  | out.json out.png | rigpt diff in/rigpt in/other --json out.json --picture out.png
merge           | cwt | MODEL out.png | rigpt merge in/rigpt in/other out --text in/text.txt --picture out.png --points 2
charges         | cw  | | rigpt charges in/rigpt
charges-measure | cwt | out.png | rigpt charges in/rigpt --measure DESCENT --picture out.png
evaluate        | cwt | out/results.json out/report.html | rigpt evaluate in/rigpt --suite in/suite.yaml --text in/text.txt --output out --device cpu
card            | cw  | in/rigpt/README.md | rigpt card in/rigpt --metadata in/metadata.yaml
publish         | cw  | | rigpt publish in/rigpt me/model --dry-run --metadata in/metadata.yaml
space           | cwt | | rigpt publish in/rigpt me/model --dry-run --space
demo            | cwt | out/report.md | rigpt demo --model in/gpt2 --output out --points 2
demo-text       |     | out/report.md | rigpt demo --text in/text.txt --output out --steps 1 --points 2
pretrain        | cw  | out/model/config.json | pretrain.py --init-from in/rigpt --data-dir in/shards --data null --output-dir out RUN
prepare         | t   | out/manifest.json | pretrain.py --data in/rows.jsonl --data-dir out --tokenizer in/rigpt --eval-share 0.2 --prepare-only --output-dir out-run RUN
finetune        | cwt | MODEL | finetune.py in/rigpt in/text.txt TUNE
chat            | cwt | MODEL | finetune.py in/rigpt in/chats.jsonl TUNE --chat-template in/template.jinja
generate        | cwt | | rigpt generate in/rigpt cat --max-new-tokens 2 --device cpu
lab             |     | | rigpt lab lie-groups --output out
speed           |     | | speed.py --shape small --mode eager --turns 3 --output out.json
"""  # noqa: E501


def command(line: str) -> tuple[str, Command]:
    cells = (" ".join(SHORT.get(word, word) for word in cell.split()).split() for cell in line.split("|"))
    name, reads, makes, words = cells
    return name[0], Command(words, makes, "".join(reads), [word for word in words if word in MODELS])


COMMANDS = dict(map(command, TABLE.strip().splitlines()))
MODULES = {
    "convert.py": "rigpt_hf.training.convert",
    "pretrain.py": "rigpt_hf.training.pretrain",
    "finetune.py": "rigpt_hf.training.finetune",
    "speed.py": "rigpt_hf.evaluation.speed",
}
TEXT = "".join(f"the cat saw {word} dog and the {word} ran home.\n\n" for word in ("a", "one", "that", "my") * 40)
CHATS = [
    {"messages": [{"role": "user", "content": f"the cat {n}"}, {"role": "assistant", "content": "a dog ran home."}]}
    for n in range(40)
]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
SUITE = "text: {documents: 4, window: 17}\ntasks:\n  - {metric: perplexity, arguments: {context: 16}}\n"


def build() -> Path:
    """The folder of the inputs of this session, which a process of its own writes when it is first asked for."""
    place = Path(os.environ[processes.FOLDER], "world")
    with FileLock(f"{place}.lock"):
        if not place.exists():
            made = processes.run("-c", f"from tests.fuzz.world import make; make({str(place)!r})", cwd=processes.ROOT)
            assert made.returncode == 0, made.stderr
    return place


def make(folder: str) -> None:
    """Write the inputs; all models but `gpt2` and `llama` are RiGPTs, and `other` is `rigpt` in other frames."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model

    from rigpt_hf import RiGPTForCausalLM
    from rigpt_hf.conversion import convert_checkpoint
    from rigpt_hf.symmetry import GaugeTransformation
    from rigpt_hf.training.data import from_tokens
    from tests.conversion.sources import stock_model
    from tests.evaluation.toys import word_tokenizer

    place = Path(folder)
    place.mkdir(parents=True)
    words = dict.fromkeys(part for text in (TEXT, "0 1 2 3 <user> <assistant>") for part in text.split())
    tokenizer = word_tokenizer(["<s>", *words, *(f" {word}" for word in words)][:61])
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "<s>"
    for name in ("gpt2", "llama"):
        stock_model(name, torch.float32).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    convert_checkpoint(str(place / "gpt2"), place / "learned", progress=False)
    convert_checkpoint(str(place / "llama"), place / "rigpt", progress=False)
    model = RiGPTForCausalLM.from_pretrained(place / "rigpt")
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(0), "all")
    g(model).save_pretrained(place / "other")
    tokenizer.save_pretrained(place / "other")
    g.save(place / "turn.st")
    model.save_pretrained(place / "sharded", max_shard_size="20KB")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(place / "adapter")
    (place / "text.txt").write_text(TEXT)
    (place / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    rows = [{"text": f"the cat saw {n} dog", "number": n} for n in range(200)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "template.jinja").write_text(TEMPLATE)
    (place / "suite.yaml").write_text(SUITE)
    (place / "metadata.yaml").write_text("title: A model\nlicense: apache-2.0\nlanguage: [en]\n")
    draw, files = np.random.default_rng(0), {}
    for split in ("train", "validation"):
        files[split] = place / f"{split}.bin"
        draw.integers(0, 61, 4000).astype("<u2").tofile(files[split])
    from_tokens(files, place / "shards", vocab_size=61, end_of_text=0, progress=False)
    for file in files.values():
        file.unlink()
