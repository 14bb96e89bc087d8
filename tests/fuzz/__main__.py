"""`python -m tests.fuzz run --seed 1` judges 500 cases; `show 1 17` makes the folder of one and says its command."""

import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from tests import processes

from . import calls, files, models  # noqa: F401  they register their kinds
from .cases import make
from .judge import ENVIRONMENT, judge
from .world import build


app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
RECORDS = Path("runs/fuzz")
CODE = ("rigpt_hf", "training", "evaluation", "model_cards", "tests/fuzz")


@contextmanager
def place() -> Iterator[Path]:
    """A folder for cases."""
    os.environ.update(ENVIRONMENT)
    processes.begin()
    try:
        with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    finally:
        processes.end()


@app.command()
def show(seed: int, index: int, to: Annotated[Path, typer.Option(help="Where the inputs go.")] = RECORDS / "case"):
    """Make the inputs of one case in a folder, and print what it is and the command to say there."""
    shutil.rmtree(to, ignore_errors=True)
    with place():
        case = make(seed, index, to, build())
    typer.echo(f"{case.kind}: {case.said}\nfine: {case.fine}\nevent: {case.event}\ncd {to}")
    typer.echo(ascii(shlex.join(case.words))[1:-1])


@app.command()
def run(
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    cases: Annotated[int, typer.Option(help="How many.")] = 500,
    only: Annotated[str, typer.Option(help="Only cases of this kind.")] = "",
    again: Annotated[str, typer.Option(help="Judge once more what is recorded as failed, refused or accepted.")] = "",
    records: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of records; what is in it is not judged twice.", show_default="one per seed and code"
        ),
    ] = None,
):
    """Judge many cases, two at a time; the exit code is 1 if one is answered wrongly."""
    sources = sorted(path for name in CODE for path in (processes.ROOT / name).rglob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
    file = records or RECORDS / f"{seed}-{code}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(file.read_text()) if file.is_file() else []
    found = {entry["index"]: entry for entry in known if entry["outcome"] != again}
    with place() as folder, ThreadPoolExecutor(2) as pool:

        def one(index: int) -> dict | None:
            root = folder / str(index)
            case = make(seed, index, root / "work", build())
            entry = {"index": index} | judge(case, root) if only in ("", case.kind) else None
            shutil.rmtree(root, ignore_errors=True)
            return entry

        waiting = [pool.submit(one, index) for index in range(cases) if index not in found]
        for done in tqdm(as_completed(waiting), total=len(waiting), desc=f"seed {seed}"):
            if done.exception():
                pool.shutdown(cancel_futures=True)
            if entry := done.result():
                found[entry["index"]] = entry
                file.write_text(json.dumps([found[index] for index in sorted(found)], indent=1))
    entries = [found[index] for index in sorted(found) if only in ("", found[index]["kind"])]
    table = Table("kind", "well", "refused", "accepted", "failed", title=f"Answers to bad input, seed {seed}")
    for name in [*sorted({entry["kind"] for entry in entries}), "all"]:
        counts = Counter(entry["outcome"] for entry in entries if name in (entry["kind"], "all"))
        numbers = [counts["refused"], counts["accepted"], counts["failed"]]
        table.add_row(name, f"{sum(numbers[:2])} of {sum(numbers)}", *map(str, numbers))
    console, failed = Console(), [entry for entry in entries if entry["outcome"] == "failed"]
    for entry in failed:
        line = "{index} {command}, {said}: {why}".format(**entry)
        console.print(line.encode("ascii", "backslashreplace").decode(), markup=False, soft_wrap=True)
    console.print(table)
    raise typer.Exit(bool(failed))


if __name__ == "__main__":
    app()
