"""Seeded faults: draw one-line mutations of the product, try the tests on them, and hold later tests against that.

`faults.json` keeps what was drawn and what the tests caught. `python -m tests.faults check` (`make faults`) makes each
caught fault again in a copy of the tree as it is now, and names those that today's tests let pass.
"""

import importlib
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from queue import Queue
from typing import Annotated

import typer
from tqdm import tqdm

from tests.faults.mutation import NowhereError, applied, locate, product, statements, variants


PRODUCT = ["rigpt_hf", "training", "evaluation", "model_cards"]
# Area: (what it is made of, where its tests are); what is absent is passed over, so old and new places may stand here.
AREAS = {
    "model": (r"rigpt_hf/(\w+_rigpt|peft_targets)\.py", ["tests/model", "tests/test_loss.py"]),
    "symmetry": (r"rigpt_hf/(symmetry/|groups/|frames\.py)", ["tests/symmetry"]),
    "optim": (
        r"rigpt_hf/(optim\w*[./]|polar|workshare|trainer_optimizer)",
        ["tests/test_optim.py", "tests/optimizer", "tests/test_optim_programs.py"],
    ),
    "conversion": (r"rigpt_hf/(conversion|checkpoints)/", ["tests/conversion", "tests/checkpoints"]),
    "flow": (r"rigpt_hf/flow/(?!figures)", ["tests/flow"]),
    "publishing": (r"rigpt_hf/publishing/(?!rotation_pictures|space_app)", ["tests/publishing"]),
    "cli": (r"rigpt_hf/cli/", ["tests/cli"]),
    "demo": (r"rigpt_hf/demo/", ["tests/demo"]),
    "training": (r"training/", ["tests/training"]),
    "evaluation": (r"evaluation/(?!harness/figures)", ["tests/evaluation"]),
    "model_cards": (r"model_cards/", ["tests/model_cards"]),
}
AT_LEAST = 4
STORE = Path(__file__).parent / "faults.json"
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")


def name_of(fault: dict) -> str:
    """A name that the fault keeps for life: area, function, and a hash of what is changed."""
    text = "\n".join(str(fault.get(key, 0)) for key in ("file", "function", "old", "new", "nth"))
    return f"{fault['folder']}-{re.sub('[<>]', '', fault['function'])}-{sha256(text.encode()).hexdigest()[:6]}"


def load() -> list[dict]:
    return json.loads(STORE.read_text(encoding="utf-8"))


def save(faults: list[dict]):
    """One fault per line, so that changes show in a diff; written beside and renamed."""
    lines = ",\n".join(json.dumps(fault, ensure_ascii=False) for fault in faults)
    write(STORE, f"[\n{lines}\n]\n")


def write(path: Path, text: str):
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


@app.command()
def draw(
    count: Annotated[int, typer.Option(help="How many faults, in all areas together.")] = 120,
    seed: Annotated[int, typer.Option(help="Seed of the generator; the same seed draws the same faults.")] = 15,
):
    """Draw faults of this tree into `faults.json`, by areas in proportion to their lines; at most one per function.

    Kinds are drawn first, so that rare ones (swapped arguments, a dropped line) are there; what raises when its module
    is imported is drawn again. Areas take turns in the list, so that a part of it is stratified too.
    """
    generator, sources = random.Random(seed), product(ROOT, PRODUCT)
    areas = {area: [path for path in sources if re.match(made_of, path)] for area, (made_of, _) in AREAS.items()}
    lines = {area: sum(sources[path].count("\n") for path in paths) for area, paths in areas.items()}
    spare = count - AT_LEAST * len(AREAS)
    drawn: dict[str, list[dict]] = {}
    for area, paths in tqdm(areas.items(), desc="draw"):
        wanted, used = AT_LEAST + round(spare * lines[area] / sum(lines.values())), set()
        by_kind = defaultdict(list)
        for path in paths:
            seen: Counter = Counter()
            for found in statements(sources[path]):
                seen[found.scope, found.text] += 1
                for kind, new in variants(found):
                    fault = dict(folder=area, file=path, function=found.scope, kind=kind, old=found.text, new=new)
                    by_kind[kind].append(fault | ({"nth": n} if (n := seen[found.scope, found.text] - 1) else {}))
        drawn[area] = []
        while len(drawn[area]) < wanted and any(by_kind.values()):
            kind = generator.choice(sorted(kind for kind in by_kind if by_kind[kind]))
            fault = by_kind[kind].pop(generator.randrange(len(by_kind[kind])))
            if (fault["file"], fault["function"]) not in used and imports(sources, fault):
                used.add((fault["file"], fault["function"]))
                drawn[area].append(fault)
    turns = sorted(
        (index / len(faults), area, index) for area, faults in drawn.items() for index in range(len(faults))
    )
    save([drawn[area][index] for _, area, index in turns])
    typer.echo("\n".join(f"{area:12} {len(faults):3}" for area, faults in drawn.items()))


