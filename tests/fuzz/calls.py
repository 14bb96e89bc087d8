"""Bad options and paths, and what befalls a process: signals, full disks, files that appear."""

import functools
import os
import re
import shutil
from pathlib import Path

import typer

from rigpt_hf import cli
from rigpt_hf.command_line import make_app
from rigpt_hf.dataclass_options import command
from rigpt_hf.training.convert import ConvertOptions
from rigpt_hf.training.finetune_options import FinetuneOptions
from rigpt_hf.training.options import DataOptions, PretrainOptions

from .cases import PLACES, Case, Draw, kind, misplace
from .files import replaced
from .world import COMMANDS


PROGRAMS = {"convert.py": ConvertOptions, "pretrain.py": PretrainOptions, "finetune.py": FinetuneOptions}


@functools.cache
def options(name: str) -> list:
    """The options of a program, as Click has them."""
    first, verb = COMMANDS[name].words[:2]
    if first == "rigpt":
        found = typer.main.get_command(cli.app).commands[verb].params  # type: ignore[attr-defined]
    else:
        from rigpt_hf.evaluation import speed

        app = make_app(add_completion=False)
        app.command()(speed.main if first == "speed.py" else command(PROGRAMS[first], print))
        found = typer.main.get_command(app).params
    known = [
        it for it in found if it.param_type_name == "option" and not it.hidden and it.name not in ("help", "config")
    ]
    # What only prepares data has no use for most of them, and the bench none for another output.
    known = [it for it in known if name != "prepare" or it.name in DataOptions.__dataclass_fields__]
    return [it for it in known if name != "speed" or it.name != "output"]


VALUES = ("", " ", "many", "-1", "0", "1", "0.5", "nan", "inf", "-inf", "1e308", "9" * 30, "x" * 10_000, "[/b][red]",
    "null", "{}", "[1", "a=b", "a,b", "\u202e\U0001f600", "a\nb", "in/text.txt/x", "--", "-", "$(ls)")  # fmt: skip
# Options of which these values are good ones.
GOOD = {
    r"seed": r"-?\d{1,3}",
    r"prompt|names|title|repo|space-repo|revision|baseline": r"[^/]{1,99}",
    r"points|steps|samples|documents|batch-size|limit|max-.*": r"1|0",
    r".*-steps|.*-limit|.*-size|eval-batches|turns|fewshot": r"1|0",
    r"temperature|top-p": r"[01.5]+|9{30}",
    r"time|t|.*rates?|.*decay|fraction|.*beta.|megabytes|.*(norm|share|dropout|alpha)|momentum": r"[01.5]+|9{30}",
    r".*": r"null",
    (PLACE := r"(output|data)(-dir)?|json|picture|save-transformation"): r"(?!in/)(?!/)[^\0]{1,99}",
}


@kind(8)
def option(draw: Draw) -> Case:
    name = draw.choice([name for name in COMMANDS if name not in ("demo-text", "info")])
    given, words, fine = draw.choice(options(name)), COMMANDS[name].words, None
    spelled, value = draw.choice([*given.opts, *given.secondary_opts]), draw.choice(VALUES)
    how = draw.choice(("=", "=", "=", " ", " ", "none", "twice", "spelling"))
    if given.is_flag:
        more = draw.choice(([f"{spelled}={value}"], [f"{spelled}x"]))
    elif how == "none":
        more = [spelled]
    elif how == "spelling":
        more = [spelled[:-1] + "q", "1"]
    elif how == "twice":
        more, value = [spelled, "many", spelled, "many"], "many"
    else:
        more = [f"{spelled}={value}"] if how == "=" or value[:1] == "-" else [spelled, value]
    if how in ("=", " ", "twice") and not given.is_flag:
        bare = spelled.lstrip("-")
        if any(re.fullmatch(of, bare) and re.fullmatch(good, value) for of, good in GOOD.items()):
            fine = "a value like others"
    event = {"out": value} if re.fullmatch(PLACE, spelled.lstrip("-")) else {}
    return Case(name, f"option {' '.join(more)[:60]!r}", fine, [*words, *more], event)


LONG = "x" * 300
NAMES = {"markup": "[/b]", "newline": "new\nline", "bytes": os.fsdecode(b"\xff\xfe"), "dash": "-x", "space": " a b "}


