"""Against a Hub on the loopback: what is published loads for a stranger, and no token is ever seen."""

import hashlib
import json
import socket
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.publishing import hub as hub_module
from rigpt_hf.publishing.repository import repository_files
from rigpt_hf.publishing.space import FILES, publish_space
from rigpt_hf.publishing.upload import PublishedReport
from tests.model.agreement import difference
from tests.model.test_remote_code import WITHOUT_PACKAGE
from tests.models import tiny_model, tokens
from tests.processes import run
from tests.publishing.conftest import CARD, READ, REFUSED, WRITE, save, talk_to
from tests.tolerances import SYMMETRY


LOAD = """
import json, sys, torch
from huggingface_hub import constants, hf_api, snapshot_download
from transformers import AutoModelForCausalLM
vars(constants).update(json.loads(sys.argv[3]))  # as variables of the environment would, were they read again
hf_api.api.endpoint = constants.ENDPOINT
place, commits = sys.argv[1], json.loads(sys.argv[2])
input_ids = torch.load(place + "/input_ids.pt")
for repo_id, commit in commits:
    pinned = {} if commit == "main" else {"revision": commit, "code_revision": commit}
    model = AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True, **pinned)
    with torch.no_grad():
        torch.save(model.eval()(input_ids).logits, f"{place}/{commit}.pt")
    print(type(model).__module__)
    snapshot_download(repo_id, revision=commit, local_dir=f"{place}/{commit}")
"""


