"""The verb that writes model cards."""

from pathlib import Path
from typing import Annotated

from ..command_line import READS, check_apart
from ..terminal import Console, say_next
from .arguments import argument, flag, option


def card(
    folder: Annotated[Path, argument("Folder of a saved RiGPT."), READS],
    repo: Annotated[str | None, option("Where it will be on the Hub, such as me/my-rigpt.", "none")] = None,
    results: Annotated[
        Path | None, option("results.json of rigpt evaluate on this folder.", "that of the folder, if any"), READS
    ] = None,
    metadata: Annotated[
        Path | None,
        option(
            "YAML file with what only you know: title, description, license, language, datasets, base_model, "
            "authors, intended_use, limits, citation.",
            "none",
        ),
        READS,
    ] = None,
    force: Annotated[bool, flag("force", "Replace a card that this program wrote and nobody changed.")] = False,
):
    """
    Write the model card (README.md) of a saved RiGPT from what is known of it.

    The shape comes from the configuration, the training from the run that wrote the folder, exactness from the
    certificate of a conversion, numbers from an evaluation of these very weights, and the rest from you. Nothing is
    made up: what nobody has stated or measured is listed as such. Without an evaluation the invariance error is
    measured now, on random tokens.

        rigpt card my-rigpt --repo me/my-rigpt --results runs/mine/results.json --metadata metadata.yaml
    """
    from ..checkpoints.read import quiet_loading
    from ..model_cards.card import CARD, write_card

    check_apart({"--results": results, "--metadata": metadata}, {"FOLDER": folder / CARD})
    with quiet_loading():
        path = write_card(folder, repo_id=repo, results=results, metadata=metadata, force=force)
    Console().print(f"Card in {path}", markup=False)
    say_next(("rigpt", "publish", folder, repo or "OWNER/NAME", "--dry-run"))