def imports(sources: dict[str, str], fault: dict) -> bool:
    """Whether the module with the fault can be imported; tried in a forked process."""
    path, changed = applied(sources, fault)
    name = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    name = name if name.startswith("rigpt_hf") else f"rigpt_hf.{name}"
    module = importlib.import_module(name)
    child = os.fork()
    if not child:
        try:
            about = {key: value for key, value in vars(module).items() if key.startswith("__")}
            exec(compile(changed, path, "exec"), about | {"__annotations__": {}})
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def copy_tree(tree: Path, place: Path) -> Path:
    """A copy of a checkout (what git does not ignore) whose own light `.venv` imports the copy.

    The folder `shared` beside the checkout stands beside the copy too, as a link.
    """
    to = place / "checkout"
    listed = ["git", "-C", str(tree), "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines():
        if (tree / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, to / name)
    if (tree.parent / "shared").exists():
        (place / "shared").symlink_to((tree.parent / "shared").resolve())
    python = tree / ".venv/bin/python"
    subprocess.run([python, "-m", "venv", "--without-pip", to / ".venv"], check=True)
    site, own = (next((at / ".venv/lib").glob("python*/site-packages")) for at in (tree, to))
    for file in [*site.glob("*.pth"), *site.glob("__editable__*.py")]:
        (own / file.name).write_text(file.read_text().replace(f"{tree}/", f"{to}/").replace(f"'{tree}'", f"'{to}'"))
    (own / "packages.pth").write_text(f"{site}\n")
    for file in (tree / ".venv/bin").iterdir():
        if file.is_file() and not (to / ".venv/bin" / file.name).exists() and file.read_bytes()[:2] == b"#!":
            (to / ".venv/bin" / file.name).write_text(file.read_text().replace(f"{tree}/.venv", f"{to}/.venv", 1))
            (to / ".venv/bin" / file.name).chmod(0o755)
    asked = "import rigpt_hf, rigpt_hf.training as t; print(rigpt_hf.__file__, t.__file__)"
    own_python = to / ".venv/bin/python"
    said = subprocess.run([own_python, "-c", asked], capture_output=True, text=True, check=True, cwd=to).stdout
    assert said.split() == [f"{to}/rigpt_hf/__init__.py", f"{to}/training/__init__.py"], said
    # Bytecode is written once, of what has no fault; workers write none.
    subprocess.run([own_python, "-m", "compileall", "-q", *PRODUCT, "docs"], cwd=to)
    collect = ["-m", "pytest", "-q", "-n0", "--collect-only", "-pno:cacheprovider", "tests"]
    subprocess.run([own_python, *collect], cwd=to, stdout=subprocess.DEVNULL, env=os.environ | ENVIRONMENT)
    return to


class Bench:
    """A copy of the tree and the process that runs tests in it."""

    def __init__(self, tree: Path, place: Path):
        self.tree = copy_tree(tree, place)
        self.sources = product(self.tree, PRODUCT)
        path = f"{self.tree}/.venv/bin:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            [self.tree / ".venv/bin/python", Path(__file__).with_name("worker.py")],
            cwd=self.tree,
            env=os.environ | ENVIRONMENT | {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, names: list[str], limit: float, skip: int = 0) -> dict:
        """Run tests to the first failure; `worker.py` says what is in the answer."""
        request = {"names": names, "limit": limit, "skip": skip, "base": str(self.tree.parent / "tmp")}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def tests_for(self, fault: dict, path: str) -> list[str]:
        """Test files, most telling first: of its name, naming the function, importing it, the area's rest."""
        module, function = Path(path).stem.removesuffix("_rigpt"), fault["function"].rpartition(".")[2]
        dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        parent, _, last = dotted.rpartition(".")
        imported = re.compile(rf"{re.escape(dotted)}\b|{re.escape(parent)} import [^\n]*\b{last}\b")
        home, ranked = [self.tree / at for at in AREAS[fault["folder"]][1]], []
        for file in sorted((self.tree / "tests").rglob("test_*.py")):
            text, at_home = file.read_text(encoding="utf-8"), any(at in (file, *file.parents) for at in home)
            far = (module not in file.stem, not re.search(rf"\b{function}\b", text), not imported.search(text))
            if at_home or not far[2]:
                ranked.append(((*far, not at_home), len(text), str(file.relative_to(self.tree))))
        return [name for *_, name in sorted(ranked)]

    def attempt(self, fault: dict, limit: float, control: dict[str, bool]) -> dict:
        """Make one fault, run its tests, undo it.

        Begins with the test that caught it before, or where a shorter limit ended (`skip`). A test that fails without
        the fault too (`control` remembers which) has caught nothing and is left out.
        """
        path, changed = applied(self.sources, fault)
        names, left_out, first = self.tests_for(fault, path), [], fault.get("by")
        while True:
            (self.tree / path).write_text(changed, encoding="utf-8")
            try:
                skip = 0 if first or left_out else fault.get("skip", 0)
                asked = [first] if first else [*names, *(f"--deselect={name}" for name in left_out)]
                result = self.ask(asked, limit, skip)
            finally:
                (self.tree / path).write_text(self.sources[path], encoding="utf-8")
            by = result.get("by")
            if by and by not in control:
                alone = [by] if "::" in by else [by, "--collect-only"]
                control[by] = self.ask(alone, 10 * limit)["code"] == 0
            if by and control[by]:
                return result | {"outcome": "caught", "caught": True, "where": path}
            if not by and not first:
                stuck = result["code"] is None and limit - result.get("cpu", 0) > limit / 2
                outcome = {0: "passed", 5: "passed", None: "stuck" if stuck else "late"}.get(result["code"], "broken")
                return result | {"outcome": outcome, "caught": False, "where": path, "limit": limit}
            left_out += [by] if by else []
            first = None


def attempt_all(tree: Path, faults: list[dict], workers: int, limit: float, keep) -> None:
    """Attempt faults, each worker in a copy of its own; `keep(fault, result)` is called as results come."""
    control: dict[str, bool] = {}
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        benches: Queue = Queue()

        def start(index: int):
            (Path(folder) / str(index)).mkdir()
            benches.put(Bench(tree.resolve(), Path(folder) / str(index)))

        def one(fault: dict):
            bench, started = benches.get(), time.monotonic()
            try:
                result = bench.attempt(fault, limit, control)
            except NowhereError as error:
                result = {"outcome": "nowhere", "caught": False, "why": str(error)}
            finally:
                benches.put(bench)
            keep(fault, result | {"seconds": round(time.monotonic() - started)})

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(start, range(workers)))
            list(tqdm(pool.map(one, faults), total=len(faults), desc="faults"))
        for _ in range(workers):
            benches.get().process.stdin.close()


