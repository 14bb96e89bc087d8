"""Pretraining that keeps a symmetry of tokens: in every way to run, resumed, gone on from, and refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rigpt_hf import RiGPTConfig
from rigpt_hf.symmetry.tokens import Representation, TokenSymmetry, symmetry_error
from rigpt_hf.symmetry.tokens.filling import Filling
from rigpt_hf.symmetry.tokens.training import SymmetricTraining, recorded
from rigpt_hf.training import build, loop
from rigpt_hf.training.pretrain import main
from rigpt_hf.training.symmetry import absent_in_words, kept_in_words
from tests.evaluation.toys import word_tokenizer
from tests.models import tokens
from tests.processes import ROOT
from tests.test_docs import blocks
from tests.tolerances import DISTRIBUTED, SYMMETRY
from tests.training.runs import (
    CALM,
    MODEL,
    VOCABULARY,
    interrupted,
    launch,
    log_of,
    make_options,
    pretrain,
    same_run,
    weights_of,
)
from tests.training.test_run_ways import another_precision, apart  # noqa: F401


KEPT = SYMMETRY[torch.float32]
NAMES = ("symmetric", "other")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two symmetries in files: all exchanges of three pairs of tokens, and of two."""
    folder = tmp_path_factory.mktemp("symmetries")
    for name, size in (("symmetric", 3), ("other", 2)):
        exchanged = [range(5, 5 + size), range(20, 20 + size)]
        TokenSymmetry.named("symmetric", exchanged, VOCABULARY).save(folder / name)
    return {name: str(folder / name) for name in NAMES}


@pytest.fixture(scope="module")
def kept(data, files, tmp_path_factory):
    """The folder of a run that keeps one, without dropout."""
    output = tmp_path_factory.mktemp("kept") / "run"
    pretrain(data, output, **CALM, symmetry=files["symmetric"], diagnose_steps=6)
    return output


def error_of(folder: Path, file: str) -> float:
    """The error of a saved model's symmetry, on sequences that have the tokens it exchanges."""
    inputs = tokens(2, 12)
    inputs[0, :6] = torch.tensor([5, 21, 6, 7, 20, 22])
    return symmetry_error(AutoModelForCausalLM.from_pretrained(folder), TokenSymmetry.load(file), inputs).max


def test_a_run_keeps_it_and_says_how_well(data, kept, plain, files, tmp_path):
    log = log_of(kept)
    assert [entry["step"] for entry in log if "symmetry_distance" in entry] == [6, 12]
    assert log[-1]["symmetry_distance"] < KEPT and log[0]["loss"] - log[-1]["loss"] > 0.2
    assert error_of(kept / "model", files["symmetric"]) < 100 * KEPT < 0.1 < error_of(plain / "model", files["other"])
    assert not any("symmetry_distance" in entry for entry in log_of(plain))
    for folder in (kept / "model", kept / "checkpoints" / "step-00000012" / "model"):
        known = recorded(RiGPTConfig.from_pretrained(folder))
        assert known.symmetry == TokenSymmetry.load(files["symmetric"]) and len(known.filling.matrices) > 1
        assert known.distance(AutoModelForCausalLM.from_pretrained(folder)) < KEPT
    assert json.loads((plain / "model" / "config.json").read_text())["token_symmetry"] is None


def test_without_the_projection_it_is_lost(data, files, tmp_path, monkeypatch):
    monkeypatch.setattr(SymmetricTraining, "project_gradients_", lambda training: None)
    report = pretrain(data, tmp_path, **CALM, symmetry=files["symmetric"])
    assert report.symmetry_distance > 1e-2
    averaged = pretrain(data, tmp_path / "steps", **CALM, symmetry=files["symmetric"], symmetry_project_weights=True)
    assert averaged.symmetry_distance < KEPT


