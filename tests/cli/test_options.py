"""Programs made from a dataclass: what their options are, and what they refuse."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from rigpt_hf.command_line import WRITES, as_typed, check_apart
from rigpt_hf.dataclass_options import field_docs, parse, program


@dataclass
class Run:
    """How long."""

    save_steps: int = 500
    """Steps between
    checkpoints."""
    max_grad_norm: float | None = 1.0
    """Largest norm of the gradient."""
    force: bool = False
    """Replace."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Loggers."""
    scale: Literal["linear", "log_2"] | None = None
    """Of the axis."""

    def __post_init__(self):
        if self.save_steps < 1:
            raise ValueError(f"`run.save_steps` must be at least 1, got {self.save_steps}.")


@dataclass
class Options:
    """What to do."""

    model: str
    """Folder or Hub id."""
    kind: Literal["rigpt", "stock_gpt2"] = "rigpt"
    """The class."""
    output_dir: Annotated[Path, WRITES] = Path("runs/it")
    """Where to."""
    config_fields: dict[str, Any] = field(default_factory=dict)
    """Of the configuration."""
    multipliers: dict[str, float] = field(default_factory=dict)
    """Of the rate."""
    run: Run = field(default_factory=Run)
    """How long."""


@pytest.fixture
def presets(tmp_path):
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "small.yaml").write_text(
        "config_fields: {hidden_size: 64, eps: 1e-5}\nmultipliers: {a: 1, b: 2e-1}\n"
        "run: {save_steps: 7, max_grad_norm: null, trackers: [], force: true}\n"
    )
    return folder


@pytest.mark.parametrize("kind", [Path, Path | None, list[Path]])
def test_a_path_must_say_whether_it_is_written(kind):
    """Or nothing would keep one from another that is read."""

    @dataclass
    class Unmarked:
        path: kind

    @dataclass
    class Marked:
        path: Annotated[kind, WRITES]

    with pytest.raises(TypeError, match="the path `path` must be marked READS or WRITES"):
        program(Unmarked, print, name="it")
    assert program(Marked, print, name="it")


def test_options_come_from_the_command_line():
    assert parse(Options, ["gpt2"]) == Options("gpt2")
    arguments = "gpt2 --kind stock_gpt2 --output-dir out --config-fields hidden_size=64,act=relu,eps=1e-5,bias=false"
    arguments += " --multipliers {a:\t1} --run.save_steps=9 --run.max-grad-norm null --run.force --run.trackers a,b"
    arguments = [each.replace("\t", " ") for each in arguments.split(" ")] + ["--run.scale", "log_2"]
    fields = {"hidden_size": 64, "act": "relu", "eps": 1e-5, "bias": False}
    run = Run(9, None, True, ["a", "b"], "log_2")
    assert parse(Options, arguments) == Options("gpt2", "stock_gpt2", Path("out"), fields, {"a": 1.0}, run)


def test_presets_and_files_give_defaults(presets, tmp_path, monkeypatch):
    small = Options("m", config_fields={"hidden_size": 64, "eps": 1e-5}, multipliers={"a": 1.0, "b": 0.2})
    small.run = Run(7, None, True, [])
    for name in ("small", "small.yaml", "presets/small", presets / "small.yaml"):
        assert parse(Options, ["m", "--config", str(name)], presets=presets) == small
    changed = "m --config small --run.save-steps 8 --run.no-force --config-fields hidden_size=32 --run.max-grad-norm 2"
    options = parse(Options, [*changed.split(), "--run.trackers", "[x]"], presets=presets)
    assert options.run == Run(8, 2.0, False, ["x"]) and options.config_fields == {"hidden_size": 32, "eps": 1e-5}
    # A file of one's own comes before a preset, a later file before an earlier one, and a file may hold arguments.
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text("model: mine\nrun: {save_steps: 3}\n")
    options = parse(Options, ["--config", "small", "--config", "small.yaml"], presets=presets)
    assert (options.model, options.run.save_steps, options.multipliers) == ("mine", 3, small.multipliers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "Missing argument 'model'. See it --help"),
        ("m --run.save-stepz 7", "No such option: --run.save-stepz"),
        ("m --run.save-steps many", "Invalid value for '--run.save-steps'"),
        ("m --run.save-steps 0", "`run.save_steps` must be at least 1, got 0."),
        ("m --run.max-grad-norm big", "'big' is not a valid float"),
        ("m --kind llama", "'llama' is not one of 'rigpt', 'stock_gpt2'"),
        ("m --run.scale cubic", "'cubic' is not one of 'linear', 'log_2'"),
        ("m --multipliers a=b", "'b' is not a valid float"),
        ("m --multipliers a", "Invalid value for '--multipliers'"),
        ("m --multipliers {a", "is not YAML"),
        ("m --config none.yaml", "`--config` must be a readable YAML file or a preset, got 'none.yaml': No such file"),
        ("m --config smal", "got 'smal': No such file or directory. Did you mean 'small'? See it --help"),
        ("m --config smal.yaml", "got 'smal.yaml': No such file or directory. Did you mean 'small'? See it --help"),
        ("m --config FILE:-", "`--config` must have options as its keys"),
        ("m --config FILE:[1]", "`--config` must have options as its keys"),
        ("m --config FILE:{a:", "is not YAML"),
        ("m --config FILE:run: {save_step: 1}", "got `run.save_step` in"),
        ("m --config FILE:run: {save_step: 1}", "Did you mean 'run.save_steps'? See it --help"),
        ("m --config FILE:run: {save_steps: many}", "Invalid value for '--run.save-steps'"),
        ("m --config FILE:run: {save_steps: null}", "`run.save_steps` must have a value, got null"),
        ("m --config FILE:run: {trackers: 3}", "3 is not a list"),
        ("m --config FILE:run: 3", "got `run` in"),
        ("m --config FILE:multipliers: 3", "3 is not of the form key=value"),
    ],
)
def test_what_does_not_fit_ends_in_one_line(capsys, tmp_path, presets, arguments, message):
    arguments, _, content = arguments.partition("FILE:")
    if content:
        (tmp_path / "given.yaml").write_text(content)
        arguments += str(tmp_path / "given.yaml")
    done = []
    assert program(Options, done.append, name="it", presets=presets)(arguments.split()) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("it: ") and shown.count("\n") == 1 and message in shown, shown
    assert not done
    with pytest.raises(ValueError):
        parse(Options, arguments.split(), name="it", presets=presets)


