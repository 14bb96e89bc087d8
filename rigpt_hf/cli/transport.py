"""The verb that carries what was made for one model to another: adapters, autoencoders, vectors, probes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from ..checkpoints.folder import check_file, check_output
from ..checkpoints.source import ADAPTER, is_model, read_json
from ..command_line import READS, WRITES
from ..extras import require
from ..terminal import Console, say_next
from .arguments import Device, argument, flag, option
from .common import check_device, new_file, say_written
from .symmetry import load_transformation


class Layout(NamedTuple):
    """The two files of a folder in the layout of PEFT or SAELens, and those that are the same in every frame."""

    settings: str
    tensors: str
    kind: str
    unchanged: tuple[str, ...] = ()


LAYOUTS = (
    Layout(ADAPTER, "adapter_model.safetensors", "an adapter"),
    Layout("cfg.json", "sae_weights.safetensors", "an autoencoder", ("sparsity.safetensors",)),
)


def is_place(value: Any, name: str, values: Mapping[str, Any]) -> None:
    """A mark for [`guarded`]: a `ValueError` if no folder, or no file where a file is carried, can be made here."""
    if Path(values["state"]).is_dir():
        check_output(Path(value), None, bool(values.get("force")), name)
    else:
        check_file(Path(value), name, bool(values.get("force")))


def is_state(value: Any, name: str, values: Mapping[str, Any]) -> None:
    """A mark for [`guarded`]: a `ValueError` if nothing is at a path that could be carried."""
    path = Path(value)
    if path.is_file() and path.suffix == ".safetensors":
        return
    if path.is_dir():
        layout = next((layout for layout in LAYOUTS if (path / layout.settings).is_file()), None)
        if layout is not None and (path / layout.tensors).is_file():
            return
        missing = " or ".join(layout.settings for layout in LAYOUTS) if layout is None else layout.tensors
        words = f"the folder {value!s:.80}, in which there is no {missing}"
    else:
        words = f"{value!s:.80}"
    raise ValueError(
        f"`{name}` must be the folder of an adapter of PEFT or of an autoencoder of SAELens, or a .safetensors file "
        f"with vectors, got {words}. Other files are pickles, which are not read here: save it as safetensors."
    )


def transport(
    state: Annotated[
        Path,
        argument(
            "Folder of an adapter (PEFT) or an autoencoder (SAELens), or .safetensors file with vectors or probes."
        ),
        READS,
        is_state,
    ],
    output: Annotated[Path, argument("Folder or file to make, as STATE is one."), WRITES, is_place],
    transformation: Annotated[
        Path | None,
        option("File that `rigpt rotate` or `rigpt diff` wrote with --save-transformation.", "found by alignment"),
        READS,
    ] = None,
    source: Annotated[
        str | None,
        option("RiGPT that STATE was made for: folder or Hub id.", "the base model of an adapter", name="--from"),
        READS,
        is_model,
    ] = None,
    target: Annotated[
        str | None, option("RiGPT that it is to be used with.", "not needed with a file", name="--to"), READS, is_model
    ] = None,
    hook: Annotated[
        str | None,
        option("Point of the network that vectors belong to: blocks.3.hook_resid_post.", "as names or cfg.json say"),
    ] = None,
    device: Device = None,
    inverse: Annotated[bool, flag("inverse", "From the turned model back to the one before.")] = False,
    force: Annotated[bool, flag("force", "Replace what this program wrote to OUTPUT and nobody changed.")] = False,
):
    """
    Carry what was made for one model into the frames of another: adapters, autoencoders, steering vectors, probes.

    Between a model and its disguise outputs stay the same up to rounding; between relatives, as after fine-tuning, it
    is the best that a change of frames can do. What has no exact form in another frame is refused: DoRA, IA3 on keys
    and values, the state of AdamW.

        rigpt rotate my-rigpt turned --frames all --save-transformation turn.safetensors

        rigpt transport my-adapter for-turned --from my-rigpt --transformation turn.safetensors

        rigpt transport sae/ sae-for-b/ --from my-rigpt --to relative --hook blocks.3.hook_resid_post
    """
    from ..checkpoints.adapters import warn_of_other_base
    from ..checkpoints.named import rigpt_config
    from ..conversion.families import ARCHITECTURES
    from ..symmetry import transport as carry
    from ..symmetry.transport import check_mean, is_adapter, transport_adapter

    check_device(device, "float64")
    folder = state.is_dir()
    layout = next((one for one in LAYOUTS if folder and (state / one.settings).is_file()), None)
    seen: Any = check_output(output, str(state), force, "output") if folder else check_file(output, "output", force)
    settings = read_json(state / layout.settings, "state") if layout else {}
    is_peft = layout is not None and layout.settings == ADAPTER
    base = settings.get("base_model_name_or_path") if is_peft else None
    if is_peft:
        check_base(settings, base)
        if source:
            warn_of_other_base(state, source)
    known = named_of(source, target, transformation, base)
    config = rigpt_config(known)
    tensors, metadata = read_tensors(state / layout.tensors if layout else state)
    architecture = ARCHITECTURES.get(config.converted_from or "")
    if architecture is not None and architecture.family.centred and not is_peft:
        check_mean(tensors, settings, hook)
    if transformation is None:
        g = alignment(source, target, device)
    else:
        g = load_transformation(transformation, config, 1.0)
    g = g.inverse() if inverse else g
    if is_peft or is_adapter(tensors):
        tensors, settings = transport_adapter(tensors, g, settings)
        settings |= {"base_model_name_or_path": target, "revision": None} if is_peft else {}
    else:
        tensors = carry(tensors, g, hook=hook, settings=settings)
    if layout is not None:
        write_folder(output, seen, state, layout, settings, tensors, metadata)
    else:
        write_tensors(output, seen, tensors, metadata)
    report(output, layout, len(tensors), g, settings)
    if layout is LAYOUTS[0]:
        say_next(("rigpt", "generate", target or "TURNED", "TEXT", "--adapter", output))


def named_of(source: str | None, target: str | None, transformation: Path | None, base: str | None) -> str:
    """One of the two models; a `ValueError` if not both are known, of which one is enough beside a transformation."""
    known = source or target or base
    if known and transformation is not None:
        return known
    if transformation is not None:
        raise ValueError(
            f"`--from` or `--to` must name a model that the `transformation` is of, got {str(transformation)!r} "
            "without one. Add `--from MODEL`."
        )
    given = {"--from": source, "--to": target}
    if missing := [f"{name} MODEL" for name, value in given.items() if value is None]:
        got = "".join(f"`{name}` {value!r} alone" for name, value in given.items() if value) or "none of these"
        raise ValueError(
            "`--from` and `--to` must name the two models, or `--transformation` the file of what lies between them, "
            f"got {got}. Add `{' '.join(missing)}`, or `--transformation FILE`."
        )
    assert known is not None
    return known


def check_base(settings: Mapping[str, Any], base: Any) -> None:
    """A `ValueError` if an adapter says that it belongs to a model of another class, whose weights are others."""
    from ..checkpoints.read import load_config

    kind = (settings.get("auto_mapping") or {}).get("base_model_class", "RiGPT")
    if isinstance(base, str) and (Path(base) / "config.json").is_file():
        kind = {"rigpt": "RiGPT"}.get(load_config(base, argument="state").model_type, f"the model in {base!r}")
    if not kind.startswith("RiGPT"):
        raise ValueError(
            f"`state` must be an adapter of a RiGPT, got one of {kind}: a conversion folds gains into weights, so "
            "that its factors are others. Merge it into that model with `merge_and_unload` of PEFT, and convert that."
        )


def alignment(source: Any, target: Any, device: str | None) -> Any:
    """The transformation that brings one model nearest to another; how near, is printed."""
    require("align")
    from ..checkpoints.opened import open_model
    from ..checkpoints.vocabulary import check_same_vocabulary
    from ..symmetry.alignment import check_alike
    from ..symmetry.comparison import search_between

    models = [open_model(name, argument=argument) for name, argument in ((source, "from"), (target, "to"))]
    check_same_vocabulary(*(model.place for model in models))
    check_alike(models[0].config, models[1].config, (source, target))
    found = search_between(models[0], models[1], device, progress=True)
    Console().print(
        f"Distance that alignment leaves between the two: {found.distances[-1]:.2g} of their weights. What is carried "
        "is exact where it is rounding; `rigpt diff` says whether it is.",
        markup=False,
    )
    return found.transformation


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """All tensors of a file of safetensors, and what is noted beside them."""
    from safetensors import safe_open

    from ..checkpoints.read import reading
    from ..checkpoints.source import check_readable
    from ..checkpoints.weights import check_finite

    check_readable(path, "state")
    with reading("state", path, "be a file of safetensors"), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        metadata = file.metadata() or {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"`state` must hold numbers of floating point, got {tensor.dtype} in {name!r} of {str(path)!r}. Leave "
                "it out, or save it as numbers."
            )
        check_finite(name, tensor, str(path))
    if not tensors:
        raise ValueError(f"`state` must hold tensors, got none in {str(path)!r}. Name another.")
    return tensors, {"format": "pt"} | metadata


def write_folder(
    output: Path,
    seen: Any,
    state: Path,
    layout: Layout,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Any],
    metadata: dict[str, str],
) -> None:
    """A folder in the layout of the one that was read."""
    from safetensors.torch import save_file

    from ..checkpoints.folder import new_folder

    with new_folder(output, seen, "output") as place:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / layout.tensors, metadata)
        (place / layout.settings).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for name in layout.unchanged:
            if (state / name).is_file():
                (place / name).write_bytes((state / name).read_bytes())


def write_tensors(output: Path, seen: Any, tensors: Mapping[str, Any], metadata: dict[str, str]) -> None:
    """A file of safetensors."""
    from safetensors.torch import save

    with new_file(output, "output", seen) as place:
        place.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def report(output: Path, layout: Layout | None, count: int, g: Any, settings: Mapping[str, Any]) -> None:
    """Print what was written, and what a person must know to use it."""
    kinds = dict.fromkeys(key.kind for key, _, _ in g.items())
    console, kind = Console(), layout.kind if layout else "vectors"
    console.print(f"Carried {count} tensors of {kind} through: {', '.join(kinds) or 'no frame'}", markup=False)
    if settings.get("lora_bias"):
        console.print("It has biases (`lora_bias`): the two models differ by constants that its maps must not see.")
    say_written(output)
