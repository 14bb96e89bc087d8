"""Nothing from outside of its folder is published with a model, and nothing from a folder is run."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import dynamic_module_utils

from rigpt_hf.publishing.repository import INDEX, repository_files
from rigpt_hf.publishing.rotation_view import load_subjects
from tests.publishing.conftest import save


def linked(name: str, target: str = "../outside.txt"):
    def place(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return place


def named(shard: str):
    def place(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][min(index["weight_map"])] = shard
        (folder / INDEX).write_text(json.dumps(index))

    return place


def templates_elsewhere(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere/a.jinja").write_text("secret")
    (folder / "additional_chat_templates").symlink_to("../elsewhere")


def in_two_steps(folder: Path) -> None:
    linked("notes.txt")(folder)
    linked("LICENSE", "notes.txt")(folder)


LINKS = ("LICENSE", "NOTICE.md", "merges.txt", "vocab.json", "chat_template.jinja", "tokenizer_config.json")
LINKS += ("config.json", "generation_config.json", "certificate.json", "modeling_rigpt.py", INDEX)
LINKS += ("README.md", "results.json", "pictures/loss.png", "additional_chat_templates/a.jinja")
CASES = {name: (linked(name, "../" * name.count("/") + "../outside.txt"), f"{name!r}, a link to '") for name in LINKS}
CASES |= {
    "chain": (in_two_steps, "'LICENSE', a link to '"),
    "folder of templates": (templates_elsewhere, "additional_chat_templates/a.jinja"),
    "absolute": (named("/etc/hostname"), f"whose `{INDEX}` names '/etc/hostname'"),
    "above": (named("../outside.safetensors"), f"whose `{INDEX}` names '../outside.safetensors'"),
    "backslashes": (named("..\\outside.safetensors"), f"whose `{INDEX}` names "),
    "no weights": (named("notes.txt"), f"whose `{INDEX}` names 'notes.txt'"),
    "no name": (named(None), f"whose `{INDEX}` names 'None'"),
}


@pytest.mark.parametrize("case", CASES)
def test_files_from_outside_are_refused(case, folder):
    place, message = CASES[case]
    for name in ("outside.txt", "outside.safetensors"):
        (folder.parent / name).write_text('{"secret": 1}')
    place(folder)
    with pytest.raises(ValueError, match="`folder` must hold it") as error:
        repository_files(folder, check_loading=False)
    assert message in str(error.value) and "\n" not in str(error.value) and "secret" not in str(error.value)


def test_nothing_is_created_for_a_folder_that_is_refused(hub, folder, rigpt):
    (folder.parent / "outside.txt").write_text("secret")
    linked("LICENSE")(folder)
    code, _, err = rigpt("publish", folder, "me/tiny")
    assert code == 2 and "`FOLDER` must hold itself all that is published" in err
    assert "me/tiny" not in hub.repos and not any("POST" in request for request in hub.requests)


def test_links_within_a_folder_and_within_the_cache_are_as_files(folder, tmp_path, monkeypatch):
    (folder / "licences").mkdir()
    (folder / "licences/apache.txt").write_text("free")
    linked("LICENSE", "licences/apache.txt")(folder)
    linked("mine.txt", "../outside.txt")(folder)  # stays at home, as every file that is not of a model
    alone = {file.path: file.read() for file in repository_files(folder, check_loading=False).files}
    assert alone["LICENSE"] == b"free" and "mine.txt" not in alone
    # As the library keeps what it fetched.
    home = tmp_path / "hub/models--me--tiny"
    snapshot = Path(shutil.copytree(folder, home / "snapshots/0123", symlinks=True))
    (home / "blobs").mkdir()
    for number, path in enumerate(path for path in snapshot.iterdir() if path.is_file() and path.name != "mine.txt"):
        blob = home / f"blobs/{number}"
        blob.write_bytes(path.read_bytes())
        path.unlink()
        path.symlink_to(f"../../blobs/{number}")
    fetched = {file.path: file.read() for file in repository_files(snapshot, check_loading=False).files}
    assert fetched == alone
    # A folder of somebody's with links into the cache, and one with links to what is no blob there.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    linked("LICENSE", str(snapshot / "LICENSE"))(folder)
    assert repository_files(folder, check_loading=False).files
    (tmp_path / "hub/version.txt").write_text("1")
    linked("LICENSE", str(tmp_path / "hub/version.txt"))(folder)
    with pytest.raises(ValueError, match="`folder` must hold itself"):
        repository_files(folder, check_loading=False)


def foreign(folder: Path, file: str, names: dict[str, str], **changes) -> None:
    """Code of the folder's own that leaves a file beside it when it is run."""
    marker = folder.parent / "ran"
    classes = "class Config(Base): model_type = 'stranger'\nclass Other: from_pretrained = None"
    code = (
        f"from pathlib import Path\nfrom transformers import PreTrainedConfig as Base\nPath({str(marker)!r}).touch()\n"
    )
    (folder / "stranger.py").write_text(code + classes)
    values = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    auto_map = {key: f"stranger.{name}" for key, name in names.items()}
    (folder / file).write_text(json.dumps(values | changes | {"auto_map": auto_map}))


MODELS = {"AutoConfig": "Config", "AutoModelForCausalLM": "Other"}
FOREIGN = {
    "an unknown type": ("config.json", MODELS, {"model_type": "stranger", "architectures": ["Stranger"]}),
    "a type of ours": ("config.json", MODELS, {}),
    "a tokenizer": ("tokenizer_config.json", {"AutoTokenizer": "Other"}, {"tokenizer_class": "Stranger"}),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_space_runs_no_code_of_a_model(case, folder, monkeypatch):
    """Not even where somebody says yes to all that is asked."""
    file, names, changes = FOREIGN[case]
    # One that no stock class has, so that the Space needs a baseline.
    folder = save(folder.parent / "apart", attention_score="squared_distance")
    foreign(folder, file, names, **changes)
    monkeypatch.setattr("builtins.input", lambda *arguments: "y")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder.parent / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    if case == "an unknown type":
        with pytest.raises(ValueError):
            load_subjects(str(folder), baseline=str(folder))
    else:
        with pytest.raises(ValueError, match="`baseline` must be given|`model` must come with its tokenizer"):
            load_subjects(str(folder))
    assert not (folder.parent / "ran").exists()
