"""A saved model to publish, and a Hub on the loopback that the client in this process talks to."""

import shutil
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub

from rigpt_hf import cli
from rigpt_hf.conversion import certify
from tests.evaluation.toys import word_tokenizer
from tests.models import tiny_model
from tests.publishing.hub_server import HubServer


# Long words of no meaning, so that a search for them finds nothing else.
WRITE, READ, REFUSED = "hf_mayWrite7391", "hf_mayRead5528", "hf_unknown8840"
CARD = "---\nlicense: apache-2.0\n---\n\n# A tiny model\n\n![Loss](pictures/loss.png)\n"


def save(folder: Path, seed: int = 0, shards: str = "30KB", **options) -> Path:
    """A whole model with all that may lie beside it."""
    model = tiny_model(seed, dtype=torch.float32, **options)
    model.save_pretrained(folder, max_shard_size=shards)
    word_tokenizer(["<s>", " a", " b"]).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    certify(model, model).save(folder)
    (folder / "notes.txt").write_text("not for others")
    (folder / "pictures").mkdir()
    for name in ("loss.png", "other.png"):
        (folder / "pictures" / name).write_bytes(b"picture")
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A folder of its own for every test."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def place(tmp_path) -> Path:
    """Where the client keeps what it keeps, and what is printed."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def talk_to(endpoint: str, place: Path, monkeypatch) -> None:
    """Let the client take `endpoint` for the Hub and keep its files in `place`, as its environment variables would."""
    values = {"ENDPOINT": endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HOME": str(place / "hf")}
    values |= {"HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}"}
    values |= {"HF_HUB_CACHE": str(place / "hf/hub"), "HF_TOKEN_PATH": str(place / "hf/token")}
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    # Transformers keeps a client of its own, from whenever it was first asked for one.
    monkeypatch.setattr(transformers_hub, "_hf_api", None)


@pytest.fixture
def hub(place, monkeypatch):
    with HubServer({WRITE: ("me", "write"), READ: ("me", "read")}) as server:
        talk_to(server.endpoint, place, monkeypatch)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its tries
        yield server


@pytest.fixture
def rigpt(place, monkeypatch, capsys):
    """Runs `rigpt` with a token; gives exit code, output and errors. At the end no token has been seen anywhere."""

    def run(*arguments, token: str = WRITE) -> tuple[int, str, str]:
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.setattr(sys, "argv", ["rigpt", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            code = traceback.print_exc() or 1
        printed = capsys.readouterr()
        with (place / "printed.txt").open("a") as file:
            file.write(printed.out + printed.err)
        return code, printed.out, printed.err

    yield run
    check_no_token_seen(place)


def check_no_token_seen(place: Path) -> None:
    """No file below a folder, what was printed among them, holds a token."""

    def places_of(token: str) -> list[str]:
        files = (path for path in place.rglob("*") if path.is_file())
        return [path.name for path in files if token.encode() in path.read_bytes()]

    assert (place / "printed.txt").stat().st_size > 100
    assert [places_of(token) for token in (WRITE, READ, REFUSED)] == [[], [], []]
    (place / "planted.txt").write_text(f"before{WRITE}after")  # and the search would have found it
    assert places_of(WRITE) == ["planted.txt"]
