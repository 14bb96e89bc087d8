"""The files of a saved model that go into a repository on the Hub, and the checks that a stranger can load it."""

import re
from collections.abc import Callable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError
from transformers.dynamic_module_utils import get_relative_import_files

import rigpt_hf

from ..checkpoints.certificate import CERTIFICATE_NAME
from ..checkpoints.companions import TEMPLATE_FILES, TOKENIZER_FILES
from ..checkpoints.read import load_model, name_some, quiet_loading
from ..checkpoints.source import read_json
from ..evaluation.harness.report import as_html
from ..evaluation.harness.tables import as_markdown
from ..evaluation.models import EvaluatedModel, evaluated
from ..model_cards.card import CARD
from ..model_cards.certified import NOT_PASSED, OF_ANOTHER, QUESTION, certificate_of
from ..model_cards.marker import PLACEHOLDER
from ..model_cards.metadata import evaluation_of
from ..symmetry.tokens import Representation
from ..token_symmetry_rigpt import SYMMETRY_FRAME
from .cards import card_of, check_base, pictures_of
from .contents import (
    RECORDS,
    TEMPLATES,
    RepositoryContents,
    RepositoryFile,
    check_inside,
    check_nothing_forbidden,
    check_tokenizer,
    gathered,
    has_vocabulary,
    names_beside,
    refusal,
)
from .notebook import NOTEBOOK, notebook
from .siblings import kind_of, sibling_files


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Written beside the weights by the library and by this package; a folder may hold anything else.
SHARD = re.compile(r"[\w.-]+\.safetensors")
SAVE = "with `save_pretrained`"
EVALUATION = ("results.json", "report.html", "table.md")
BESIDE_WEIGHTS = ("generation_config.json", SYMMETRY_FRAME, *RECORDS)
# Files of a model in a repository.
MANAGED = (
    "model*.safetensors",
    INDEX,
    "pytorch_model*",
    "*_rigpt.py",
    "config.json",
    NOTEBOOK,
    *TOKENIZER_FILES,
    *BESIDE_WEIGHTS,
    *TEMPLATE_FILES,
)


def repository_files(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    base: str | None = None,
    results: str | Path | None = None,
    card: str | Path | None = None,
    metadata: str | Path | None = None,
    force: bool = False,
    check_loading: bool = True,
) -> RepositoryContents:
    """
    The files that a repository holds of a saved RiGPT: weights, code, configuration, tokenizer, certificate, card and
    evaluation. Every other file of the folder is left out, but for what must not lie beside a model at all.

    Of a folder with an adapter of PEFT or with files in GGUF, those that [`sibling_files`] names.

    Args:
        folder (`str` or `Path`): of a RiGPT, as `save_pretrained` and the verbs of `rigpt` write it.
        repo_id (`str`, *optional*): for the card, if one is written.
        base (`str`, *optional*): id on the Hub of the model that this one was made from, for a card that is written.
        results (`str` or `Path`, *optional*): `results.json` of an evaluation, which goes to `evaluation/` with the
            `report.html` and `table.md` that are made of it; that of the folder if there is one.
        card (`str` or `Path`, *optional*): file to be the card. Otherwise it is the folder's README.md, or, if that
            has none, written from what is known. One that `rigpt card` wrote is made to fit the repository, and
            written once more for other weights, results or another base.
        metadata (`str` or `Path`, *optional*): YAML file for a card that is written, see `rigpt_hf.model_cards`.
        force (`bool`, defaults to `False`): let code go out that is not that of the installed package.
        check_loading (`bool`, defaults to `True`): load the model on the CPU, as the last check.

    Raises:
        ValueError: if the folder is not a whole RiGPT with its code, holds pickles, an optimizer state, checkpoints,
            an access token, code and weights that the model does not use, or a card of other weights that cannot
            be written once more; the message names which.
    """
    folder = Path(folder)
    # Before any of them is read; the others are looked at before they are sent.
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_managed(path.name) or path.name in (CARD, EVALUATION[0]):
            check_inside(folder, path.name)
    results, card, metadata = (None if path is None else Path(path) for path in (results, card, metadata))
    if base is not None:
        check_base(base)
    if (kind := kind_of(folder)) is not None:
        if results is not None:
            raise ValueError(
                f"`results` are of a whole model, got {str(results)!r} with a folder of {kind}. Leave them out."
            )
        return sibling_files(
            folder, kind, repo_id=repo_id, base=base, card=card, metadata=metadata, check_loading=check_loading
        )
    config = _read_config(folder)
    check_nothing_forbidden(folder)
    names = ["config.json", *_weights(folder, config), *_code(folder, config, force)]
    names += [name for name in BESIDE_WEIGHTS if (folder / name).is_file()] + names_beside(folder)
    if results is None and (folder / EVALUATION[0]).is_file():
        results = folder / EVALUATION[0]
    if results is not None and not results.is_file():
        raise ValueError(f"`results` must be the results.json of an evaluation, got {str(results)!r}: no such file.")
    if check_loading:
        check_that_it_loads(folder, config)
        check_tokenizer(folder)
    measured = cache(lambda: model_of(folder))
    evaluation, notes = ([], []) if results is None else _evaluation(results, measured)
    text, more = card_of(folder, measured, repo_id=repo_id, results=results, card=card, metadata=metadata, base=base)
    names += pictures_of(text, folder)
    if CERTIFICATE_NAME in names and (note := _doubt_of_certificate(folder, measured)):
        names.remove(CERTIFICATE_NAME)
        more.append(note)
    made = [*evaluation, RepositoryFile(CARD, text.encode())]
    if (folder / NOTEBOOK).is_file():  # a person's own
        names.append(NOTEBOOK)
    elif has_vocabulary(folder) and config.get("architectures") == [rigpt_hf.RiGPTForCausalLM.__name__]:
        turns = "quantization_config" not in config
        made.append(RepositoryFile(NOTEBOOK, notebook(repo_id or PLACEHOLDER, turns=turns)))
    return gathered(folder, names, made, [*notes, *more])


