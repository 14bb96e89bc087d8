"""What is published of a folder, and which folders are not fit to be."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml, parse_eval_result_entries
from safetensors.torch import load_file, save, save_file

from rigpt_hf.checkpoints.folder import record_written
from rigpt_hf.checkpoints.written import Record, inventory
from rigpt_hf.conversion import certify
from rigpt_hf.evaluation.harness.cache import fingerprint
from rigpt_hf.evaluation.models import evaluated
from rigpt_hf.model_cards import card as cards
from rigpt_hf.model_cards.card import card_text, write_card
from rigpt_hf.model_cards.marker import without_marker
from rigpt_hf.model_cards.metadata import model_metadata
from rigpt_hf.publishing.contents import RepositoryContents, RepositoryFile
from rigpt_hf.publishing.hub import check_no_token
from rigpt_hf.publishing.notebook import NOTEBOOK, notebook
from rigpt_hf.publishing.repository import is_managed, repository_files
from rigpt_hf.publishing.upload import foreign, publish
from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.symmetry.tokens import Representation, TokenSymmetry
from rigpt_hf.token_symmetry_rigpt import SYMMETRY_FRAME
from tests.model_cards.test_card import EVALUATION, INVARIANCE
from tests.models import tiny_model
from tests.publishing.conftest import CARD, WRITE
from tests.symmetry.options import generator


def test_a_repository_holds_the_model_and_nothing_else(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    record_written(folder, Record(inventory(folder), {}))
    contents = repository_files(folder)
    paths = [file.path for file in contents.files]
    code = {"modeling_rigpt.py", "configuration_rigpt.py", "scores_rigpt.py"}
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 1
    expected = {"config.json", "generation_config.json", "tokenizer.json", "certificate.json", "README.md"}
    assert expected | code | shards | {"model.safetensors.index.json", "pictures/loss.png"} <= set(paths)
    # An adapter that was merged, and what `Trainer` leaves beside a model, stay at home.
    assert ".rigpt-written.json" not in paths
    stay = ("adapter/adapter_model.safetensors", "notes.txt", "pictures/other.png", "training_args.bin")
    assert contents.left_out == stay and not set(stay) & set(paths)
    sizes = {file.path: file.size for file in contents.files}
    assert sizes.pop(NOTEBOOK) == len(notebook("FOLDER")), "which is made, and in no folder"
    assert sizes == {path: (folder / path).stat().st_size for path in sizes}
    assert len(set(paths)) == len(paths)


def test_scores_of_benchmarks_go_along_as_the_hub_reads_them(folder):
    (folder / ".eval_results").mkdir()
    path = folder / ".eval_results/gsm8k.yaml"
    entry = EvalResultEntry("openai/gsm8k", "gsm8k", 12.5, notes="greedy")
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry])))
    contents = unloaded(folder)
    (file,) = [file for file in contents.files if file.path == ".eval_results/gsm8k.yaml"]
    assert parse_eval_result_entries(yaml.safe_load(file.read())) == [entry]
    assert file.path not in contents.left_out and not is_managed(file.path)
    without_task, without_id = (f"- {{dataset: {{{part}}}, value: 1}}" for part in ("id: a/b", "id: a b, task_id: x"))
    for wrong in (without_task, without_id, "12", "[", "-", "[]", "[" * 3000):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="`folder` must hold scores as the Hub reads them, got .*gsm8k.yaml"):
            unloaded(folder)
    for value in ("high", ".nan"):
        path.write_text(f"- {{dataset: {{id: openai/gsm8k, task_id: x}}, value: {value}}}")
        with pytest.raises(ValueError, match="`value` a number"):
            unloaded(folder)


def test_the_frame_of_a_symmetry_goes_along(folder):
    """And is a file of weights that the model does not use where none is recorded."""
    model = evaluated(folder).model
    representation = Representation.choose(model.config, TokenSymmetry(61, [[[5, 6]]]))
    turn = GaugeTransformation.random(model.config, generator())
    representation.conjugated(turn).save(folder)
    files = {file.path: file.content for file in repository_files(folder).files}
    assert files[SYMMETRY_FRAME] == folder / SYMMETRY_FRAME and is_managed(SYMMETRY_FRAME)
    turn.save(folder / "other.safetensors")
    with pytest.raises(ValueError, match="also has `other.safetensors`"):
        unloaded(folder)
    (folder / "other.safetensors").unlink()
    representation.save(folder)
    with pytest.raises(ValueError, match=f"also has `{SYMMETRY_FRAME}`"):
        unloaded(folder)
    representation.conjugated(turn).save(folder)
    (folder / SYMMETRY_FRAME).unlink()
    with pytest.raises(ValueError, match="must hold the frame that its `token_symmetry` names"):
        repository_files(folder)


@pytest.fixture
def nothing_measured(monkeypatch):
    """Cards with an invariance error from a table, as it takes seconds to measure."""
    monkeypatch.setattr(cards, "invariance_of", lambda *arguments: INVARIANCE | {"random_tokens": True})


def evaluation_of(folder: Path, place: Path, **changes) -> Path:
    """A results.json of this model, with one number in it."""
    numbers = json.loads(json.dumps(EVALUATION)) | {"schema": 1, "created": "today"} | changes
    numbers["suite"]["fraction"] = 1.0
    (quantity,) = numbers["tasks"][0]["quantities"]
    measured = {name: {"protocol": {}, "bits_per_byte": own["value"]} for name, own in quantity["models"].items()}
    numbers["tasks"][0]["models"] = measured
    model = evaluated(folder)
    shape = vars(model_metadata(model))
    numbers["models"]["RiGPT"] |= {key: shape[key] for key in ("type", "parameters", "dtype")}
    numbers["models"]["RiGPT"]["sha256"] = fingerprint(model)
    place.mkdir(exist_ok=True)
    (place / "results.json").write_text(json.dumps(numbers))
    return place / "results.json"


def unloaded(folder: Path, **options) -> RepositoryContents:
    """The files, without loading the model, which takes long and is looked at elsewhere."""
    return repository_files(folder, check_loading=False, **options)


def published(folder: Path, **options) -> dict[str, bytes]:
    return {file.path: file.read() for file in unloaded(folder, **options).files}


def test_an_evaluation_goes_along_with_what_is_made_of_it(folder, tmp_path):
    results = evaluation_of(folder, tmp_path / "evaluation")
    for name in ("report.html", "table.md", "cache.json"):
        (tmp_path / "evaluation" / name).write_text("of another run")
    files = published(folder, results=results)
    names = {"evaluation/results.json", "evaluation/report.html", "evaluation/table.md"}
    assert {path for path in files if "evaluation" in path} == names
    assert b"| 1.250 (1.200 to 1.300) |" in files["evaluation/table.md"]
    page = files["evaluation/report.html"]
    assert page.startswith(b"<!DOCTYPE html>") and b"1.250" in page
    assert files["evaluation/results.json"] == results.read_bytes()
    assert not any(b"another run" in content for content in files.values())
    evaluation_of(folder, folder)
    assert "evaluation/results.json" in published(folder)


def test_results_that_make_no_page_go_alone(folder, tmp_path):
    results = tmp_path / "results.json"
    own = {"schema": 1, "models": {"it": {"sha256": fingerprint(evaluated(folder))}}, "tasks": []}
    results.write_text(json.dumps(own))
    (tmp_path / "report.html").write_text("of another run")
    contents = unloaded(folder, results=results)
    assert [file.path for file in contents.files if "evaluation" in file.path] == ["evaluation/results.json"]
    assert any(note.startswith("report.html is not published, as it cannot be made") for note in contents.notes)


def test_a_card_of_our_making_is_made_to_fit(folder, nothing_measured):
    """rigpt card FOLDER, then rigpt publish FOLDER me/tiny."""
    (folder / "README.md").unlink()
    write_card(folder)
    written = (folder / "README.md").read_text()
    assert 'from_pretrained("FOLDER"' in written
    contents = unloaded(folder, repo_id="tiny")
    assert contents.notes == ()
    text = card_in(contents)
    assert 'AutoModelForCausalLM.from_pretrained("tiny", trust' in text and "FOLDER" not in text
    # With the owner, who is known later; and the file is not touched.
    assert card_in(contents.for_repository("me/tiny")) == card_text(folder, repo_id="me/tiny")
    assert (folder / "README.md").read_text() == written
    # A person's card that says the same stays as it is, to the byte.
    mine = without_marker(written).replace("\n", "\r\n").encode()
    (folder / "README.md").write_bytes(mine)
    contents = unloaded(folder, repo_id="tiny").for_repository("me/tiny")
    assert card_in(contents).encode() == mine


def card_in(contents: RepositoryContents) -> str:
    return next(file for file in contents.files if file.path == "README.md").read().decode()


def test_a_card_of_our_making_takes_results_in(folder, tmp_path, nothing_measured):
    (tmp_path / "facts.yaml").write_text("license: mit")
    (folder / "README.md").unlink()
    write_card(folder, metadata=tmp_path / "facts.yaml")
    results = evaluation_of(folder, tmp_path / "evaluation")
    contents = unloaded(folder, repo_id="me/tiny", results=results)
    expected = card_text(folder, repo_id="me/tiny", results=results, metadata=tmp_path / "facts.yaml")
    assert card_in(contents) == expected and "bits_per_byte" in expected and "license: mit" in expected
    (note,) = contents.notes
    assert "was of an earlier evaluation or none, so another is published" in note
    # One that has them stays, even where they are not at hand.
    (folder / "README.md").write_text(expected)
    for given in (results, None):
        contents = unloaded(folder, repo_id="me/tiny", results=given)
        assert card_in(contents) == expected and contents.notes == ()
    # And so does a person's, who is told.
    for text, words in ((CARD, "is your own and stays"), (expected + "\nMine.\n", "was changed by hand and stays")):
        (folder / "README.md").write_text(text if text == CARD else text.replace("license: mit", "license: other"))
        changed = evaluation_of(folder, tmp_path / "evaluation", created="tomorrow")
        contents = unloaded(folder, repo_id="me/tiny", results=changed)
        assert card_in(contents) == (folder / "README.md").read_text()
        (note,) = contents.notes
        assert words in note and note.endswith("the results are not in it.")


def test_a_card_of_our_making_takes_a_base_in(folder, tmp_path, nothing_measured):
    """rigpt card FOLDER, then rigpt publish FOLDER me/tiny --base me/trained."""
    (tmp_path / "facts.yaml").write_text("license: mit")
    (folder / "README.md").unlink()
    write_card(folder, metadata=tmp_path / "facts.yaml")
    written = (folder / "README.md").read_text()
    contents = unloaded(folder, repo_id="me/tiny", base="me/trained")
    (tmp_path / "both.yaml").write_text("license: mit\nbase_model: me/trained")
    expected = card_text(folder, repo_id="me/tiny", metadata=tmp_path / "both.yaml")
    assert card_in(contents) == expected and "\nbase_model: me/trained\n" in expected
    assert "was of another base or none, so another is published" in contents.notes[0]
    assert (folder / "README.md").read_text() == written
    # One that names it stays, and an evaluation that is not at hand is not lost.
    (folder / "README.md").write_text(expected)
    assert unloaded(folder, repo_id="me/tiny", base="me/trained").notes == ()
    results = evaluation_of(folder, tmp_path / "evaluation")
    (folder / "README.md").write_text(card_text(folder, repo_id="me/tiny", results=results))
    with pytest.raises(ValueError, match="without the evaluation whose numbers are in it. Pass its results.json"):
        unloaded(folder, repo_id="me/tiny", base="me/trained")
    text = card_in(unloaded(folder, repo_id="me/tiny", base="me/trained", results=results))
    assert "base_model: me/trained" in text and "bits_per_byte" in text
    # One that somebody changed is refused.
    (folder / "README.md").write_text(written.replace("## Limits", "## Bounds"))
    with pytest.raises(ValueError, match="`base` is for a card .* was changed by hand. Name it there as base_model"):
        unloaded(folder, repo_id="me/tiny", base="me/trained")


def test_a_card_of_other_weights_is_not_published(folder, nothing_measured):
    (folder / "README.md").unlink()
    write_card(folder, repo_id="me/tiny")
    stale = (folder / "README.md").read_text()
    assert card_in(unloaded(folder, repo_id="me/tiny")) == stale
    (folder / "certificate.json").unlink()
    model = tiny_model(1, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="30KB")
    contents = unloaded(folder, repo_id="me/tiny")
    assert card_in(contents) == card_text(folder, repo_id="me/tiny") != stale
    assert "was of other weights, so another is published" in contents.notes[0]
    changed = stale.replace("## Limits", "## Bounds")
    (folder / "README.md").write_text(changed)
    with pytest.raises(ValueError, match="`card` must be of these weights, got .* changed since. Remove it") as error:
        unloaded(folder, repo_id="me/tiny")
    assert "\n" not in str(error.value)
    (folder / "README.md").write_text(without_marker(changed))  # as the message says
    assert card_in(unloaded(folder)) == without_marker(changed)


def test_tokens_of_all_kinds_are_found():
    for text, found in (
        ("hf_" + "aB3" * 12, True),
        ("hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJ-zY29_wZSI", True),
        ("hf_jwt_eyJhbGciOiJFZERTQSJ9.eyJ-zY29_wZSI", True),
        ("api_org_" + "aB3" * 12, True),
        ('TOKEN="hf_' + "aB3" * 12 + '"', True),
        ("TOKEN_hf_" + "aB3" * 12, True),
        ("hf_hub_download, hf_oauth_scopes, api_org_name", False),
        ("half_" + "aB3" * 12, False),
    ):
        files = [RepositoryFile("README.md", f"before {text} after".encode())]
        if not found:
            check_no_token(files)
            continue
        with pytest.raises(ValueError, match="must not hold an access token") as error:
            check_no_token(files)
        assert "aB3aB3" not in str(error.value) and "eyJ" not in str(error.value)
        check_no_token([RepositoryFile("model.safetensors", text.encode())])  # noise, not text
        weights = {"a": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}
        check_no_token([RepositoryFile("model.safetensors", save(weights, {"format": "pt"}))])
        for header in (save(weights, {"note": text.strip("TOKEN=")}), save({text: torch.ones(2)})):
            with pytest.raises(ValueError, match="must not hold an access token, got one in 'model-1.safetensors'"):
                check_no_token([RepositoryFile("model-1.safetensors", header)])


def test_a_card_is_written_where_there_is_none(folder, monkeypatch, tmp_path):
    (folder / "README.md").unlink()
    asked = []

    def card_text(*arguments, **options):
        asked.append((*arguments, options))
        return "---\n{}\n---\nwritten"

    monkeypatch.setattr(cards, "card_text", card_text)
    assert card_in(unloaded(folder, repo_id="me/tiny")) == "---\n{}\n---\nwritten"
    assert asked == [(folder, {"repo_id": "me/tiny", "results": None, "metadata": None})]
    (tmp_path / "card.md").write_text("# Mine")
    assert card_in(unloaded(folder, card=tmp_path / "card.md")) == "# Mine" and len(asked) == 1


def test_code_may_differ_if_it_is_meant_to(folder):
    with (folder / "modeling_rigpt.py").open("a") as file:
        file.write("\n# changed\n")
    with pytest.raises(ValueError, match=r"`modeling_rigpt.py` differs.*pass `force=True`"):
        repository_files(folder)
    assert repository_files(folder, force=True)


def test_paths_of_this_machine_stay_at_home(folder):
    record = json.loads((folder / "certificate.json").read_text())
    record |= {"source": "/home/alice/secret/gpt2 (GPT2LMHeadModel)", "target": "runs/alice-client-x/model"}
    (folder / "certificate.json").write_text(json.dumps(record))
    (folder / "merge.json").write_text(json.dumps({"sources": ["../../data/alice/a", "you/b"], "weights": [0.5, 0.5]}))
    files = {file.path: file for file in repository_files(folder).files}
    sent = json.loads(files["certificate.json"].read())
    assert sent["source"] == "gpt2 (GPT2LMHeadModel)" and sent["target"] == "model"
    assert sent["max_abs_logit_error"] == record["max_abs_logit_error"]
    assert json.loads(files["merge.json"].read())["sources"] == ["a", "you/b"]
    for file in files.values():
        if not file.path.endswith(".safetensors"):
            assert b"alice" not in file.read() and str(folder).encode() not in file.read()


def test_a_certificate_that_cannot_be_checked_stays_at_home(folder):
    model = tiny_model(0, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="30KB")
    certify(model, model).save(folder)
    contents = unloaded(folder)
    assert "certificate.json" in {file.path for file in contents.files} and contents.notes == ()
    # One that names no weights may be of any.
    record = json.loads((folder / "certificate.json").read_text())
    del record["weights_sha256"]
    (folder / "certificate.json").write_text(json.dumps(record))
    contents = unloaded(folder)
    assert "certificate.json" not in {file.path for file in contents.files}
    assert "certificate.json" in contents.left_out
    (note,) = contents.notes
    assert note.startswith("certificate.json is not published: its certificate names no weights.")


ODD = {"symmetry": {"vocab_size": 61}, "filling": {}}


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def change_config(folder: Path, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def damage_shard(folder: Path):
    shard = min(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


REFUSALS = {
    "no-config": (lambda f: (f / "config.json").unlink(), r"has no `config.json`"),
    "broken-config": (
        lambda f: (f / "config.json").write_text("{"),
        r"readable `config.json`, .* no JSON at line 1",
    ),
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
    "damaged": (damage_shard, r"model-00001.* cut or damaged"),
    "other-sizes": (lambda f: change_config(f, num_hidden_layers=4), r"lacks `model.layers.3"),
    "fewer-layers": (lambda f: change_config(f, num_hidden_layers=2), r"has no place for `model.layers.2"),
    "auto-map-of-another-kind": (lambda f: change_config(f, auto_map="x"), r"config.json of this package.*'x'"),
    "classes-of-another-kind": (lambda f: change_config(f, architectures=5), r"config.json of this package.* 5"),
    "no-auto-map": (lambda f: change_config(f, auto_map=None), r"must have an `auto_map`"),
    "auto-map-elsewhere": (
        lambda f: change_config(f, auto_map={"AutoModelForCausalLM": "other/repo--modeling_rigpt.RiGPTForCausalLM"}),
        r"bring the code.*'other/repo--",
    ),
    "auto-map-of-no-class": (
        lambda f: change_config(f, auto_map={"AutoModelForCausalLM": "modeling_rigpt.RiGPTForCausal"}),
        r"hold the classes.*lacks `modeling_rigpt.RiGPTForCausal`",
    ),
    "code-absent": (lambda f: (f / "scores_rigpt.py").unlink(), r"code.*lacks `scores_rigpt.py`"),
    "more-code": (lambda f: (f / "setup.py").write_text(""), r"code.*also has `setup.py`"),
    "broken-card": (
        lambda f: (f / "README.md").write_text("---\na: [\n---\n"),
        r"`card` must be Markdown with metadata",
    ),
    "certificate-of-another-precision": (
        lambda f: tiny_model(0, dtype=torch.bfloat16).save_pretrained(f, max_shard_size="30KB"),
        r"certificate of its own weights or none.*of other weights\. Remove it",
    ),
    "certificate-of-another-configuration": (
        lambda f: change_config(f, rms_norm_eps=10.0),
        r"certificate of its own weights or none.*no longer compute what its certificate says\. Remove it",
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
    "token-in-header": (
        lambda f: [save_file(load_file(s), s, {"format": "pt", "by": "hf_" + "aB3" * 12}) for s in shards_of(f)],
        r"must not hold an access token.*'model-00001-of-.*.safetensors'",
    ),
    "frame-list": (lambda f: change_config(f, token_symmetry=ODD | {"frame": ["x"]}), "`token_symmetry` must have"),
    "frame-object": (lambda f: change_config(f, token_symmetry=ODD | {"frame": {}}), "`token_symmetry` must have"),
    "token": (
        lambda f: (f / "README.md").write_text("hf_" + "aB3" * 12),
        r"must not hold an access token.*'README.md'",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.by_default(16)
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
        (
            {"repo_id": "me/my model"},
            r"`repo` must be the name of a repository on the Hub such as me/my-model.*'me/my model'",
        ),
        ({"repo_id": "a/b/c"}, r"`repo` must be the name"),
        ({"revision": "a" * 40}, r"`revision` must be the name of a branch"),
        ({"revision": "a b"}, r"`revision` must be the name of a branch"),
        ({"revision": "a" * 10_000}, r"`revision` must be the name of a branch, got 'a{79}\."),
        ({"revision": "a..b"}, r"`revision` must be the name of a branch"),
        ({"revision": "refs/pr/1"}, r"`revision` must be the name of a branch"),
        ({"token": "two\nlines8840"}, r"`token` must be one word of ASCII characters.*not shown"),
        ({"token": ""}, r"`token` must be an access token of the Hub, got none.*hf auth login"),
        ({"results": "absent.json"}, r"`results` must be the results.json of an evaluation"),
        ({"card": "absent.md"}, r"`card` must be a Markdown file"),
        ({"metadata": "facts.yaml"}, r"`metadata` are for a card that is written"),
        ({}, r"HF_HUB_OFFLINE forbids"),
    ],
)
def test_arguments_that_cannot_be(arguments, message, folder):
    with pytest.raises(ValueError, match=message) as error:
        publish(folder, **{"repo_id": "me/tiny", "token": WRITE} | arguments)
    assert "\n" not in str(error.value)
    assert "8840" not in str(error.value) and WRITE not in str(error.value)


def test_what_is_overwritten():
    assert foreign(["README.md", "model.safetensors"], "rigpt") is None
    assert foreign(["README.md", ".gitattributes", "data.csv"], None) is None
    assert foreign(["config.json"], "gpt2") == "a model of type 'gpt2'"
    assert "`model.gguf`" in foreign(["model.gguf"], None)
    managed = ["model.safetensors", "modeling_rigpt.py", "tokenizer.json", "evaluation/table.md", "config.json"]
    assert all(is_managed(path) for path in managed)
    kept = ["eval.py", "adapter_model.safetensors", "README.md", ".gitattributes", "LICENSE", "data/model.safetensors"]
    kept += ["evaluation/mine.md", "demo/app.py"]
    assert not any(is_managed(path) for path in kept)