WAYS = {
    "parts": {"per_device_train_batch_size": 1},
    "average": {"ema_decay": 0.8},
    "rates": {"lr_multipliers": {"rows": 0.5, "q_proj": 2.0}, "weight_decay": 0.5, "momentum": 0.8},
    "permutation, AdamW": {"symmetry_kind": "permutation", "optim": "adamw", "learning_rate": 3e-3},
    "permutation, Muon": {"symmetry_kind": "permutation", "optim": "muon"},
    "AdamW, weights": {"symmetry_project_weights": True, "optim": "adamw", "learning_rate": 1e-2},
    "learned positions": {"config_overrides": CALM["config_overrides"] | {"position_embedding_type": "learned"}},
    "untied": {"config_overrides": CALM["config_overrides"] | {"tie_word_embeddings": False}},
}


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=[pytest.mark.full] * (way not in ("parts", "rates", "permutation, Muon", "untied")))
        for way in WAYS
    ],
)
@pytest.mark.by_default(1)
def test_it_is_kept_in_every_way(data, kept, files, tmp_path, way):
    report = pretrain(data, tmp_path, **CALM | {"symmetry": files["symmetric"]} | WAYS[way])
    assert report.symmetry_distance < KEPT and report.losses[0] - report.losses[-1] > 0.1
    assert error_of(report.model_folder, files["symmetric"]) < 100 * KEPT
    assert way != "parts" or apart(tmp_path, kept) <= DISTRIBUTED


def test_bfloat16_keeps_it(data, files, tmp_path, another_precision):  # noqa: F811
    report = pretrain(data, tmp_path, **CALM, symmetry=files["symmetric"], mixed_precision="bf16")
    assert report.symmetry_distance < KEPT


@pytest.mark.full
def test_a_compiled_run_keeps_it(data, files, tmp_path, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="eager"))
    small = MODEL | {"num_hidden_layers": 1, "value_embedding_period": None}
    short = {"config_overrides": small, "max_steps": 2, "warmup_steps": 1, "symmetry": files["symmetric"]}
    assert pretrain(data, tmp_path, **short, torch_compile=True).symmetry_distance < KEPT


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_keep_it(data, kept, files, tmp_path, sharded):
    launch(data, tmp_path / "two", 2, **CALM, symmetry=files["symmetric"], diagnose_steps=6, fsdp=sharded)
    assert log_of(tmp_path / "two")[-1]["symmetry_distance"] < KEPT and apart(tmp_path / "two", kept) <= DISTRIBUTED
    assert error_of(tmp_path / "two" / "model", files["symmetric"]) < 100 * KEPT


@pytest.mark.full
def test_a_run_goes_on_with_the_representation_on_record(data, files, tmp_path, monkeypatch):
    """Also where irreducible representations would be found in another basis, as another machine may."""
    symmetry = {"symmetry": files["symmetric"]}
    pretrain(data, tmp_path / "run", **symmetry)
    found = Representation.choose

    def elsewhere(config, symmetry, **options):
        first = found(config, symmetry, **options).filling
        turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
        matrices = tuple(turn @ one @ turn.T if one.shape[-1] == 2 else one for one in first.matrices)
        return Representation.filled(config, symmetry, Filling(matrices, first.permutations, first.frames))

    monkeypatch.setattr(Representation, "choose", elsewhere)
    report = pretrain(data, interrupted(tmp_path / "run", tmp_path / "resumed"), **symmetry)
    assert report.started == 9 and report.symmetry_distance < KEPT
    assert same_run(tmp_path / "run", tmp_path / "resumed")
    with monkeypatch.context() as patched:
        patched.setattr(SymmetricTraining, "resume_", lambda training, *_: True)
        mistaken = pretrain(data, interrupted(tmp_path / "run", tmp_path / "mistaken"), **symmetry)
    assert mistaken.symmetry_distance > 1e-2
    # So does a run from a model that has it on record.
    more = {"init_from": str(tmp_path / "run" / "model"), "config_overrides": {}, "max_steps": 2, "warmup_steps": 1}
    report = pretrain(data, tmp_path / "more", **more, **symmetry)
    configs = [RiGPTConfig.from_pretrained(tmp_path / name / "model").token_symmetry for name in ("run", "more")]
    assert configs[0] == configs[1] and report.symmetry_distance < KEPT
    # One that does not keep it has it on record no more.
    pretrain(data, tmp_path / "free", **more)
    assert recorded(RiGPTConfig.from_pretrained(tmp_path / "free" / "model")) is None