Workers = Annotated[int, typer.Option(help="Faults tried at a time, each in a copy of the tree.")]
Limit = Annotated[
    float, typer.Option(help="Seconds of CPU for the tests of one fault; what passes until then is late.")
]


@app.command()
def run(
    records: Annotated[Path, typer.Option(help="Folder with one JSON record per fault; none is made twice.")],
    tree: Annotated[
        Path, typer.Option(help="The checkout whose tests are tried; it is copied, never changed.")
    ] = ROOT,
    workers: Workers = 1,
    limit: Limit = 120,
):
    """Try the tests of a checkout on all drawn faults, and keep what happened.

    Outcomes: `caught` (by which test), `passed` (all tests pass), `late` (none failed within the limit, or `stuck` in
    one test for more than half of it), `broken` (pytest stopped by itself), `nowhere` (the fault cannot be stated in
    this code). With a longer limit, late ones go on where they stopped.
    """
    records.mkdir(parents=True, exist_ok=True)
    wanted = []
    for fault in load():
        file = records / f"{name_of(fault)}.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if before is None:
            wanted.append(fault)
        elif before["outcome"] in ("late", "stuck") and before["limit"] < limit:
            wanted.append(fault | {"skip": before["done"]})

    def keep(fault: dict, result: dict):
        write(records / f"{name_of(fault)}.json", json.dumps(fault | result, indent=1, ensure_ascii=False) + "\n")

    attempt_all(tree, wanted, workers, limit, keep)