def load_elsewhere(endpoint: str, place, commits: list[tuple[str, str]]) -> list[str]:
    """Modules of the models at commits, loaded by a process in which this package cannot be imported."""
    torch.save(tokens(2, 7), place / "input_ids.pt")
    constants = {"ENDPOINT": endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    constants |= {"HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}"}
    constants |= {"HF_HUB_CACHE": str(place / "elsewhere/hub")}
    done = run("-c", WITHOUT_PACKAGE + LOAD, place, json.dumps(commits), json.dumps(constants), cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def commit_of(out: str) -> str:
    return out.split('revision="')[1].split('"')[0]


@pytest.mark.slow
def test_published_models_load_where_the_package_is_not_installed(hub, folder, tmp_path, place, rigpt):
    second = save(tmp_path / "second", seed=1, shards="1GB")
    code, rehearsal, _ = rigpt("publish", folder, "me/tiny", "--dry-run", token="")
    assert code == 0 and "Nothing was sent." in rehearsal and hub.requests == []
    published = [
        rigpt("publish", folder, "me/tiny"),
        rigpt("publish", folder, "tiny"),
        rigpt("publish", second, "me/tiny"),
        rigpt("publish", folder, "me/tiny", "--revision", "old/one"),
    ]
    assert [answer[0] for answer in published] == [0] * 4, published
    first, again, update, branch = (out for _, out, _ in published)
    for file in repository_files(folder, repo_id="me/tiny").files:
        assert f" {file.path} " in rehearsal and hub.files("me/tiny", commit_of(first))[file.path] == file.read()
    assert "Left out: notes.txt" in first and first.endswith("\nNext: rigpt generate me/tiny TEXT\n")
    assert branch.endswith("\nNext: rigpt generate me/tiny TEXT --revision old/one\n")
    assert commit_of(again) == commit_of(first) != commit_of(update)
    assert not any("xet" in request for request in hub.requests)
    assert len([line for line in hub.requests if "/commit/" in line]) == 3, "one commit for each that changes anything"
    # Of the first model, which had more files, nothing is left beside the second.
    names = {name for name in hub.files("me/tiny") if name.endswith((".safetensors", ".index.json"))}
    assert names == {"model.safetensors"} and "Removed there: model-00001" in update
    assert hub.repos["me/tiny"].branches["old/one"] == commit_of(branch)

    # `push_to_hub` brings the code and the card of a RiGPT too.
    bare = tmp_path / "bare"
    tiny_model(0, dtype=torch.float32).save_pretrained(bare)
    pushed = RiGPTForCausalLM.from_pretrained(bare).push_to_hub("me/pushed").oid
    files = hub.files("me/pushed", pushed)
    assert "AutoModelForCausalLM" in json.loads(files["config.json"])["auto_map"]
    assert {"modeling_rigpt.py", "model.safetensors", "README.md"} <= set(files)
    assert {name for name in files if name.endswith(".py")} == {path.name for path in bare.glob("*.py")}
    assert b'from_pretrained("me/pushed"' in files["README.md"] and b"no preferred basis" in files["README.md"]

    commits = [("me/tiny", commit_of(first)), ("me/tiny", commit_of(update)), ("me/pushed", pushed)]
    modules = load_elsewhere(hub.endpoint, place, commits)
    logits = [tiny_model(seed, dtype=torch.float32)(tokens(2, 7)).logits.detach() for seed in (0, 1)]
    for (repo_id, commit), module, seed in zip(commits, modules, (0, 1, 0), strict=True):
        assert module.startswith(f"transformers_modules.{repo_id.replace('/', '.')}")
        loaded = torch.load(place / f"{commit}.pt")
        assert difference(loaded, logits[seed]) <= SYMMETRY[torch.float32]
        assert difference(loaded, logits[1 - seed]) > 0.1
        for name, content in hub.files(repo_id, commit).items():
            assert (place / commit / name).read_bytes() == content
    assert hub.leaks == []


def test_a_rehearsal_lists_the_space_too(hub, folder, rigpt):
    code, out, _ = rigpt("publish", folder, "me/tiny", "--space", "--baseline", "me/stock", "--dry-run", token="")
    assert code == 0 and hub.requests == []
    before, after = out.split("would go to me/tiny. Nothing was sent.")
    assert " config.json " in before and " app.py " not in before
    assert all(f" {name} " in after for name in FILES) and "4 files" in after
    assert "would go to the Space me/tiny. Nothing was sent." in after and "The Space installs rigpt-hf" in after
    assert "is built once the index has that" in after


@pytest.mark.slow
@pytest.mark.full
def test_a_space_shows_the_commit_that_was_published(hub, folder, tmp_path, rigpt):
    for name in ("taken", "mine"):
        hub.put_files(f"spaces/me/{name}", {"app.py": b"print('mine')"})
    hub.put_files("me/hidden", {"README.md": b""})
    hub.repos["me/hidden"].private = True
    bare = tmp_path / "bare"
    tiny_model(0, dtype=torch.float32).save_pretrained(bare)
    (bare / "README.md").write_text(CARD)
    shown = ["--space", "--baseline", "me/stock"]
    for more in ([], [], ["--space-repo", "taken", "--force"]):
        code, out, err = rigpt("publish", folder, "me/tiny", *shown, *more)
        assert code == 0, err
        assert more or f"Space: {hub.endpoint}/spaces/me/tiny" in out
    files = hub.files("spaces/me/tiny")
    assert {"app.py", "README.md", "requirements.txt", "settings.json"} <= set(files)
    settings = json.loads(files["settings.json"])
    assert settings["revision"] == commit_of(out) and settings["model"] == "me/tiny"
    assert b"models:\n- me/tiny" in files["README.md"]
    assert b"gradio" in hub.files("spaces/me/taken")["app.py"]
    apart = save(folder.parent / "apart", attention_score="squared_distance")  # which no stock class has
    for message, arguments in {
        "which holds 'app.py' and no settings of ours": [folder, "me/new", *shown, "--space-repo", "me/mine"],
        "`--space` needs a model with its tokenizer": [bare, "me/new", *shown],
        "`--baseline` must be given": [apart, "me/new", "--space"],
        "are for a Space": [folder, "me/new", "--baseline", "me/stock"],
        "`--private` is not for a model with a Space": [folder, "me/new", *shown, "--private"],
        "`--space` needs a public model": [folder, "hidden", *shown],
        "`--space-repo` must be the name": [folder, "me/new", *shown, "--space-repo", "bad id"],
        "`--baseline` must be": [folder, "me/new", "--space", "--baseline", "/home/me/gpt2 x"],
        "`HF_TOKEN` must have the right to write": [folder, "me/new", *shown, "--space-repo", "you/theirs"],
    }.items():
        code, _, err = rigpt("publish", *arguments)
        *bars, line = err.splitlines()
        assert code == 2 and message in line and not any("Error" in bar for bar in bars), err
    # All of that is known before the model is published, but for whose the other Space is.
    assert set(hub.files("me/hidden")) == {"README.md"} and "spaces/me/hidden" not in hub.repos
    assert "me/new" not in hub.repos or "The model is published at" in err


def test_no_space_is_made_of_a_model_that_arrived_private(monkeypatch):
    """As an organization may have it for all new repositories."""
    made = []
    api = SimpleNamespace(
        endpoint="https://hub",
        space_info=lambda repo_id: SimpleNamespace(siblings=[]),
        create_repo=lambda repo_id, **options: made.append(repo_id),
        create_commit=lambda repo_id, operations, **options: (
            made.append(len(operations)) or SimpleNamespace(oid="1" * 40)
        ),
    )
    monkeypatch.setattr(hub_module, "HfApi", lambda **options: api)
    report = PublishedReport("team/tiny", "https://hub/team/tiny", "0" * 40, "main", (), (), ())
    api.model_info = lambda repo_id: SimpleNamespace(private=True)
    with pytest.raises(ValueError, match="`space` needs a public model, .* got the private 'team/tiny'"):
        publish_space(report, baseline="me/stock", token=WRITE)
    assert made == []
    api.model_info = lambda repo_id: SimpleNamespace(private=False)
    publish_space(report, baseline="me/stock", token=WRITE)
    assert made == ["team/tiny", 4]


def test_a_broken_upload_goes_on_where_it_was(hub, folder, rigpt):
    shards = {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    broken = min(shards)
    hub.cut = {broken}
    code, _, err = rigpt("publish", folder, "me/tiny")
    *bars, line = err.splitlines()
    assert code == 2 and not any("Error" in bar for bar in bars), err
    assert line.startswith("rigpt: The upload to 'me/tiny' broke off (") and "Say the same command again" in line
    assert hub.broken_puts[broken] > 1, "the client tries again by itself"
    assert set(hub.files("me/tiny")) == {".gitattributes"}, "and nothing is half there"
    assert set(hub.puts) == shards - {broken}

    hub.cut = set()
    code, out, err = rigpt("publish", folder, "me/tiny")
    assert code == 0, err
    assert dict(hub.puts) == dict.fromkeys(shards, 1), "what had arrived was not sent again"
    assert set(hub.files("me/tiny", commit_of(out))) >= {file.path for file in repository_files(folder).files}


@pytest.mark.slow
@pytest.mark.full
def test_what_the_hub_refuses(hub, folder, place, rigpt, monkeypatch):
    hub.echo_tokens = True
    gpt2 = json.dumps({"model_type": "gpt2"}).encode()
    hub.put_files(
        "me/other", {"config.json": gpt2, "pytorch_model.bin": b"x", "tokenizer.json": b"x", "mine.txt": b"x"}
    )
    hub.put_files("you/theirs", {"README.md": b""})
    before = {repo_id: hub.files(repo_id) for repo_id in hub.repos}
    lines = {}
    for arguments, token, message in (
        (["me/tiny"], REFUSED, r"`HF_TOKEN` must be one that the Hub accepts"),
        (["me/tiny"], READ, r"`HF_TOKEN` must have the right to write, got one of 'me' that may only read"),
        (["me/tiny"], "", r"`HF_TOKEN` must be an access token of the Hub, got none"),
        (["you/new"], WRITE, r"`HF_TOKEN` must have the right to write to 'you/new'"),
        (["you/theirs"], WRITE, r"`HF_TOKEN` must have the right to write to 'you/theirs'"),
        (["me/other"], WRITE, r"`REPO` must be new, or hold a RiGPT to update"),
        (["me/other", "--private"], WRITE, r"'me/other' is there and public"),
        (["me/bad name"], WRITE, r"`REPO` must be the name"),
    ):
        code, _, err = rigpt("publish", folder, *arguments, token=token)
        assert code == 2 and message in err and len(err.splitlines()) == 1, err
        lines[arguments[0]] = err
    assert "with [token]" in lines["you/new"], "the server repeats the token"
    code, _, err = rigpt("--debug", "publish", folder, "me/tiny", token=REFUSED)
    assert code == 1 and "Traceback" in err and "`HF_TOKEN` must be one that the Hub accepts" in err
    assert {repo_id: hub.files(repo_id) for repo_id in hub.repos} == before

    assert rigpt("publish", folder, "me/other", "--force")[0] == 0
    files = hub.files("me/other")
    assert "pytorch_model.bin" not in files and files["mine.txt"] == b"x" and b"rigpt" in files["config.json"]
    assert rigpt("publish", folder, "me/hidden", "--private")[0] == 0
    assert hub.repos["me/hidden"].private and not hub.repos["me/other"].private
    assert rigpt("publish", folder, "me/hidden", "--revision", "main")[0] == 0

    with socket.socket() as nobody:  # takes an address at which nothing answers
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        talk_to(endpoint, place, monkeypatch)
        code, _, err = rigpt("publish", folder, "me/tiny")
    assert code == 2 and f"{endpoint} cannot be reached" in err and "Nothing was sent" in err, err


def test_xet_is_left_on_for_others(hub, folder, rigpt, monkeypatch):
    pytest.importorskip("hf_xet", reason="needs hf_xet, which the client uses where it is installed")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    code, _, _ = rigpt("publish", folder, "me/tiny")
    assert "GET /api/models/me/tiny/xet-write-token/main" in hub.requests
    assert code == 2, "this Hub has no Xet"