@kind(4)
def inputs(draw: Draw) -> Case:
    name = draw.choice([name for name, it in COMMANDS.items() if any(word.startswith("in/") for word in it.words)])
    old, fine = draw.choice([word for word in COMMANDS[name].words if word.startswith("in/")]), None
    others = {"missing": "in/none/at all", "below a file": "in/text.txt/x", "long": f"in/{LONG}", "empty": "",
        "home": "~/none"}  # fmt: skip
    how = draw.choice((*others, "the other kind", *PLACES[1:], *NAMES, *NAMES))
    place, new = draw.work / old, others.get(how, old)
    if how == "the other kind":
        new = "in/text.txt" if place.is_dir() else "in/rigpt"
    elif how in PLACES:
        misplace(place, how)
    elif how in NAMES and draw.random() < 0.5:
        new = f"in/{NAMES[how]}"
    elif how in NAMES:
        new = f"in/{NAMES[how]}{place.suffix}"
        (draw.work / new).parent.mkdir(exist_ok=True)
        place.rename(draw.work / new)
        fine = "a name like others"
    return Case(name, f"{old}: {how}{', there' if fine else ''}", fine, replaced(COMMANDS[name].words, old, new))


@kind(4)
def outputs(draw: Draw) -> Case:
    names = [name for name, it in COMMANDS.items() if any(word.startswith("out") for word in it.words)]
    name = draw.choice([name for name in names if name != "speed"])
    words = COMMANDS[name].words
    old = draw.choice([word for word in words if word.startswith("out")])
    model, suffix = next(iter(COMMANDS[name].models), "in/rigpt"), Path(old).suffix
    place = (draw.work / "mine/place").with_suffix(suffix)
    others = {"below a file": f"mine/thesis.txt/a{suffix}", "long": LONG + suffix, "empty": "", "input": model,
        "in the input": f"{model}/new{suffix}", "around the input": "in", "device": "/dev/null/a"}  # fmt: skip
    others |= {how: f"out{odd}{suffix}" for how, odd in NAMES.items()}
    how = draw.choice((*others, "a file", *PLACES, "forced", "forced", "a folder of links"))
    fine = {
        "in the input": "a new place harms nothing",
        "a folder": None if suffix else "it is empty",
    } | dict.fromkeys(NAMES, "a name like others")
    if name in ("pretrain", "evaluate", "lab"):
        fine |= dict.fromkeys(("forced", "a folder", "a folder of links"), "beside what is there")
    if name == "lab":
        fine |= dict.fromkeys(("input", "around the input"), "beside what is there")
    if old == "out-run":
        fine = dict.fromkeys(
            (*others, *PLACES, "a file", "forced", "a folder of links"), "preparing writes nothing there"
        )
    if how == "a file":
        place.write_text("mine")
    elif how in ("forced", "a folder of links"):
        shutil.copytree(draw.work / "in/rigpt", place)
        (place / "notes.txt").symlink_to(draw.work / "mine/thesis.txt")
        if how == "forced" and any("--force" in it.opts for it in options(name)):
            words = [*words, "--force"]
    elif how in PLACES:
        misplace(place, how)
    new = others.get(how, f"mine/place{suffix}")
    return Case(name, f"{old}: {how}", fine.get(how), replaced(words, old, new), {"out": new})


BEFALL = ("convert", "convert.py", "export", "rotate-file", "canonicalize", "merge", "diff", "charges-measure",
    "evaluate", "card", "pretrain", "prepare", "finetune", "chat")  # fmt: skip


@kind(3)
def signals(draw: Draw) -> Case:
    do, at = draw.choice(("kill", "kill", "term", "int")), draw.randrange(1, 25)
    return Case(draw.choice(BEFALL), f"{do} at change {at}", "ended before", event={"do": do, "at": at})


@kind(3)
def full(draw: Draw) -> Case:
    do = draw.choice(("full", "limit", "device"))
    at = draw.randrange(3000, 40_000) if do == "limit" else draw.randrange(1, 16)
    return Case(draw.choice(BEFALL), f"disk {do} at {at}", "there was room", event={"do": do, "at": at})


# What commands write besides what they make.
BESIDE = {
    "pretrain": ["out/run.json", "out/metrics.jsonl", "out/loss.png", "out/checkpoints/step-00000002", "out/model/a"],
    "finetune": ["out.checkpoints/finetune.json", "out.checkpoints/checkpoint-1/eval.json"],
    "evaluate": ["out/table.md", "out/results.json"],
}


@kind(2)
def together(draw: Draw) -> Case:
    name, do, at = draw.choice(BEFALL), draw.choice(("appear", "twin")), draw.randrange(1, 12)
    place = draw.choice((*COMMANDS[name].makes[:1], "out/thesis.txt", *BESIDE.get(name, ())))
    force = ["--force"] * (draw.random() < 0.5 and any("--force" in it.opts for it in options(name)))
    event = {"do": do, "at": at, "place": place}
    return Case(name, f"{do} at change {at}: {place}", "ended before", [*COMMANDS[name].words, *force], event)