def is_managed(path: str) -> bool:
    """Whether a file of a repository belongs to the model in it, and goes when that model is replaced."""
    if "/" in path:
        return fnmatch(path, TEMPLATES) or path in {f"evaluation/{name}" for name in EVALUATION}
    return any(fnmatch(path, pattern) for pattern in MANAGED)


def check_that_it_loads(folder: Path, config: dict[str, Any]) -> None:
    """
    Load the model on the CPU with the classes of this package, and the token symmetry that is recorded of it.

    Raises:
        ValueError: if they do not load, or its weights are not those that its configuration asks for.
    """
    name = (config.get("architectures") or ["RiGPTForCausalLM"])[0]
    model_class = getattr(rigpt_hf, name, None) if name in rigpt_hf.__all__ else None
    if model_class is None or not hasattr(model_class, "from_pretrained"):
        raise ValueError(f"`folder` must hold one of the models of this package, got {str(folder)!r} with a {name!r}.")
    load_model(folder, model_class, argument="folder", dtype="auto")
    if config.get("token_symmetry"):
        Representation.load(folder)


def check_there(folder: Path) -> None:
    """A `ValueError` if a folder is none."""
    if not folder.is_dir():
        problem = ", which is a file" if folder.exists() else ": no such folder"
        raise refusal(folder, "be the folder of a saved model", problem, "Check the path.")


def _read_config(folder: Path) -> dict[str, Any]:
    check_there(folder)
    if not (folder / "config.json").is_file():
        problem = ", which has no `config.json`"
        raise refusal(folder, "be the folder of a saved model", problem, f"Save the model {SAVE}.")
    config = read_json(folder / "config.json", "folder")
    if config.get("model_type") != "rigpt":
        problem = f" of model type {config.get('model_type')!r}"
        advice = f"Convert it first: rigpt convert {folder} OUTPUT. An export goes as it is: hf upload REPO {folder}"
        raise refusal(folder, "hold a RiGPT", problem, advice)
    for name, kind in (("auto_map", dict), ("architectures", list), ("token_symmetry", dict)):
        if not isinstance(config.get(name) or kind(), kind):
            problem = f" with {name} {config[name]!r:.80}"
            raise refusal(folder, "have a config.json of this package", problem, f"Save the model once more {SAVE}.")
    return config


def _weights(folder: Path, config: dict[str, Any]) -> list[str]:
    if (folder / INDEX).is_file():
        mapping = read_json(folder / INDEX, "folder").get("weight_map")
        shards = set(map(str, mapping.values())) if isinstance(mapping, dict) else set()
        if strange := sorted(shard for shard in shards if not SHARD.fullmatch(shard)):
            problem = f", whose `{INDEX}` names {strange[0]!r:.80}"
            raise refusal(folder, "hold its weights as safetensors of its own", problem, f"Save it once more {SAVE}.")
        names = [INDEX, *sorted(shards)]
    else:
        names = [SINGLE]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent or len(names) == names.count(INDEX):
        problem = f" without {name_some(absent or ['weight_map'])}"
        raise refusal(folder, "hold all weights as safetensors", problem, f"Save the model once more {SAVE}.")
    # Those in folders, such as an adapter that was merged, are left out as all other files are.
    framed = (config.get("token_symmetry") or {}).get("frame") == SYMMETRY_FRAME
    unused = {path.name for path in folder.glob("*.safetensors")} - {*names, *[SYMMETRY_FRAME] * framed}
    if unused:
        problem, advice = f", which also has {name_some(unused)}", "Move what is not of the model out of the folder."
        raise refusal(folder, "hold the weights of one model", problem, advice)
    return names