def test_another_symmetry_is_another_run(data, kept, files, tmp_path):
    again = interrupted(kept, tmp_path / "run")
    for changes, said in (
        ({"symmetry": files["other"]}, r"symmetry \[\[\[5, 6, 7\].* → \[\[\[5, 6\]"),
        ({}, r"symmetry \[\[\[5, 6, 7\].* → absent"),
        ({"symmetry": files["symmetric"], "symmetry_kind": "permutation"}, 'kind "irreducible" → "permutation"'),
    ):
        with pytest.raises(ValueError, match=said):
            pretrain(data, again, **CALM, diagnose_steps=6, **changes)
    before = weights_of(again / "checkpoints" / "step-00000009")
    report = pretrain(data, again, **CALM, symmetry=files["other"], allow_changes=True)
    assert report.started == 9 and report.symmetry_distance < KEPT
    assert error_of(again / "model", files["other"]) < 100 * KEPT and weights_of(again) != before


REFUSED = [
    ({"symmetry": "none"}, "`symmetry` must be a file, got 'none'"),
    ({"symmetry_kind": "permutation"}, "`symmetry_kind` needs `symmetry`, got 'permutation' without it"),
    ({"symmetry_project_weights": True}, "`symmetry_project_weights` needs `symmetry`, got True without it"),
    ("", "`symmetry` must be a file of JSON, got '.*Expecting value"),
    ("[" * 100_000, "`symmetry` must be a file of JSON, got '.*nested too deeply"),
    ("[]", r"`symmetry` must hold .*file.json': `content` must be an object with the format .* got '\[\]'. Write it"),
    ({"generators": 3}, "`content` must be an object with the format"),
    ({"generators": [3]}, "`content` must be an object with the format"),
    ({"format": "other"}, "`content` must be an object with the format"),
    ({"generators": [[[0, 4]]]}, "`generators` must leave special tokens where they are, got token 0"),
    ({"generators": [[[5, 61]]]}, "`generators` must have tokens from 0 to 60, got token 61"),
    ({"generators": []}, "`symmetry` must exchange some tokens, got .* which exchanges none. Leave it out"),
    ({"generators": [[[5]]]}, "`symmetry` must exchange some tokens, got .* which exchanges none. Leave it out"),
    ({"vocab_size": 0, "generators": []}, "`symmetry` must hold .*file.json': `vocab_size` must be at least 1, got 0"),
    ({"generators": [[["a", "b"]]]}, "`tokenizer` must be given for tokens that are text, got none with 'a'"),
    ({"vocab_size": 60}, "`symmetry` must be of the vocabulary in use, 61 tokens, got .* of 60. Make it with"),
    ({"optim": "adamw"}, "`optim` must not scale coordinates that the symmetry mixes, got .*AdamW.* the equivariant"),
    ({"optim": "muon"}, "`optim` must not scale coordinates that the symmetry mixes"),
    ({"config_overrides": MODEL | {"local_frames": True}}, "one frame for all layers, got `local_frames=True`"),
    ({"model_kind": "stock-gpt2", "optim": "adamw"}, "`symmetry` must be left out for `model_kind` `stock-gpt2`"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: str(case[0])[:40])
def test_what_cannot_be_kept_is_refused_before_anything_is_made(data, files, tmp_path, case, capsys):
    changes, said = case
    content = json.loads(Path(files["symmetric"]).read_text())
    if isinstance(changes, str) or changes.keys() & content.keys():
        file = tmp_path / "file.json"
        file.write_text(changes if isinstance(changes, str) else json.dumps(content | changes))
        changes = {"symmetry": str(file)}
    elif "symmetry_kind" not in changes and "symmetry_project_weights" not in changes:
        changes = {"symmetry": files["symmetric"]} | changes
    with pytest.raises(ValueError, match=said) as told:
        pretrain(data, tmp_path / "run", **changes)
    assert "\n" not in str(told.value) and not (tmp_path / "run").exists()


def test_the_program_takes_strings_and_refuses_before_data_are_made(tmp_path, capsys, caplog):
    words = [f"{colour} {thing}" for colour in ("red", "blue") for thing in ("cat", "dog", "cow")]
    texts = [" ".join(words[i % 6 :] + words[: i % 5]) + f" {i}" for i in range(1500)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    content = {"format": "rigpt token symmetry", "generators": [[["Ġcat", "Ġdog"]]]}
    file = tmp_path / "symmetry.json"
    arguments = ["--data", str(tmp_path / "a.txt"), "--data-options", '{"separator": "\\n\\n"}', "--eval-share", "0.1"]
    arguments += ["--data-dir", str(tmp_path / "data"), "--tokenizer", "train:300", "--context-length", "8"]
    arguments += ["--output-dir", str(tmp_path / "run"), "--report-to", "none", "--symmetry", str(file)]
    arguments += ["--max-steps", "3", "--warmup-steps", "1", "--config-overrides", json.dumps(MODEL)]
    file.write_text("{}")
    assert main(arguments) == 2 and not (tmp_path / "data").exists()
    assert f"pretrain.py: `--symmetry` must hold exchanges of tokens, got '{file}'" in capsys.readouterr().err
    file.write_text(json.dumps(content))
    assert main(arguments) == 0, capsys.readouterr().err
    known = recorded(RiGPTConfig.from_pretrained(tmp_path / "run" / "model"))
    tokenizer = loop.load_tokenizer(tmp_path / "run" / "model")
    assert known.symmetry.generators == ((tuple(tokenizer.convert_tokens_to_ids(["Ġcat", "Ġdog"])),),)
    away = log_of(tmp_path / "run")[-1]["symmetry_distance"]
    told = (
        f"The weights have kept the symmetry: their distance from it is {away:.1e} of their norm, and up to 1e-04 is"
    )
    assert away < KEPT and told in capsys.readouterr().out
    file.write_text(json.dumps(content | {"generators": [[["Ġcat", "!"]]]}))
    assert main([*arguments, "--output-dir", str(tmp_path / "other")]) == 0
    assert "of the 2 tokens that it moves, 1 do not occur in the first" in caplog.text
    assert kept_in_words(2e-4).startswith("The weights have left the symmetry: their distance from it is 2.0e-04 of")


def test_a_word_that_text_has_behind_spaces_alone_is_named():
    tokenizer = word_tokenizer(["<s>", "cat", " cat", "dog", " dog", "!"])
    symmetry = TokenSymmetry.from_exchanges([[["cat", "dog"]]], tokenizer=tokenizer)
    read = np.array([2, 4, 2, 5])
    assert absent_in_words(symmetry, read, tokenizer) == (
        "`symmetry` has tokens that the data lack: of the 2 tokens that it moves, 2 do not occur in the first 4 "
        "tokens, such as 'cat'. ' cat', the word behind a space, is another token and occurs: is that one meant?"
    )
    assert absent_in_words(symmetry, read, None).endswith("2 do not occur in the first 4 tokens.")
    assert absent_in_words(symmetry, np.array([1, 3]), tokenizer) is None
    said = absent_in_words(TokenSymmetry.from_exchanges([[["cat", "!"]]], tokenizer=tokenizer), read, tokenizer)
    assert "1 do not occur" in said and said.count("cat") == 2
    spaced = word_tokenizer(["<s>", " cat", " dog"])
    spaced.unk_token = "<s>"
    with pytest.raises(ValueError, match="got 'cat', which is none. ' cat' is one, as words behind a space are"):
        TokenSymmetry.from_exchanges([[["cat", "dog"]]], tokenizer=spaced)


def test_the_file_on_the_page_is_one(tmp_path):
    (text,) = blocks(ROOT / "docs" / "training.md", "json")
    content = json.loads(text)
    words = [word for cycles in content["generators"] for cycle in cycles for word in cycle]
    tokenizer = word_tokenizer(["<s>", *words])
    (tmp_path / "verbs.json").write_text(text)
    symmetry = TokenSymmetry.load(tmp_path / "verbs.json", tokenizer.all_special_ids, tokenizer)
    assert symmetry.order == 4 and len(symmetry.points) == len(words) == 8


def test_options_that_need_no_model_are_checked_first(data, files, tmp_path):
    options = make_options(data, tmp_path, symmetry=files["symmetric"])
    build.check_run(options)
    Path(files["symmetric"]).with_name("none").write_text("3")
    options.symmetry = str(Path(files["symmetric"]).with_name("none"))
    with pytest.raises(ValueError, match="must be an object"):
        build.check_run(options)
