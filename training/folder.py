"""A run's folder: whose it is, one run at a time in it, and signals that ask the run to stop."""

import json
import signal
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rigpt_hf.checkpoints.folder import check_ours, new_file

from .checkpoints import check_facts, sync


OWNER, LOCK = "run.json", ".lock"
# Results of a run beside its checkpoints, which a new one would replace.
LEFT = ("metrics.jsonl", "model", "loss.png")


def lock(folder: Path) -> FileLock:
    """
    Keep other runs out until the lock is released or this process ends, however it ends; for the main process.

    Raises:
        ValueError: if another run is in the folder, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / LOCK)
        held.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"`output_dir` must be a folder that no other run is in, got {str(folder)!r}. Wait, or name another."
        ) from error
    except OSError as error:
        raise ValueError(
            f"`output_dir` must be a folder that can be written to, got {str(folder)!r}: {error.strerror}."
        ) from error
    return held


def check_owner(folder: Path, facts: dict[str, Any], has_checkpoints: bool, force: bool) -> None:
    """
    Look at whose folder this is; for the main process.

    Raises:
        ValueError: if there are results of another run, or of nobody known, and no checkpoint to go on from; or if
            with `force` something would be replaced that is not this program's.
    """
    owner = folder / OWNER
    left = [name for name in LEFT if (folder / name).exists()]
    # Checkpoints have facts of their own, which are compared when one is taken up.
    if left and not has_checkpoints and not force:
        if not owner.is_file():
            raise ValueError(
                f"`output_dir` must be empty or a run's own, got {str(folder)!r} with {', '.join(left)} of something "
                "else. Name another folder, or pass --force to replace them."
            )
        check_facts(_read_owner(owner, left), facts, override="--force to replace its results")
    unknown = owner.is_file() and not (has_checkpoints or force or left)
    if unknown and not _read_owner(owner, [OWNER]).keys() & facts.keys():
        raise ValueError(
            f"`output_dir` must be empty or a run's own, got {str(folder)!r} with {OWNER} of something else. Name "
            "another folder, or pass --force to replace it."
        )
    if (folder / "model").is_dir():
        check_ours(folder / "model")


def claim(folder: Path, facts: dict[str, Any]) -> None:
    """Say whose folder this is, once nothing is left that could refuse and before anything is replaced."""
    with new_file(folder / OWNER) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        sync(temporary)
    sync(folder)


def _read_owner(owner: Path, left: list[str]) -> dict[str, Any]:
    try:
        saved = json.loads(owner.read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise ValueError("not an object")
        return saved
    except ValueError as error:
        raise ValueError(
            f"`output_dir` must tell whose {', '.join(left)} it has, but {str(owner)!r} is damaged "
            f"({' '.join(str(error).split())}). Name another folder, or pass --force to replace them."
        ) from error


class StopRequests:
    """Inside, SIGTERM and SIGINT are noted in `received`; a second one acts as it would have without this."""

    received = False

    def __enter__(self) -> "StopRequests":
        self.earlier = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = True
        signal.signal(number, self.earlier[signal.Signals(number)])