def _code(folder: Path, config: dict[str, Any], force: bool) -> list[str]:
    """The files that `auto_map` names and what they import; a stranger runs these."""
    advice = f"Load the model with this package and save it once more {SAVE}."
    classes = list((config.get("auto_map") or {}).values())
    if not classes:
        problem = " without one: nobody could load it who has not installed this package"
        raise refusal(folder, "have an `auto_map` in its config.json", problem, advice)
    elsewhere = [name for name in classes if not isinstance(name, str) or not re.fullmatch(r"\w+\.\w+", name)]
    if elsewhere:
        problem = f" with {elsewhere[0]!r}, which is no class in a file of its own"
        raise refusal(folder, "bring the code of its `auto_map` along", problem, advice)
    named = {f"{name.partition('.')[0]}.py" for name in classes}
    for path in [folder / name for name in named if (folder / name).is_file()]:
        try:
            named |= {Path(file).name for file in get_relative_import_files(path)}
        # It opens what a file imports, and says no more than that one is missing.
        except FileNotFoundError as error:
            named.add(Path(error.filename).name)
    present = {path.name for path in folder.glob("*.py")}
    for problem, names in (("lacks", named - present), ("also has", present - named)):
        if names:
            rule = "hold the code that its `auto_map` names and no other"
            raise refusal(folder, rule, f", which {problem} {name_some(names)}", advice)
    if lost := [name for name in classes if not _is_class(folder, *name.split("."))]:
        rule = "hold the classes that its `auto_map` names"
        raise refusal(folder, rule, f", which lacks {name_some(lost)}", advice)
    package = Path(rigpt_hf.__file__).parent
    ours = {name: package / name for name in named}
    changed = [n for n, path in ours.items() if not path.is_file() or path.read_bytes() != (folder / n).read_bytes()]
    if changed and not force:
        advice += " Or pass `force=True` if it is meant to differ."
        problem = f", where {name_some(changed)} differs"
        raise refusal(folder, "hold the code of the installed package", problem, advice)
    return sorted(named)


def _is_class(folder: Path, module: str, name: str) -> bool:
    text = (folder / f"{module}.py").read_text(encoding="utf-8", errors="replace")
    return re.search(rf"^class {name}\b", text, re.MULTILINE) is not None


def _doubt_of_certificate(folder: Path, measured: Callable[[], EvaluatedModel]) -> str:
    """Why the certificate stays at home, where nobody can tell whether it is of these weights; nothing if it is."""
    _, doubt = certificate_of(folder, measured())
    reason = doubt.removeprefix(f"{QUESTION}: ")
    if reason in OF_ANOTHER:
        raise ValueError(
            f"`folder` must have the certificate of its own weights or none, got "
            f"{str(folder / CERTIFICATE_NAME)!r}: {reason}. Remove it, or convert the source once more."
        )
    # That two models differ is as true as that they are equal.
    if not reason or reason == NOT_PASSED:
        return ""
    return f"{CERTIFICATE_NAME} is not published: {reason}. Convert the source once more for one that can be checked."


def model_of(folder: Path) -> EvaluatedModel:
    """The model of a folder, to measure it."""
    with quiet_loading():
        return evaluated(folder)


def _evaluation(results: Path, measured: Callable[[], EvaluatedModel]) -> tuple[list[RepositoryFile], list[str]]:
    """Numbers, and page and table made of them: what lies beside the file may be of another run."""
    numbers, _ = evaluation_of(results, measured())
    assert numbers is not None
    files, notes = [RepositoryFile(f"evaluation/{EVALUATION[0]}", results)], []
    for name, made in zip(EVALUATION[1:], (as_html, as_markdown), strict=True):
        try:
            files.append(RepositoryFile(f"evaluation/{name}", made(numbers).encode()))
        # Results of another version may lack what a page shows.
        except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
            notes.append(f"{name} is not published, as it cannot be made of {results} ({type(error).__name__}).")
    return files, notes
