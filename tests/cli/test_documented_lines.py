"""Every line of the documentation that calls `rigpt` runs, on small models with the names that pages give them."""

import inspect
import json
import re
import shlex
import shutil
from pathlib import Path

import peft
import pytest
import torch
import typer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rigpt_hf.cli import VERBS, app
from rigpt_hf.command_line import hyphenated
from rigpt_hf.conversion import convert_model
from rigpt_hf.quantization import calibration
from rigpt_hf.symmetry import GaugeTransformation
from tests.conversion.sources import stock_model
from tests.models import randomise_
from tests.test_docs import ROOT, lines_of


PAGES = sorted({*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/how-to").glob("*.md"), ROOT / "README.md"})
LINES = {page: [line for line in lines_of(page) if "rigpt " in line.partition("|")[2] + line] for page in PAGES}
# What pages leave open, said last and so obeyed: less of everything.
BRIEFLY = {
    "quantize": ["--tokens", 2048, "--judge", 256, "--tune", 0],
    "prune": ["--tokens", 2048, "--judge", 512],
    "pretrain": shlex.split(
        "--max-steps 2 --warmup-steps 1 --data text.txt --data-dir data --data-options 'separator: \"\\n\\n\"' "
        "--eval-share 0.3 --tokenizer train:300 --global-batch-size 4 --eval-batches 1"
    ),
    "finetune": ["--max-steps", 2, "--context-length", 16],
    "generate": ["--max-new-tokens", 3],
    "merge --learn": ["--learn", 2],
    "prune --recover": ["--recover", 2],
    "evaluate": ["--suite", "brief.yaml", "--device", "cpu"],
}
GPT2 = {"vocab_size": 257, "n_positions": 128, "n_embd": 32}
LLAMA = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8}
LLAMA |= {"max_position_embeddings": 128}
# What the commands that verbs name leave open.
OPEN = {"TEXT", "OUTPUT", "ADAPTER", "MODEL", "SOURCE", "TURNED"}
# Demos and the lab have tests of their own, and the Hub is not asked here.
ELSEWHERE = {"demo", "lab", "--revision-b"}


def elsewhere(words: list[str]) -> bool:
    return bool(ELSEWHERE & {*words}) or ("publish" in words and "--dry-run" not in words)


def runnable(line: str) -> list[str] | None:
    """The words behind `rigpt`, if a line calls a verb that is tried here, with nothing of the Hub."""
    words = shlex.split(line.rpartition("|")[2])
    while words and "=" in words[0]:  # of the environment
        words.pop(0)
    return words[1:] if words[:1] == ["rigpt"] and not elsewhere(words) else None


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, as llama.cpp has it too, and a chat template."""
    words = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=words[0], eos_token=words[0])
    answer = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    fast.chat_template = "{% for m in messages %}" + answer + "{% else %}{{ m.content }}:{% endif %}{% endfor %}"
    return fast


def copies(model, *names: str) -> None:
    for name in names:
        model.save_pretrained(name)
        byte_tokenizer().save_pretrained(name)


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory) -> Path:
    """A folder with all that the pages name."""
    place = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        copies(stock_model("gpt2", torch.float32, **GPT2), "openai-community/gpt2")
        llama = stock_model("llama-tied", torch.float32, **LLAMA)
        copies(llama, "HuggingFaceTB/SmolLM2-135M", "BEFORE", "AFTER")
        model = convert_model(llama)
        copies(model, "my-rigpt", "first", "A", "me/model")
        g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(0))
        copies(g(model), "second", "relative", "B")
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"]))
        randomise_(adapted, 1, 0.1).save_pretrained("my-adapter")
        vectors = {"blocks.3.hook_resid_post": torch.randn(2, model.config.hidden_size)}
        save_file(vectors, "vectors.safetensors")
        text = "\n\n".join("a b c a a b c" + n * " a" for n in range(200))
        for name in ("text.txt", "notes.txt", "held-out.txt", "wiki.valid.txt", "README.md"):
            Path(name).write_text(text)
        Path("pets.json").write_text('{"format": "rigpt token symmetry", "generators": [[["a", "b"]]]}')
        task = "{metric: perplexity, arguments: {context: 32}}"
        Path("brief.yaml").write_text(f"text: {{source: text.txt, documents: 4, window: 33}}\ntasks: [{task}]\n")
        Path("metadata.yaml").write_text("title: Small\nlicense: mit\n")
        chats = ([{"role": "user", "content": n * "a "}, {"role": "assistant", "content": "c"}] for n in range(1, 30))
        Path("chats.jsonl").write_text("".join(json.dumps({"messages": said}) + "\n" for said in chats))
    return place


@pytest.fixture
def place(laid_out, tmp_path, monkeypatch):
    shutil.copytree(laid_out, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    words = Path("text.txt").read_text().split()
    passages = [" ".join(words[i % 7 :] + words[: i % 7]) for i in range(400)]
    # In the place of the documentation of all packages, which takes a while to find.
    monkeypatch.setattr(calibration, "gather_documentation", lambda size, part: passages[::-1])
    monkeypatch.setattr(calibration, "documents", lambda source, megabytes: iter(passages))
    monkeypatch.setattr("sys.stdin.read", lambda: "a b c", raising=False)
    return tmp_path


# Pages that take more than ten seconds.
LONG = {"quantization", "runtimes"}
CALLING = [page for page in PAGES if any(map(runnable, LINES[page]))]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=[pytest.mark.full] * (page.stem in LONG)) for page in CALLING],
)
def test_lines_run_one_after_the_other(page, place, rigpt):
    """And so do the commands that verbs name for what may come next, where they leave nothing open."""
    verbs, tried, named = typer.main.get_command(app).commands, [], 0
    for line in LINES[page]:
        if (words := runnable(line)) is None:
            continue
        if made := {"convert": 2, "finetune": 3}.get(words[0]):  # what other pages begin with
            shutil.rmtree(words[made], ignore_errors=True)
        asked, following = words, [words]
        while following:
            verb, *_ = words = following.pop(0)
            options = inspect.signature(next(one for one in VERBS if one.__name__ == verb)).parameters
            briefly = [word for key, more in BRIEFLY.items() if {*key.split()} <= {*words} for word in more]
            code, out, err = rigpt(*words, *briefly, *(["--force"] if "force" in options else []))
            # A verb that another names may answer no, which is what it is asked.
            assert code == 0 or (code == 1 and verb == "diff" and words is not asked), (
                f"{line}\n{shlex.join(words)}\n{out}\n{err}"
            )
            tried.append(words)
            for then, *others in map(shlex.split, re.findall(r"^(?:Next: |      )rigpt (.*)", out, re.MULTILINE)):
                verbs[then].make_context(then, hyphenated(others))
                named += 1
                new = [then, *others]
                if not OPEN & {*others} and not elsewhere(new) and new not in tried + following:
                    following.append(new)
    assert named or page.stem in ("generate", "verify")


def test_pages_have_lines():
    calls = [words for page in PAGES for words in map(runnable, LINES[page]) if words]
    assert len(CALLING) > 9 and len(calls) > 50 and len({words[0] for words in calls}) > 15
