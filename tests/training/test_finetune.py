"""Fine-tuning: what is learned, what is masked, what is held out, what is saved, what is refused."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.optim import EquivariantOptimizer
from rigpt_hf.text.tokenizer import END
from rigpt_hf.training import finetune as program
from rigpt_hf.training.finetune_data import encode_chat
from rigpt_hf.training.tuning import finetune
from tests.conversion.sources import stock_model
from tests.model.agreement import assert_different, assert_same
from tests.models import tiny_config, tiny_model, tokens
from tests.processes import ROOT, run
from tests.training.texts import CHAT, MARKED, TEXT, lines


def logits(model):
    return model.eval()(tokens(2, 9)).logits.detach()


def by_hand(model_folder, pairs):
    """Mean losses of examples, each alone."""
    model = RiGPTForCausalLM.from_pretrained(model_folder)
    return [model(ids[None], labels=labels[None]).loss.item() for ids, labels in pairs]


def difference_from_start(model, model_folder):
    start = RiGPTForCausalLM.from_pretrained(model_folder)
    both = zip(model.named_parameters(), start.parameters(), strict=True)
    return {name for (name, now), then in both if not torch.equal(now, then)}


def test_all_weights_learn_a_text_and_load_as_a_whole_model(options, model_folder, tmp_path):
    report = finetune(options(eval_share=0.0, max_steps=25))
    assert report.measured_on == "training"
    assert report.loss_after < 0.6 * report.loss_before
    assert report.trained == report.parameters
    # By hand: a mean over batches would weigh the short last window as much as a full one.
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"] + [tokenizer.eos_token_id])
    windows = [window for window in ids.split(24) if len(window) > 1]
    losses = by_hand(model_folder, [(window, window) for window in windows])
    assert len(windows) == report.examples and len(windows[-1]) < 24
    assert report.loss_before == pytest.approx(np.average(losses, weights=[len(w) - 1 for w in windows]), rel=1e-5)
    assert report.loss_before != pytest.approx(np.mean(losses), rel=1e-5)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model, RiGPTForCausalLM)
    assert model.config.use_cache, "Trainer's setting leaked into the saved model"
    assert difference_from_start(model, model_folder) == {name for name, _ in model.named_parameters()}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("The cat", return_tensors="pt")
    grown = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert grown.shape[1] > prompt["input_ids"].shape[1]
    assert (tmp_path / "out" / "modeling_rigpt.py").is_file(), "the code of the model"
    assert not (tmp_path / "out.checkpoints").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"data.txt", "out"}, "nothing partial is left"

    record = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert record["options"]["max_steps"] == 25 and record["versions"]["torch"] == torch.__version__
    assert record["result"]["loss_after"] == report.loss_after
    assert record["result"]["steps"] == report.steps == 25


def test_how_to_sample_goes_along_as_it_was(options, model_folder, tmp_path, capfd):
    """Also what the library loads but would not save; it learns where to end."""
    odd = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "num_beams": 3}
    own = shutil.copytree(model_folder, tmp_path / "own")
    (own / "generation_config.json").write_text(json.dumps(odd | {"eos_token_id": 1}))
    for merged in ({}, {"lora": 2, "merge": True}):
        finetune(options(model=str(own), max_steps=1, force=True, **merged))
        saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
        end = AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id
        assert (
            {name: saved[name] for name in odd} == odd and end in saved["eos_token_id"] and "pad_token_id" not in saved
        )
    assert "generation flags" not in capfd.readouterr().err


def test_chats_are_cut_and_padded_where_nothing_looks(options, model_folder, tmp_path, caplog):
    """Two of four are left: in one all that the assistant says comes too late, in one it says nothing."""
    template = tmp_path / "template.jinja"
    template.write_text(MARKED)
    kept = [CHAT, [CHAT[0], {"role": "assistant", "content": "No."}]]
    late, silent = [{"role": "user", "content": "Hi " * 30}, CHAT[1]], CHAT[:1]
    settings = {"chat_template": str(template), "context_length": 28, "eval_share": 0.0, "name": "d.jsonl"}
    settings |= {"max_steps": 1, "logging_steps": 1, "learning_rate": 1e-9}
    report = finetune(options(lines({"messages": chat} for chat in (silent, *kept, late)), **settings))
    assert report.examples == 2 and "2 chats were left out because the assistant says nothing in their" in caplog.text
    chats = AutoTokenizer.from_pretrained(tmp_path / "out")
    pairs = [[torch.tensor(part[:28]).long() for part in encode_chat(chat, chats)] for chat in kept]
    losses, counts = by_hand(model_folder, pairs), [int((labels != -100).sum()) for _, labels in pairs]
    expected = np.average(losses, weights=counts)
    assert len(pairs[0][0]) == 28 > len(pairs[1][0]) and counts[0] != counts[1]
    assert report.loss_before == pytest.approx(expected, rel=1e-5), "padding would be measured"
    assert report.curve[0][1] == pytest.approx(expected, rel=1e-3), "padding would be trained"
    with pytest.raises(ValueError, match="at least one example, got 1 chats from .* token in their first 28 tokens"):
        finetune(options(lines([{"messages": late}]), **settings, output_dir=str(tmp_path / "none")))


def test_an_adapter_trains_alone_and_merges(options, model_folder, tmp_path):
    peft = pytest.importorskip("peft")
    report = finetune(options(lora=4, lora_target_modules=["q_proj", "up_proj"], merge=True))
    assert report.loss_after < report.loss_before
    assert 0 < report.trained < 0.2 * report.parameters

    base = RiGPTForCausalLM.from_pretrained(model_folder)
    untrained = logits(base)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    names = {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert names == {"q_proj", "up_proj"}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.use_cache and merged.dtype == torch.float32
    assert_same(logits(merged), logits(adapted), "merged")
    assert_different(logits(merged), untrained, "trained")
    changed = difference_from_start(merged, model_folder)
    assert changed and all("q_proj.weight" in name or "up_proj.weight" in name for name in changed)


def test_an_adapter_alone_is_saved_as_one(options, model_folder, tmp_path):
    peft = pytest.importorskip("peft")
    finetune(options(lora=2, max_steps=3))
    assert not list((tmp_path / "out").glob("model*.safetensors"))
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.peft_config["default"].base_model_name_or_path == str(model_folder)
    assert_different(logits(model), logits(RiGPTForCausalLM.from_pretrained(model_folder)))
    # An adapter has no config.json, and is replaced all the same.
    finetune(options(lora=2, max_steps=1, force=True))
    assert json.loads((tmp_path / "out" / "finetune.json").read_text())["result"]["steps"] == 1


@pytest.mark.parametrize("changes", [{}, {"lora": 2}], ids=["full", "lora"])
@pytest.mark.by_default(1)
def test_a_model_saved_in_bfloat16_stays_so(changes, options, tokenizer, tmp_path):
    if changes:
        pytest.importorskip("peft")
        changes = changes | {"merge": True}
    small = tmp_path / "small"
    RiGPTForCausalLM(tiny_config(vocab_size=len(tokenizer))).bfloat16().save_pretrained(small)
    tokenizer.save_pretrained(small)
    report = finetune(
        options(model=str(small), max_steps=8, mixed_precision="bf16", gradient_checkpointing=True, **changes)
    )
    assert report.loss_after < report.loss_before
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.config.dtype == torch.bfloat16


@pytest.mark.parametrize("optim", [pytest.param("adamw", marks=pytest.mark.full), "equivariant"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(optim, options, tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            seen.append(optimizer.optimizer)

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    settings = {"max_steps": 8, "save_steps": 3, "optim": optim, "gradient_checkpointing": True}
    whole = finetune(options(output_dir=str(tmp_path / "whole"), **settings), [Look()])
    assert isinstance(seen[0], EquivariantOptimizer) == (optim == "equivariant")
    assert whole.loss_after < 0.95 * whole.loss_before
    with pytest.raises(KeyboardInterrupt):
        finetune(options(**settings), [Stop()])
    assert not (tmp_path / "out").exists()
    saved = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out.checkpoints" / "checkpoint-3"))
    for changes, message in (
        ({}, r"interrupted run in .* Pass `--resume` to go on, or `force=True`"),
        ({"seed": 1, "resume": True}, r"`seed` must be as in the interrupted run, which had 0, got 1"),
        ({"content": TEXT + "More.", "resume": True}, "`data` must be as in the interrupted run"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(options(**settings, **changes))
    resumed = finetune(options(**settings, resume=True))
    assert (resumed.loss_before, resumed.steps, resumed.tokens) == (whole.loss_before, whole.steps, whole.tokens)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "whole"))
    assert_same(logits(ours), logits(theirs), "resumed")
    assert_different(saved, logits(theirs), "the steps since the checkpoint")


def test_chats_fine_tune(options, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(MARKED)
    chats = [{"messages": [{"role": "user", "content": f"Hi {n}"}, CHAT[1]]} for n in range(30)]
    report = finetune(
        options(
            lines(chats), "chats.jsonl", chat_template=str(template), context_length=48, eval_share=0.2, max_steps=20
        )
    )
    assert report.measured_on == "held-out" and 0 < report.held_out < 15
    assert report.held_out + report.examples == 30
    assert report.loss_after < 0.5 * report.loss_before
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == MARKED
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = tokenizer.apply_chat_template(chats[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == CHAT[1]["content"] + END


def test_refusals(options, tmp_path):
    for changes, message in (
        ({"lora": 0}, "`lora` must be at least 1, got 0"),
        ({"context_length": 1}, "`context_length` must be at least 2, got 1"),
        ({"learning_rate": -1.0}, "`learning_rate` must be positive, got -1.0"),
        ({"eval_share": 1.0}, "`eval_share` must be at least 0 and below 1, got 1.0"),
        ({"num_train_epochs": 1.0}, "`num_train_epochs` must not be given with `max_steps`, got 1.0 and 12"),
        ({"merge": True}, "`merge` needs `lora`, got True without it"),
        ({"lora": 4, "optim": "equivariant"}, "`optim` must be 'adamw' with `lora`.* no row for adapters"),
        ({"chat_template": "nowhere"}, "`chat_template` must be a readable file .*, got 'nowhere': "),
        ({"context_length": 4000}, "`context_length` must be at most the model's 48, got 4000"),
        ({"resume": True}, "`resume` needs a checkpoint, got none in"),
        ({"data": "./nowhere.txt"}, "`data` must be a file, .* got './nowhere.txt': no such file"),
        (
            {"data": "nobody/nothing"},
            "that `datasets` can read, with the split 'train', got 'nobody/nothing'. There is no such file",
        ),
        (
            {"model": "nobody/nothing"},
            "`model` must be the folder of a saved model or the id .*, got 'nobody/nothing'",
        ),
        (
            {"data_split": "test"},
            r"`data_split` must be one of train, or a slice such as .*, got 'test' of .*data.txt",
        ),
        ({"data_revision": "main"}, "`data_config` and `data_revision` name parts of a data set on the Hub"),
        ({"content": "\n\n"}, "`data` must hold text, got .* where all rows are empty"),
        ({"content": "a,b", "name": "data.csv"}, "`data` must be or hold files that end in .txt, .*, got .*data.csv"),
        ({"content": '{"a": 1, "prompt": "x"}', "name": "d.jsonl"}, "`messages`, got .* with the columns a, prompt"),
        ({"content": '{"messages": [{"text": "x"}]}', "name": "d.jsonl"}, "each with `role` and `content`"),
        ({"content": '{"text": [1, 2]}', "name": "d.jsonl"}, "strings in the column `text`, got list in row 0"),
        (
            {"content": "{", "name": "d.jsonl"},
            "`data` must hold files of .* that can be read, got .*d.jsonl': Expecting",
        ),
        (
            {"content": lines([{"messages": CHAT}]), "name": "d.jsonl", "eval_share": 0.0},
            "`chat_template` must be given for rows with `messages`, .* `--chat-template FILE`",
        ),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            finetune(options(**changes))
        assert "\n" not in str(caught.value)
        assert {path.suffix for path in tmp_path.iterdir()} <= {".txt", ".csv", ".jsonl"}, "something was left"


def test_places_and_files_that_do_not_do_are_named(options, tmp_path, capsys):
    (tmp_path / "file").touch()
    nowhere, template = str(tmp_path / "file" / "out"), tmp_path / "template.jinja"
    with pytest.raises(ValueError, match=f"`output_dir` must be a folder, or a new name in one, got '{nowhere}': '"):
        finetune(options(output_dir=nowhere))
    assert {path.name for path in tmp_path.iterdir()} == {"data.txt", "file"}
    template.write_text("{{ 'schön' }}", encoding="latin-1")
    assert program.main(["model", "data.txt", "out", "--chat-template", str(template)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("finetune.py: `--chat-template` must be a readable file of text in UTF-8, got '")
    template.write_text("{{ 'schön' }}", encoding="utf-8")
    assert options(chat_template=str(template)).read_template() == "{{ 'schön' }}"


def test_what_is_no_number_is_not_written(options, tmp_path):
    """After a step so long that it makes the weights no numbers."""
    with pytest.raises(
        ValueError, match=r"`learning_rate` must leave weights and loss finite, got 1e\+38 and a loss of nan"
    ):
        finetune(options(learning_rate=1e38))
    assert not (tmp_path / "out").exists()


def test_wrong_models_are_refused(options, tokenizer, tmp_path):
    stock_model("gpt2").save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"`model` must be a RiGPT, got .* 'gpt2'. Convert it first: rigpt convert"):
        finetune(options(model=str(tmp_path / "stock")))
    bare = tmp_path / "bare"
    tiny_model(dtype=torch.float32).save_pretrained(bare)
    with pytest.raises(ValueError, match=r"`model` must have a tokenizer, got"):
        finetune(options(model=str(bare)))
    tokenizer.save_pretrained(bare)
    with pytest.raises(ValueError, match=rf"for each id of its tokenizer, {len(tokenizer)} in all, got 61 in"):
        finetune(options(model=str(bare)))
    pytest.importorskip("peft")
    for target, rule in (("nothing", "name layers of the model"), ("lm_head", "not be a table that is used twice")):
        with pytest.raises(ValueError, match=f"`lora_target_modules` must {rule}.*'{target}'"):
            finetune(options(lora=2, lora_target_modules=[target]))


def test_nothing_is_overwritten_unasked(options, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("mine")
    for force in (False, True):
        with pytest.raises(ValueError, match="`output_dir`"):
            finetune(options(force=force))
    assert (output / "precious").read_text() == "mine"
    working = tmp_path / "new.checkpoints"
    working.mkdir()
    (working / "precious").write_text("mine")
    for changes in ({"force": True}, {"resume": True}, {}):
        with pytest.raises(ValueError, match="`output_dir`|`resume`"):
            finetune(options(output_dir=str(tmp_path / "new"), **changes))
    assert (working / "precious").read_text() == "mine"
    (working / "finetune.json").write_text("{}")
    (working / "checkpoint-4").mkdir()
    new = {"output_dir": str(tmp_path / "new"), "force": True}
    with pytest.raises(
        ValueError, match="nothing else than checkpoints of this program.*has checkpoint-4, finetune.json, precious"
    ):
        finetune(options(**new))
    with pytest.raises(ValueError, match="`output_dir` must not hold what is read, nor the checkpoints beside it"):
        finetune(options(**new, model=str(working / "checkpoint-4")))
    assert {path.name for path in working.iterdir()} == {"precious", "finetune.json", "checkpoint-4"}
    with pytest.raises(ValueError, match="`output_dir` must not hold what is read"):
        finetune(options(output_dir=str(tmp_path), force=True))


@pytest.mark.slow
def test_two_processes_train_as_one(options, tmp_path):
    """With everything but their number the same; gradients of one process alone would give other weights."""
    book = "\n\n".join(f"Passage {n} of a book on cats." for n in range(80))
    alone = options(book, output_dir=str(tmp_path / "alone"), max_steps=4, per_device_train_batch_size=4)
    report = finetune(alone)
    assert report.examples >= 16, "the batch is never cut short by the end of an epoch"
    settings = ["--max-steps=4", "--per-device-train-batch-size=2", "--context-length=24", "--learning-rate=1e-2"]
    words = [alone.model, alone.data, tmp_path / "together", *settings, "--cpu", "--quiet"]
    done = run(ROOT / "training" / "finetune.py", *words, world=2)
    assert done.returncode == 0, done.stderr[-2000:]
    together = json.loads((tmp_path / "together" / "finetune.json").read_text())["result"]
    for name in ("loss_before", "loss_after", "tokens", "steps"):
        assert together[name] == pytest.approx(getattr(report, name), rel=1e-5), name
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("alone", "together"))
    assert_same(logits(two), logits(one), "two processes")
    half = finetune(options(book, output_dir=str(tmp_path / "half"), max_steps=4, per_device_train_batch_size=2))
    assert half.loss_after != pytest.approx(report.loss_after, rel=1e-5)


def test_the_command_line(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    choice = options()
    words = [choice.model, choice.data, choice.output_dir, "--max-steps=2", "--context-length=24", "--cpu"]
    words += ["--logging-steps=1"]
    assert program.main(words) == 0
    shown, progress = capsys.readouterr()
    report = json.loads((tmp_path / "out" / "finetune.json").read_text())["result"]
    assert f"Before: loss {report['loss_before']:.4f}" in shown
    assert f"Written to {tmp_path / 'out'}" in shown
    for name in ("loss_before", "loss_after"):
        assert f"{report[name]:.4f}" in shown and f"{math.exp(report[name]):.2f}" in shown
    for part in (report["measured_on"], f"{report['tokens']:,}", f"{report['parameters']:,}", report["seconds"]):
        assert str(part) in shown, part
    assert "{" not in shown, "entries of the log are in no table"
    assert "2/2 [" in progress and "loss=" in progress
    table, _, below = shown.partition("└")
    assert "before" in table and "parameters" not in table, "counts have no before and after"
    told = f"All {report['parameters']:,} parameters were trained on {report['tokens']:,} tokens in 2 steps, in "
    assert f"{told}{report['seconds']:.1f} seconds." in below and "symmetry" not in below
    assert program.main([*words, "--force", "--quiet"]) == 0
    assert capsys.readouterr() == ("", ""), "what is quiet says nothing"
    assert program.main(words) == 2
    assert capsys.readouterr().err.startswith("finetune.py: `OUTPUT_DIR` must be empty or absent")
    assert program.main(["--help"]) == 0
    page = capsys.readouterr().out
    assert "--lora-target-modules" in page and "accelerate launch training/finetune.py" in page