@app.command()
def merge(records: Annotated[Path, typer.Option(help="Folder with the records of `run`.")]):
    """Write the outcomes of records into `faults.json` and print a table by area."""
    faults, table = load(), defaultdict(Counter)
    for fault in faults:
        file = records / f"{name_of(fault)}.json"
        if file.exists():
            record = json.loads(file.read_text(encoding="utf-8"))
            fault |= {key: record[key] for key in ("outcome", "by", "done", "seconds", "at") if key in record}
        for row in (fault["folder"], "all"):
            table[row][fault.get("outcome", "not tried")] += 1
    save(faults)
    for area, outcomes in table.items():
        typer.echo(
            f"{area:12} {outcomes.total():4}  " + ", ".join(f"{name} {n}" for name, n in outcomes.most_common())
        )


@app.command()
def where():
    """Say which faults stand nowhere in this tree, and what became of the place of others; runs no test."""
    sources, lost = product(ROOT, PRODUCT), 0
    for fault in load():
        if "gone" in fault:
            continue
        try:
            path, place = locate(sources, fault)
            if (path, place.scope) != (fault["file"], fault["function"]):
                typer.echo(f"moved: {name_of(fault)} to {path}, {place.scope}")
        except NowhereError as error:
            typer.echo(f"nowhere: {name_of(fault)}: {error}")
            lost += 1
    raise typer.Exit(1 if lost else 0)


@app.command()
def check(
    workers: Workers = 2,
    limit: Limit = 120,
    only: Annotated[str, typer.Option(help="Only the faults of this area.")] = "",
):
    """Make every fault that was caught again in a copy of this tree; fail, naming them, if some are caught no longer.

    The test that caught it is tried first. Where code was rewritten, give the fault in `faults.json` a list `again` of
    {file, function, old, new} that state the same meaning in the new code; where what it was about is no longer in the
    product at all, the reason as `gone`.
    """
    lost: list[tuple[dict, dict]] = []
    before = [fault for fault in load() if fault.get("outcome") == "caught" and only in ("", fault["folder"])]
    caught = [fault for fault in before if "gone" not in fault]
    attempt_all(ROOT, caught, workers, limit, lambda fault, result: result["caught"] or lost.append((fault, result)))
    for fault, result in lost:
        typer.echo(
            f"{result['outcome']}: {name_of(fault)} ({fault['kind']}, {fault['file']})\n  - {fault['old']}\n  + "
            f"{fault['new']}\n  caught before by {fault['by']}"
        )
    for fault in before:
        if "gone" in fault:
            typer.echo(f"gone: {name_of(fault)}: {fault['gone']}")
    typer.echo(f"{len(caught) - len(lost)} of {len(caught)} faults are caught")
    raise typer.Exit(1 if lost else 0)


if __name__ == "__main__":
    app()
