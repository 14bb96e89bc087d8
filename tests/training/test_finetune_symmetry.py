"""Fine-tuning that keeps a symmetry of tokens: learned, resumed, refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from rigpt_hf.symmetry.tokens import SymmetricTraining, TokenSymmetry, symmetry_error
from rigpt_hf.symmetry.tokens.training import recorded
from rigpt_hf.training import finetune as program
from rigpt_hf.training import tuning
from rigpt_hf.training.tuning import finetune
from tests.model.agreement import assert_same
from tests.processes import ROOT, run
from tests.tolerances import SYMMETRY
from tests.training.texts import TEXT


KEPT = SYMMETRY[torch.float32]
STILL = {"max_steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0}
WAY = {"optim": "equivariant", "learning_rate": 3e-3, "max_steps": 6, "logging_steps": 2, "eval_share": 0.0}


EXCHANGES = [[["sat", "mat", "Ġcat"]], [["sat", "mat"]]]


@pytest.fixture
def file(tokenizer, tmp_path):
    """All exchanges of three tokens of the text, given as strings."""
    made = TokenSymmetry.from_exchanges(EXCHANGES, tokenizer=tokenizer)
    content = made.to_dict() | {"generators": EXCHANGES}
    place = tmp_path / "symmetry.json"
    place.write_text(json.dumps(content))
    return place


class Seen(TrainerCallback):
    def on_train_end(self, args, state, control, **parts):
        self.log = state.log_history


@pytest.mark.full
def test_it_is_kept_and_goes_with_the_model(options, file, tokenizer, tmp_path, monkeypatch):
    seen = Seen()
    report = finetune(options(symmetry=str(file), **WAY), [seen])
    logged = [entry["symmetry_distance"] for entry in seen.log if "loss" in entry]
    assert len(logged) == 3 and max(logged) < KEPT and report.loss_after < report.loss_before
    assert report.symmetry_distance < KEPT and "have kept the symmetry: their distance" in report.sentences()[1]
    # What the projection does to the loss is told apart from what training does.
    assert report.loss_projected is not None and abs(report.loss_projected - report.loss_before) > 1e-4
    still = finetune(options(**WAY | STILL | {"symmetry": str(file), "output_dir": str(tmp_path / "still")}))
    assert still.loss_projected == report.loss_projected == pytest.approx(still.loss_after, abs=1e-6)
    assert [column.header for column in still.table().columns] == ["", "before", "projected", "after"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    known = recorded(model.config)
    assert known.symmetry == TokenSymmetry.load(file, tokenizer=tokenizer) and known.distance(model) < KEPT
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(["Ġcat", "sat", "on", "mat", "mat", "an", "Ġcat", "Ġ"])])
    assert symmetry_error(model, known.symmetry, ids).max < 100 * KEPT
    # It goes on from there, and without a projection it is lost.
    more = {"model": str(tmp_path / "out"), "output_dir": str(tmp_path / "more"), "symmetry": str(file)}
    monkeypatch.setattr(SymmetricTraining, "project_gradients_", lambda training: None)
    lost = finetune(options(**WAY | more), [seen])
    assert seen.log[-2]["symmetry_distance"] > 1e-3 and lost.symmetry_distance > 1e-3
    assert "The weights have left the symmetry: their distance from it is" in lost.sentences()[1]
    free = AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    assert free.config.token_symmetry == model.config.token_symmetry and known.distance(free) > 1e-3
    free = finetune(options(**WAY | more | {"symmetry": None, "output_dir": str(tmp_path / "free")}))
    assert free.symmetry_distance is free.loss_projected is None and len(free.sentences()) == 1
    assert [column.header for column in free.table().columns] == [
        "",
        "before",
        "after",
    ]
    assert recorded(AutoModelForCausalLM.from_pretrained(tmp_path / "free").config) is None


@pytest.mark.full
def test_adamw_keeps_permutations_or_projects_weights(options, file, tmp_path):
    for name, changes in (("p", {"symmetry_kind": "permutation"}), ("w", {"symmetry_project_weights": True})):
        way = WAY | {"optim": "adamw", "symmetry": str(file), "output_dir": str(tmp_path / name)} | changes
        finetune(options(**way))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert recorded(model.config).distance(model) < KEPT


@pytest.mark.full
def test_an_interrupted_run_goes_on(options, file, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **parts):
            if state.global_step == 4:
                raise KeyboardInterrupt

    way = WAY | {"save_steps": 3, "symmetry": str(file)}
    finetune(options(**way))
    shutil.move(tmp_path / "out", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        finetune(options(**way), [Stop()])
    content = file.read_text()
    file.write_text(json.dumps(json.loads(content) | {"generators": EXCHANGES[1:]}))
    with pytest.raises(ValueError, match="`symmetry` must be as in the interrupted run, got another one in"):
        finetune(options(**way, resume=True))
    file.write_text(content)
    finetune(options(**way, resume=True))
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "whole"))
    ids = torch.arange(8)[None]
    assert_same(ours(ids).logits, theirs(ids).logits, "resumed")
    assert recorded(ours.config).distance(ours) < KEPT


@pytest.mark.slow
def test_two_processes_keep_it(options, file, tmp_path):
    choice = options(TEXT * 3)
    settings = ["--max-steps=4", "--per-device-train-batch-size=2", "--context-length=24", "--learning-rate=3e-3"]
    settings += ["--cpu", "--quiet", "--optim=equivariant", "--symmetry", file, "--save-steps=2", "--keep-checkpoints"]
    done = run(ROOT / "training" / "finetune.py", choice.model, choice.data, tmp_path / "out", *settings, world=2)
    assert done.returncode == 0, done.stderr[-2000:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert recorded(model.config).distance(model) < KEPT
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "out.checkpoints" / "checkpoint-2")
    assert before.config.token_symmetry == model.config.token_symmetry
    assert recorded(model.config).distance(before) < KEPT < (model.lm_head.weight - before.lm_head.weight).abs().max()


@pytest.mark.full
def test_that_it_is_not_kept_is_said_once_nothing_refuses(options, file, tmp_path, caplog, monkeypatch):
    def refuse(*_):
        raise ValueError("`data` must be others")

    finetune(options(symmetry=str(file), **WAY | {"max_steps": 1}))
    again = WAY | {"max_steps": 1, "model": str(tmp_path / "out"), "output_dir": str(tmp_path / "again")}
    with pytest.raises(ValueError, match="`data` must be others"), monkeypatch.context() as patched:
        patched.setattr(tuning, "encode", refuse)
        finetune(options(**again))
    assert "which training without `symmetry` does not keep" not in caplog.text
    finetune(options(**again))
    assert caplog.text.count("which training without `symmetry` does not keep") == 1


def test_what_cannot_be_kept_is_refused(options, file, model_folder, tmp_path, tokenizer, capsys):
    ours = {"symmetry": str(file)}
    for changes, said in (
        (ours | {"lora": 2}, "`symmetry` must be left out with `lora`, got .* Drop one"),
        (ours | {"optim": "adamw"}, "`optim` must not scale coordinates that the symmetry mixes, got .*AdamW"),
        ({"symmetry": str(tmp_path / "none")}, "`symmetry` must be a file, got .*none"),
        ({"symmetry_project_weights": True}, "`symmetry_project_weights` needs `symmetry`, got True"),
    ):
        with pytest.raises(ValueError, match=said) as told:
            finetune(options(**WAY | changes))
        assert "\n" not in str(told.value)
        assert {path.name for path in tmp_path.iterdir()} == {"data.txt", "symmetry.json"}
    end = tokenizer.eos_token
    for generators, size, said in (
        ([[["sat", end]]], len(tokenizer), "`--?generators` must leave special tokens where they are"),
        (EXCHANGES, len(tokenizer) - 1, "`--symmetry` must be of the vocabulary in use, .* Make it with the same"),
    ):
        content = {"format": "rigpt token symmetry", "vocab_size": size, "generators": generators}
        file.write_text(json.dumps(content))
        (tmp_path / "data.txt").write_text(TEXT)
        words = [str(model_folder), str(tmp_path / "data.txt"), str(tmp_path / "out"), "--symmetry", str(file)]
        assert program.main([*words, "--quiet", "--cpu"]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1 and said.split(" must")[1].split(",")[0] in shown, shown
