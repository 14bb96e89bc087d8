"""Checkpoints to save and to look at, for tests; without PyTorch, so that programs of their own start at once."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from rigpt_hf.training.checkpoints import Checkpoint


FILES = ("model.safetensors", "state/part-0.bin", "state/part-1.bin", "empty")


def writer(step: int, size: int = 2000):
    """A `write` whose files tell the step."""

    def write(folder: Path):
        (folder / "state").mkdir()
        save_file({"step": np.full((size,), step, dtype=np.float64)}, folder / "model.safetensors")
        for part in range(2):
            (folder / f"state/part-{part}.bin").write_bytes(f"{step} {part} ".encode() * size)
        (folder / "empty").touch()

    return write


def content(checkpoint: Checkpoint) -> int:
    """The step that the files tell."""
    checkpoint.verify()
    [step] = set(load_file(checkpoint.path / "model.safetensors")["step"].tolist())
    for part in range(2):
        text = (checkpoint.path / f"state/part-{part}.bin").read_text()
        assert set(zip(*[iter(text.split())] * 2, strict=True)) == {(str(int(step)), str(part))}
    return int(step)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(item.relative_to(folder)): item.read_bytes() for item in folder.rglob("*") if item.is_file()}
