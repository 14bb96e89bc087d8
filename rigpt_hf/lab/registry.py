"""The labs by name: the chapters of the course, and functions of the library that draw one figure each."""

import ast
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..command_line import did_you_mean


@dataclass(frozen=True)
class Lab:
    """
    Something to look at.

    Args:
        line: A description in one line.
        chapter: Name of a script of the course without its suffix, or
        function: `module:function`, which is called with `seed` and returns a Matplotlib `Figure`.
    """

    line: str
    chapter: str = ""
    function: str = ""


LABS: dict[str, Lab] = {
    "gpt": Lab("Chapter 1: the loss of a GPT of 100 lines, and where it looks", chapter="1_gpt"),
    "layernorm": Lab("Chapter 2: what LayerNorm does to rotations, and a GPT-2 without it", chapter="2_layernorm"),
    "lie-groups": Lab("Chapter 3: rotations: geodesics, the Haar measure, RoPE", chapter="3_lie_groups"),
    "charges": Lab("Chapter 4: redundant directions counted, Noether charges measured", chapter="4_charges"),
    "basis": Lab("Chapter 5: Adam's favourite basis, and rounding to four bits", chapter="5_basis"),
    "neural-ode": Lab("Chapter 6: from layers to a flow, and its diffeomorphisms", chapter="6_neural_ode"),
    "symmetry": Lab("Chapter 7: a symmetry of the data as a change of frame, and SCAN's jump", chapter="7_symmetry"),
    "depth-as-time": Lab(
        "A RiGPT as a vector field: how solvers converge to its flow",
        function="rigpt_hf.pictures.depth:plot_depth",
    ),
    "diffeomorphism": Lab(
        "Diffeomorphisms of depth and stream that leave the end points alone",
        function="rigpt_hf.pictures.diffeomorphism:plot_diffeomorphism",
    ),
    "lifting": Lab(
        "Symmetries of feedforward layers, lifted to paths of diffeomorphisms",
        function="rigpt_hf.pictures.lifting:plot_lifting",
    ),
    "local-frames": Lab(
        "One frame per layer, and the connection that joins them",
        function="rigpt_hf.pictures.local_frames:plot_local_frames",
    ),
    "gauge-fixing": Lab(
        "Weight decay picks the balanced point of an orbit",
        function="rigpt_hf.pictures.gauge_fixing:plot_gauge_fixing",
    ),
}


def lab(name: str) -> Lab:
    """
    The lab of this name.

    Raises:
        ValueError: if there is none; the nearest name is given.
    """
    if name in LABS:
        return LABS[name]
    near = did_you_mean(name, [*LABS, "all"])
    raise ValueError(f"`name` must be a lab, got {name[:80]!r}.{near} `rigpt lab` lists all of them.")


def course_folder() -> Path:
    """The folder of the course: in a checkout beside the package, otherwise installed as `rigpt_hf.course`."""
    import rigpt_hf

    checkout = Path(rigpt_hf.__file__).resolve().parents[1] / "docs" / "course"
    if checkout.is_dir():
        return checkout
    spec = find_spec("rigpt_hf.course")
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise ValueError("The course is not installed with this `rigpt_hf`. Install the package once more, with pip.")
    return Path(places[0])


def chapters() -> list[Path]:
    """The scripts of the course, in order."""
    return sorted(course_folder().glob("[0-9]_*.py"))


def script_of(chapter: Lab) -> Path:
    """The script of a chapter."""
    return course_folder() / f"{chapter.chapter}.py"


def is_there(chosen: Lab) -> bool:
    """Whether this version has the code of a lab."""
    if chosen.chapter:
        return script_of(chosen).is_file()
    try:
        return find_spec(chosen.function.partition(":")[0]) is not None
    except ModuleNotFoundError:
        return False


def figure_names(chosen: Lab) -> list[str]:
    """The names of the figures that a lab makes, known without making them; one empty name for a function."""
    if not chosen.chapter:
        return [""]
    tree = ast.parse(script_of(chosen).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) > 1]
    names = [call.args[1] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "show"]
    return [str(name.value) for name in names if isinstance(name, ast.Constant)]


def file_names(name: str) -> list[str]:
    """The files that a lab makes."""
    return ["-".join(filter(None, (name, figure))) + ".png" for figure in figure_names(lab(name))]
