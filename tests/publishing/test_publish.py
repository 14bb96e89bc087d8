"""Against a Hub on the loopback: what is published loads for a stranger, and no token is ever seen."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rigpt_hf.conversion import certify
from rigpt_hf.publishing import hub as hub_module
from rigpt_hf.publishing import upload_space
from rigpt_hf.publishing.repository import repository_files
from rigpt_hf.publishing.upload import PublishedReport
from tests.evaluation.toys import word_tokenizer
from tests.model.agreement import difference
from tests.model.test_remote_code import WITHOUT_PACKAGE
from tests.models import tiny_model, tokens
from tests.publishing.hub_server import HubServer
from tests.tolerances import SYMMETRY


ROOT = Path(__file__).resolve().parents[2]
# Long words of no meaning, so that a search for them finds nothing else.
WRITE, READ, REFUSED = "hf_mayWrite7391", "hf_mayRead5528", "hf_unknown8840"
CARD = "---\nlicense: apache-2.0\n---\n\n# A tiny model\n\n![Loss](pictures/loss.png)\n"
# Runs commands one after the other, each with a token of its own, and gives code, output and errors of each.
COMMANDS = """
import contextlib, io, json, os, sys, time, traceback
from rigpt_hf.cli import app, main
if not any(command.callback.__name__ == "publish" for command in app.registered_commands):
    from rigpt_hf.cli.publishing import publish
    app.command()(publish)
