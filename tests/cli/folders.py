"""Folders of models that tests of the command line spoil."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def copied(source: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(source, to)
    return to


def edit(folder: Path, name: str, **values) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tensors(change):
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        stored = load_file(path)
        save_file(change(stored) or stored, path, metadata={"format": "pt"})

    return damage
