"""What is published of a folder, and which folders are not fit to be."""

import json
from pathlib import Path

import pytest
import torch

from rigpt_hf.conversion import certify
from rigpt_hf.evaluation.harness.cache import fingerprint
from rigpt_hf.evaluation.measures.subjects import subject
from rigpt_hf.publishing.repository import foreign, is_managed, repository_files
from rigpt_hf.publishing.upload import publish
from tests.models import tiny_model
from tests.publishing.test_publish import save


TOKEN = "hf_mayWrite7391"


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(tmp_path / "model")


def test_a_repository_holds_the_model_and_nothing_else(folder):
    contents = repository_files(folder)
    paths = [file.path for file in contents.files]
    code = {"modeling_rigpt.py", "configuration_rigpt.py", "attention_rigpt.py"}
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 1
    expected = {"config.json", "generation_config.json", "tokenizer.json", "certificate.json", "README.md"}
    assert expected | code | shards | {"model.safetensors.index.json", "pictures/loss.png"} <= set(paths)
    assert contents.left_out == ("notes.txt", "pictures/other.png")
    assert contents.size == sum((folder / path).stat().st_size for path in paths)
    assert len(set(paths)) == len(paths)


def test_an_evaluation_goes_along(folder, tmp_path):
    (tmp_path / "evaluation").mkdir()
    own = {"schema": 1, "models": {"it": {"sha256": fingerprint(subject(folder))}}, "tasks": []}
    for name, text in {"results.json": json.dumps(own), "report.html": "<p>", "cache.json": "{}"}.items():
        (tmp_path / "evaluation" / name).write_text(text)
    paths = {file.path for file in repository_files(folder, results=tmp_path / "evaluation" / "results.json").files}
    assert {path for path in paths if "evaluation" in path} == {"evaluation/results.json", "evaluation/report.html"}
    (folder / "results.json").write_text(json.dumps(own))
    assert "evaluation/results.json" in {file.path for file in repository_files(folder).files}


def test_a_card_is_written_where_there_is_none(folder, monkeypatch, tmp_path):
    import rigpt_hf.model_cards.card as cards

    (folder / "README.md").unlink()
    asked = []

    def card_text(*arguments, **options):
        asked.append((*arguments, options))
        return "---\n{}\n---\nwritten"

    monkeypatch.setattr(cards, "card_text", card_text)
    card = next(file for file in repository_files(folder, repo_id="me/tiny").files if file.path == "README.md")
    assert card.read() == b"---\n{}\n---\nwritten"
    assert asked == [(folder, {"repo_id": "me/tiny", "results": None, "facts": None})]
    (tmp_path / "card.md").write_text("# Mine")
    contents = repository_files(folder, card=tmp_path / "card.md")
    assert next(file for file in contents.files if file.path == "README.md").read() == b"# Mine"
    assert len(asked) == 1


def test_code_may_differ_if_it_is_meant_to(folder):
    with (folder / "modeling_rigpt.py").open("a") as file:
        file.write("\n# changed\n")
    with pytest.raises(ValueError, match=r"`modeling_rigpt.py` differs.*pass `force=True`"):
        repository_files(folder)
    assert repository_files(folder, force=True)


def test_paths_of_this_machine_stay_at_home(folder):
    record = json.loads((folder / "certificate.json").read_text())
    record |= {"source": "/home/alice/secret/gpt2 (GPT2LMHeadModel)", "target": "me/tiny"}
    (folder / "certificate.json").write_text(json.dumps(record))
    (folder / "merge.json").write_text(json.dumps({"sources": ["/data/a", "you/b"], "weights": [0.5, 0.5]}))
    files = {file.path: file for file in repository_files(folder).files}
    sent = json.loads(files["certificate.json"].read())
    assert sent["source"] == "gpt2 (GPT2LMHeadModel)" and sent["target"] == "me/tiny"
    assert sent["max_abs_logit_error"] == record["max_abs_logit_error"]
    assert json.loads(files["merge.json"].read())["sources"] == ["a", "you/b"]
    for file in files.values():
        if not file.path.endswith(".safetensors"):
            assert b"alice" not in file.read() and str(folder).encode() not in file.read()


def test_an_adapter_that_was_merged_stays_at_home(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"")
    assert "adapter/adapter_model.safetensors" in repository_files(folder).left_out


def test_what_trainer_leaves_beside_a_model_stays_at_home(folder):
    (folder / "training_args.bin").write_bytes(b"a pickle")
    contents = repository_files(folder)
    assert "training_args.bin" in contents.left_out
    assert "training_args.bin" not in {file.path for file in contents.files}