def test_help_is_what_stands_under_the_fields(capsys, monkeypatch, presets):
    monkeypatch.setenv("COLUMNS", "200")
    assert field_docs(Run)["save_steps"] == "Steps between checkpoints."
    assert program(Options, print, name="it", help="Does it.", presets=presets)(["-h"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for expected in (
        "Does it.",
        "--run.save-steps",
        "Steps between checkpoints.",
        "[default: 500]",
        "rigpt|stock_gpt2",
    ):
        assert expected in shown, shown
    for expected in ("or the name of a preset: small.", "[default: (tensorboard)]", "--run.no-force", "linear|log_2"):
        assert expected in shown, shown
    assert shown.count("[default: (none)]") == 4 and shown.count("[default:") == 11
    with pytest.raises(SystemExit):
        parse(Options, ["--help"])


def test_the_exit_code_is_what_the_program_returns(capsys):
    assert program(Options, lambda options: 3, name="it")(["m"]) == 3
    assert program(Options, lambda options: options, name="it")(["m"]) == 0

    def fails(options):
        raise KeyError("lost")

    assert program(Options, fails, name="it")(["m"]) == 2
    assert "KeyError" in capsys.readouterr().err
    with pytest.raises(KeyError):
        program(Options, fails, name="it")(["m", "--debug"])
    assert program(Options, lambda options: Path("x" * 300).read_text(), name="it")(["m"]) == 2
    line = f"it: A path must be one that can be read or written, got '{'x' * 80}': File name too long. Name another.\n"
    assert capsys.readouterr().err == line


def test_errors_name_what_was_typed():
    """Functions that serve several arguments have one name for them; the value tells which was meant."""
    typed = {
        "a": "A",
        "b": "B",
        "output": "OUTPUT",
        "json_file": "--json",
        "json": "--json",
        "space_repo": "--space-repo",
    }
    values = {"a": "x", "b": "y", "output": Path("o"), "json_file": Path("j"), "space_repo": "s", "seed": 3}
    for message, expected in (
        (
            "`source` must be a RiGPT, got 'y' of model type 'gpt2'.",
            "`B` must be a RiGPT, got 'y' of model type 'gpt2'.",
        ),
        ("`source` must be there, got 'z'.", "`source` must be there, got 'z'."),
        ("`repo` must be a name, got 's'.", "`--space-repo` must be a name, got 's'."),
        ("`output_dir` must be empty, got 'o'.", "`OUTPUT` must be empty, got 'o'."),
        (
            "`json` must be new; `a` and `lm_head.weight` may stay.",
            "`--json` must be new; `A` and `lm_head.weight` may stay.",
        ),
        (  # a file has names of its own
            "`source` must have a `config.json` with possible values, got 'y': `json` must be true or false, got 3.",
            "`B` must have a `config.json` with possible values, got 'y': `json` must be true or false, got 3.",
        ),
    ):
        assert as_typed(message, typed, values) == expected
    said = as_typed("`a` and `b` must have one vocabulary.", {"sources": "SOURCES"}, {"sources": ["x", "y"]})
    assert said == "all of `SOURCES` must have one vocabulary."


def test_what_is_written_is_kept_apart(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    source = str(tmp_path / "model")
    for read, written in (
        ({"A": source}, {"--json": tmp_path / "model" / "config.json"}),
        ({"A": source}, {"OUTPUT": tmp_path / "other" / ".." / "model"}),
        ({"A": [source, "gpt2"]}, {"OUTPUT": tmp_path}),
        ({}, {"OUTPUT": tmp_path / "o", "--json": tmp_path / "o" / "j.json"}),
        ({}, {"--json": tmp_path / "j", "--picture": tmp_path / "j"}),
    ):
        with pytest.raises(ValueError, match="must not replace what is read|must not lie in each other"):
            check_apart(read, written)
    # A new file beside what is read harms nothing, nor does what is not there or not asked for.
    check_apart(
        {"A": source, "B": "gpt2", "--text": None}, {"--json": tmp_path / "model" / "new.json", "OUTPUT": None}
    )