time.sleep = lambda seconds: None  # the client waits between its tries
answers = []
for arguments, token in json.load(sys.stdin):
    os.environ["HF_TOKEN"] = token
    sys.argv = ["rigpt", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            code = traceback.print_exc() or 1
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""
LOAD = """
import sys, torch
from huggingface_hub import list_repo_files, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
repo_id, place, *revisions = sys.argv[1:]
input_ids = torch.load(place + "/input_ids.pt")
for revision in revisions:
    model = AutoModelForCausalLM.from_pretrained(
        repo_id, trust_remote_code=True, revision=revision, code_revision=revision
    )
    with torch.no_grad():
        torch.save(model.eval()(input_ids).logits, f"{place}/{revision}.pt")
print(type(model).__module__, *list_repo_files(repo_id, revision=revision), sep="\\n")
snapshot_download(repo_id, revision=revision, local_dir=place + "/copy")
"""
PUSH = """
import sys
from rigpt_hf import RiGPTForCausalLM
commit = RiGPTForCausalLM.from_pretrained(sys.argv[1]).push_to_hub(sys.argv[2])
print("commit", commit.oid)
"""


@pytest.fixture
def hub():
    with HubServer({WRITE: ("me", "write"), READ: ("me", "read")}) as server:
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(tmp_path / "model")


def save(folder: Path, seed: int = 0, shards: str = "30KB") -> Path:
    """A whole model with all that may lie beside it."""
    model = tiny_model(seed, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size=shards)
    word_tokenizer(["<s>", " a", " b"]).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    certify(model, model).save(folder)
    (folder / "notes.txt").write_text("not for others")
    (folder / "pictures").mkdir()
    for name in ("loss.png", "other.png"):
        (folder / "pictures" / name).write_bytes(b"picture")
    return folder


def logits(seed: int) -> torch.Tensor:
    return tiny_model(seed, dtype=torch.float32)(tokens(2, 7)).logits.detach()


def process(script: str, *arguments: str, place: Path, endpoint: str, stdin: str = "", **environment: str):
    """A fresh Python that takes `endpoint` for the Hub; on success what it printed, with what it logged."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    variables |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(place / "hf"), "HF_HUB_DISABLE_XET": "1", "COLUMNS": "300"}
    place.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        cwd=place,
        env=variables | {"HF_HUB_DISABLE_TELEMETRY": "1"} | environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def rigpt(*commands: tuple[list, str], place: Path, endpoint: str) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of commands of `rigpt`, each with its token."""
    stdin = json.dumps([([str(argument) for argument in arguments], token) for arguments, token in commands])
    out, err = process(COMMANDS, place=place, endpoint=endpoint, stdin=stdin, PYTHONPATH=str(ROOT))
    (place / "printed.txt").write_text(out + err)
    return [tuple(answer) for answer in json.loads(out.splitlines()[-1])]


def places_of(token: str, folder: Path) -> list[str]:
    """The files below a folder that hold a token."""
    return [path.name for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


def check_no_token_seen(place: Path):
    assert (place / "printed.txt").is_file()
    for token in (WRITE, READ, REFUSED):
        assert places_of(token, place) == []
    (place / "planted.txt").write_text(f"before{WRITE}after")  # and the search would have found it
    assert places_of(WRITE, place) == ["planted.txt"]


def commit_of(out: str) -> str:
    return out.split('revision="')[1].split('"')[0]


@pytest.mark.slow
def test_published_models_load_where_the_package_is_not_installed(hub, folder, tmp_path):
    second = save(tmp_path / "second", seed=1, shards="1GB")
    place = tmp_path / "place"
    rehearsal, first, again, update, branch = rigpt(
        (["publish", folder, "me/tiny", "--dry-run"], ""),
        (["publish", folder, "me/tiny"], WRITE),
        (["publish", folder, "tiny"], WRITE),
        (["publish", second, "me/tiny"], WRITE),
        (["publish", folder, "me/tiny", "--revision", "old/one"], WRITE),
        place=place,
        endpoint=hub.endpoint,
    )
    assert [answer[0] for answer in (rehearsal, first, again, update, branch)] == [0] * 5, (first, update, branch)
    assert hub.requests[0] == "GET /api/whoami-v2" and "Nothing was sent." in rehearsal[1]
    contents = repository_files(folder)
    for file in contents.files:
        assert f" {file.path} " in rehearsal[1] and hub.files("me/tiny", commit_of(first[1]))[file.path] == file.read()
    assert "Left out: notes.txt" in first[1]
    assert commit_of(again[1]) == commit_of(first[1]) != commit_of(update[1])
    assert not any("xet" in request for request in hub.requests)
    commits = [line for line in hub.requests if "/commit/" in line]
    assert len(commits) == 3, "one commit for each that changes anything"
    # Of the first model, which had more files, nothing is left beside the second.
    names = {name for name in hub.files("me/tiny") if name.endswith((".safetensors", ".index.json"))}
    assert names == {"model.safetensors"} and "Removed there: model-00001" in update[1]
    assert hub.repos["me/tiny"].branches["old/one"] == commit_of(branch[1])
    check_no_token_seen(place)

    torch.save(tokens(2, 7), place / "input_ids.pt")
    pinned, newest = commit_of(first[1]), commit_of(update[1])
    arguments = ("me/tiny", str(place), pinned, newest)
    out, _ = process(WITHOUT_PACKAGE + LOAD, *arguments, place=place, endpoint=hub.endpoint)
    module, *listed = out.splitlines()
    assert module.startswith("transformers_modules.me.tiny")
    assert set(listed) == set(hub.files("me/tiny"))
    for revision, seed in ((pinned, 0), (newest, 1)):
        assert difference(torch.load(place / f"{revision}.pt"), logits(seed)) <= SYMMETRY[torch.float32]
        assert difference(torch.load(place / f"{revision}.pt"), logits(1 - seed)) > 0.1
    for name, content in hub.files("me/tiny").items():
        assert (place / "copy" / name).read_bytes() == content
    assert hub.leaks == []


@pytest.mark.slow
def test_a_space_shows_the_commit_that_was_published(hub, folder, tmp_path):
    for name in ("taken", "mine"):
        hub.put_files(f"spaces/me/{name}", {"app.py": b"print('mine')"})
    hub.put_files("me/hidden", {"README.md": b""})
    hub.repos["me/hidden"].private = True
    bare = tmp_path / "bare"
    tiny_model(0, dtype=torch.float32).save_pretrained(bare)
    (bare / "README.md").write_text(CARD)
    place = tmp_path / "place"
    shown = ["--space", "--baseline", "me/stock"]
    refusals = {
        "which holds 'app.py' and no settings of ours": [folder, "me/new", *shown, "--space-repo", "me/mine"],
        "`space` needs a model with its tokenizer": [bare, "me/new", *shown],
        "`baseline` must be given": [folder, "me/new", "--space"],
        "are for a Space": [folder, "me/new", "--baseline", "me/stock"],
        "`private` is not for a model with a Space": [folder, "me/new", *shown, "--private"],
        "`space` needs a public model": [folder, "hidden", *shown],
        "`repo` must be a name": [folder, "me/new", *shown, "--space-repo", "bad id"],
        "`baseline` must be": [folder, "me/new", "--space", "--baseline", "/home/me/gpt2 x"],
        "`token` must have the right to write": [folder, "me/new", *shown, "--space-repo", "you/theirs"],
    }
    model, again, forced, *refused = rigpt(
        (["publish", folder, "me/tiny", *shown], WRITE),
        (["publish", folder, "me/tiny", *shown], WRITE),
        (["publish", folder, "me/tiny", *shown, "--space-repo", "taken", "--force"], WRITE),
        *((["publish", *arguments], WRITE) for arguments in refusals.values()),
        place=place,
        endpoint=hub.endpoint,
    )
    assert [answer[0] for answer in (model, again, forced)] == [0, 0, 0], (model, forced)
    assert f"Space: {hub.endpoint}/spaces/me/tiny" in model[1]
    files = hub.files("spaces/me/tiny")
    assert {"app.py", "README.md", "requirements.txt", "settings.json"} <= set(files)
    settings = json.loads(files["settings.json"])
    assert settings["revision"] == commit_of(again[1]) and settings["model"] == "me/tiny"
    assert b"models:\n- me/tiny" in files["README.md"]
    assert b"gradio" in hub.files("spaces/me/taken")["app.py"]
    for message, (code, _, err) in zip(refusals, refused, strict=True):
        *bars, line = err.splitlines()
        assert code == 2 and message in line and not any("Error" in bar for bar in bars), err
    # All of that is known before the model is published, but for whose the other Space is.
    assert set(hub.files("me/hidden")) == {"README.md"} and "spaces/me/hidden" not in hub.repos
    assert "me/new" not in hub.repos or "The model is published at" in refused[-1][2]
    check_no_token_seen(place)


@pytest.mark.parametrize("private", [True, False])
def test_no_space_is_made_of_a_model_that_arrived_private(private, monkeypatch):
    """As an organization may have it for all new repositories."""
    made = []

    class Api:
        endpoint = "https://hub"

        def __init__(self, **options):
            pass

        def model_info(self, repo_id):
            return SimpleNamespace(private=private)

        def space_info(self, repo_id):
            return SimpleNamespace(siblings=[])

        def create_repo(self, repo_id, **options):
            made.append(repo_id)

        def create_commit(self, repo_id, operations, **options):
            made.append(len(operations))
            return SimpleNamespace(oid="1" * 40)

    monkeypatch.setattr(hub_module, "HfApi", Api)
    report = PublishedReport("team/tiny", "https://hub/team/tiny", "0" * 40, "main", (), (), ())
    if private:
        with pytest.raises(ValueError, match="`space` needs a public model, .* got the private 'team/tiny'"):
            upload_space.publish_space(report, baseline="me/stock", token=WRITE)
        assert made == []
    else:
        upload_space.publish_space(report, baseline="me/stock", token=WRITE)
        assert made == ["team/tiny", 4]


@pytest.mark.slow
def test_a_broken_upload_goes_on_where_it_was(hub, folder, tmp_path):
    shards = {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    broken = min(shards)
    hub.cut = {broken}
    command = (["publish", folder, "me/tiny"], WRITE)
    (code, _, err) = rigpt(command, place=tmp_path / "first", endpoint=hub.endpoint)[0]
    *bars, line = err.splitlines()
    assert code == 2 and not any("Error" in bar for bar in bars), err
    assert line.startswith("rigpt: The upload to 'me/tiny' broke off (") and "Say the same command again" in line
    assert hub.broken_puts[broken] > 1, "the client tries again by itself"
    assert set(hub.files("me/tiny")) == {".gitattributes"}, "and nothing is half there"
    arrived = dict(hub.puts)
    assert set(arrived) == shards - {broken}

    hub.cut = set()
    (code, out, err) = rigpt(command, place=tmp_path / "second", endpoint=hub.endpoint)[0]
    assert code == 0, err
    assert dict(hub.puts) == dict.fromkeys(shards, 1), "what had arrived was not sent again"
    assert set(hub.files("me/tiny", commit_of(out))) >= {file.path for file in repository_files(folder).files}
    for place in ("first", "second"):
        check_no_token_seen(tmp_path / place)


@pytest.mark.slow
def test_what_the_hub_refuses(hub, folder, tmp_path):
    hub.echo_tokens = True
    gpt2 = json.dumps({"model_type": "gpt2"}).encode()
    hub.put_files(
        "me/other", {"config.json": gpt2, "pytorch_model.bin": b"x", "tokenizer.json": b"x", "mine.txt": b"x"}
    )
    hub.put_files("you/theirs", {"README.md": b""})
    cases = [
        ([folder, "me/tiny"], REFUSED, r"`token` must be one that the Hub accepts"),
        ([folder, "me/tiny"], READ, r"`token` must have the right to write, got one of 'me' that may only read"),
        ([folder, "me/tiny"], "", r"`token` must be an access token of the Hub, got none"),
        ([folder, "you/new"], WRITE, r"`token` must have the right to write to 'you/new'"),
        ([folder, "you/theirs"], WRITE, r"`token` must have the right to write to 'you/theirs'"),
        ([folder, "me/other"], WRITE, r"`repo` must be new, or hold a RiGPT to update"),
        ([folder, "me/other", "--private"], WRITE, r"'me/other' is there and public"),
        ([folder, "me/bad name"], WRITE, r"`repo` must be a name"),
    ]
    before = {repo_id: hub.files(repo_id) for repo_id in hub.repos}
    place = tmp_path / "place"
    *refused, forced, hidden, updated, traced = rigpt(
        *((["publish", *arguments], token) for arguments, token, _ in cases),
        (["publish", folder, "me/other", "--force"], WRITE),
        (["publish", folder, "me/hidden", "--private"], WRITE),
        (["publish", folder, "me/hidden", "--revision", "main"], WRITE),
        (["--debug", "publish", folder, "me/tiny"], REFUSED),
        place=place,
        endpoint=hub.endpoint,
    )
    for (_, _, message), (code, _, err) in zip(cases, refused, strict=True):
        assert code == 2 and message in err and len(err.splitlines()) == 1, err
    assert "with [token]" in refused[3][2], "the server repeats the token"
    assert traced[0] == 1 and "Traceback" in traced[2] and cases[0][2] in traced[2]
    assert (
        before["you/theirs"] == hub.files("you/theirs") and "you/new" not in hub.repos and "me/tiny" not in hub.repos
    )
    assert forced[0] == 0, forced
    files = hub.files("me/other")
    assert "pytorch_model.bin" not in files and files["mine.txt"] == b"x" and b"rigpt" in files["config.json"]
    assert before["me/other"]["config.json"] == gpt2
    assert hidden[0] == 0 and hub.repos["me/hidden"].private and not hub.repos["me/other"].private
    assert updated[0] == 0
    check_no_token_seen(place)

    with socket.socket() as nobody:  # takes an address at which nothing answers
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        place = tmp_path / "alone"
        (code, _, err) = rigpt((["publish", folder, "me/tiny"], WRITE), place=place, endpoint=endpoint)[0]
    assert code == 2 and f"{endpoint} cannot be reached" in err and "Nothing was sent" in err, err
    check_no_token_seen(place)


@pytest.mark.slow
def test_push_to_hub_brings_the_code(hub, tmp_path):
    folder, place = tmp_path / "model", tmp_path / "place"
    tiny_model(0, dtype=torch.float32).save_pretrained(folder)
    arguments = {"place": place, "endpoint": hub.endpoint}
    out, err = process(PUSH, str(folder), "me/tiny", **arguments, PYTHONPATH=str(ROOT), HF_TOKEN=WRITE)
    (place / "printed.txt").write_text(out + err)
    commit = out.split()[-1]
    files = hub.files("me/tiny", commit)
    assert "AutoModelForCausalLM" in json.loads(files["config.json"])["auto_map"]
    assert {"modeling_rigpt.py", "model.safetensors", "README.md"} <= set(files)
    assert {name for name in files if name.endswith(".py")} == {path.name for path in folder.glob("*.py")}
    assert b'from_pretrained("me/tiny"' in files["README.md"] and b"no preferred basis" in files["README.md"]
    check_no_token_seen(place)
    torch.save(tokens(2, 7), place / "input_ids.pt")
    out, _ = process(WITHOUT_PACKAGE + LOAD, "me/tiny", str(place), commit, **arguments)
    assert out.startswith("transformers_modules.me.tiny")
    assert difference(torch.load(place / f"{commit}.pt"), logits(0)) <= SYMMETRY[torch.float32]
    assert difference(torch.load(place / f"{commit}.pt"), logits(1)) > 0.1
    assert hub.leaks == []


@pytest.mark.slow
def test_xet_is_left_on_for_others(hub, folder, tmp_path):
    pytest.importorskip("hf_xet", reason="needs hf_xet, which the client uses where it is installed")
    stdin = json.dumps([(["publish", str(folder), "me/tiny"], WRITE)])
    place, path = tmp_path / "place", str(ROOT)
    out, err = process(
        COMMANDS, place=place, endpoint=hub.endpoint, stdin=stdin, PYTHONPATH=path, HF_HUB_DISABLE_XET="0"
    )
    (place / "printed.txt").write_text(out + err)
    assert "GET /api/models/me/tiny/xet-write-token/main" in hub.requests
    assert json.loads(out.splitlines()[-1])[0][0] == 2, "this Hub has no Xet"
    check_no_token_seen(place)