def change_config(folder: Path, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def damage_shard(folder: Path):
    shard = min(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


REFUSALS = {
    "no-config": (lambda f: (f / "config.json").unlink(), r"has no `config.json`"),
    "broken-config": (lambda f: (f / "config.json").write_text("{"), r"must be readable JSON"),
    "other-model": (lambda f: change_config(f, model_type="gpt2"), r"must hold a RiGPT.*'gpt2'.*rigpt convert"),
    "other-class": (
        lambda f: change_config(f, architectures=["Other"]),
        r"one of the models of this package.*'Other'",
    ),
    "pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b""), r"pickles.*`pytorch_model.bin`.*Remove"),
    "state": (
        lambda f: (f / "optimizer.safetensors").write_bytes(b""),
        r"state of a training.*`optimizer.safetensors`",
    ),
    "checkpoint": (lambda f: (f / "checkpoint-20").mkdir(), r"state of a training.*`checkpoint-20`"),
    "no-weights": (lambda f: min(f.glob("*.safetensors")).unlink(), r"all weights as safetensors.*`model-00001"),
    "no-index": (lambda f: (f / "model.safetensors.index.json").unlink(), r"without `model.safetensors`"),
    "more-weights": (lambda f: (f / "adapter.safetensors").write_bytes(b""), r"one model.*`adapter.safetensors`"),
    "damaged": (damage_shard, r"a model that loads.*Save the model once more"),
    "other-sizes": (lambda f: change_config(f, num_hidden_layers=4), r"lacks `model.layers.3"),
    "fewer-layers": (lambda f: change_config(f, num_hidden_layers=2), r"has no place for `model.layers.2"),
    "no-auto-map": (lambda f: change_config(f, auto_map=None), r"must have an `auto_map`"),
    "auto-map-elsewhere": (
        lambda f: change_config(f, auto_map={"AutoModelForCausalLM": "other/repo--modeling_rigpt.RiGPTForCausalLM"}),
        r"bring the code.*'other/repo--",
    ),
    "code-absent": (lambda f: (f / "attention_rigpt.py").unlink(), r"code.*lacks `attention_rigpt.py`"),
    "more-code": (lambda f: (f / "setup.py").write_text(""), r"code.*also has `setup.py`"),
    "broken-card": (
        lambda f: (f / "README.md").write_text("---\na: [\n---\n"),
        r"`card` must be Markdown with metadata",
    ),
    "certificate-of-others": (
        lambda f: certify(tiny_model(5, dtype=torch.float32), tiny_model(5, dtype=torch.float32)).save(f),
        r"certificate of its own weights or none.*Remove it",
    ),
    "broken-certificate": (lambda f: (f / "certificate.json").write_text("{}"), r"a certificate that can be read"),
    "broken-tokenizer": (
        lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text()[:40]),
        r"a tokenizer that loads or none",
    ),
    "results-of-others": (
        lambda f: (f / "results.json").write_text(json.dumps({"schema": 1, "models": {}, "tasks": []})),
        r"`results` must be of this model",
    ),
    "token": (
        lambda f: (f / "README.md").write_text("hf_" + "aB3" * 12),
        r"must not hold an access token.*'README.md'",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_folder_that_is_not_fit_is_refused(case, folder):
    damage, message = REFUSALS[case]
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        repository_files(folder)
    assert "\n" not in str(error.value)
    assert "aB3aB3" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo_id": "me/my model"}, r"`repo` must be a name such as me/my-model.*'me/my model'"),
        ({"repo_id": "a/b/c"}, r"`repo` must be a name"),
        ({"revision": "a" * 40}, r"`revision` must be the name of a branch"),
        ({"revision": "a b"}, r"`revision` must be the name of a branch"),
        ({"revision": "a..b"}, r"`revision` must be the name of a branch"),
        ({"revision": "refs/pr/1"}, r"`revision` must be the name of a branch"),
        ({"token": "two\nlines8840"}, r"`token` must be one word of ASCII characters.*not shown"),
        ({"token": ""}, r"`token` must be an access token of the Hub, got none.*hf auth login"),
        ({"results": "absent.json"}, r"`results` must be the results.json of an evaluation"),
        ({"card": "absent.md"}, r"`card` must be a Markdown file"),
        ({"facts": "facts.yaml"}, r"`facts` are for a card that is written"),
        ({}, r"HF_HUB_OFFLINE forbids"),
    ],
)
def test_arguments_that_cannot_be(arguments, message, folder):
    with pytest.raises(ValueError, match=message) as error:
        publish(folder, **{"repo_id": "me/tiny", "token": TOKEN} | arguments)
    assert "\n" not in str(error.value)
    assert "8840" not in str(error.value) and TOKEN not in str(error.value)


def test_what_is_overwritten():
    assert foreign(["README.md", "model.safetensors"], "rigpt") is None
    assert foreign(["README.md", ".gitattributes", "data.csv"], None) is None
    assert foreign(["config.json"], "gpt2") == "a model of type 'gpt2'"
    assert "`model.gguf`" in foreign(["model.gguf"], None)
    managed = ["model.safetensors", "modeling_rigpt.py", "tokenizer.json", "evaluation/table.md", "config.json"]
    assert all(is_managed(path) for path in managed)
    kept = [
        "eval.py",
        "adapter_model.safetensors",
        "README.md",
        ".gitattributes",
        "LICENSE",
        "data/model.safetensors",
        "evaluation/mine.md",
        "demo/app.py",
    ]
    assert not any(is_managed(path) for path in kept)
