"""The verb that puts a model on the Hub."""

from pathlib import Path
from typing import Annotated, Any

from rich.filesize import decimal
from rich.table import Column, Table

from ..command_line import READS, typed_again
from ..terminal import Console, say_next, visible
from .arguments import argument, flag, option


def publish(
    folder: Annotated[
        Path, argument("Folder of a RiGPT, of an adapter (LoRA) of one, or of its export to GGUF."), READS
    ],
    repo: Annotated[str, argument("Repository, such as me/my-rigpt; it is made if there is none.")],
    private: Annotated[bool, flag("private", "Make a new repository private.")] = False,
    revision: Annotated[str | None, option("Branch to publish on; it is made if there is none.", "main")] = None,
    base: Annotated[
        str | None,
        option("Model on the Hub that this one belongs to or was made from, for the card.", "what an adapter names"),
    ] = None,
    collection: Annotated[
        str | None, option("Title of a collection to put it into; it is made if there is none.", "none")
    ] = None,
    results: Annotated[
        Path | None,
        option(
            "results.json of an evaluation; report.html and table.md are made of it and go along.",
            "that of the folder",
        ),
        READS,
    ] = None,
    card: Annotated[Path | None, option("Card to use.", "README.md of the folder, or written"), READS] = None,
    metadata: Annotated[
        Path | None, option("YAML file with what only people know, for a card that is written."), READS
    ] = None,
    space: Annotated[bool, flag("space", "Also make a Space in which people turn the model by an angle.")] = False,
    space_repo: Annotated[str | None, option("Repository of the Space.", "named as the model")] = None,
    baseline: Annotated[
        str | None,
        option(
            "Stock model that the Space shows beside it, with the same tokenizer, such as openai-community/gpt2.",
            "an export of the model",
        ),
    ] = None,
    dry_run: Annotated[bool, flag("dry-run", "Check, and list what would be published.")] = False,
    force: Annotated[
        bool, flag("force", "Overwrite another kind of model; publish code that differs from the installed package.")
    ] = False,
):
    """
    Put a model on the Hub: weights, code, tokenizer, certificate, card, evaluation.

    A card that rigpt card wrote and nobody changed is made to fit: it loads the model from REPO, and is written once
    more if the weights or the results are others. A card of your own is published as it is.

    Everything is checked first, and the model is loaded; then all of it appears in one commit. If the connection
    breaks, say the same command again: what has arrived is not sent again.

    A repository that holds a RiGPT is updated: what belonged to the earlier model and not to this one (weights, code,
    tokenizer, evaluation) goes in the same commit, the card is replaced, other files stay, and all of it remains in
    the repository's history. A repository that holds another kind of model is refused without --force.

    An adapter of LoRA and files in GGUF get repositories of their own, with a card that names the model that they
    belong to; --collection puts a repository into a collection of its owner.

    With --space a small Gradio app is published too: one drags an angle, RiGPT's next-token distribution stands still
    and that of a stock model falls apart. It installs this package from the commit that is installed here, or by its
    version, which must be on PyPI then.

    A model is published on a Hub alone: a folder is one already, which from_pretrained loads and which can be copied.
    Without --space, --dry-run needs no network.

    The token is that of hf auth login, or HF_TOKEN; it is never shown or stored. HF_ENDPOINT names another Hub.

        rigpt publish my-rigpt me/my-rigpt --dry-run

        rigpt publish my-rigpt me/my-rigpt --private --results runs/mine/results.json

        rigpt publish my-adapter me/my-adapter --base me/my-rigpt --collection "My RiGPT"

        rigpt publish my-gguf me/my-rigpt-GGUF --base me/my-rigpt --collection "My RiGPT"

        rigpt publish my-rigpt me/my-rigpt --space --baseline openai-community/gpt2
    """
    from ..publishing.repository import repository_files
    from ..publishing.upload import check_collection, check_repo_id, check_revision
    from ..publishing.upload import publish as run

    # Names of files and folders are no markup.
    console = Console(markup=False)
    if not space and (space_repo or baseline):
        raise ValueError("`space_repo` and `baseline` are for a Space, got one of them without `--space`. Add it.")
    if space:
        from huggingface_hub import get_token

        from ..publishing.space import check_space, publish_space, space_files
        from ..version import package

        space_repo = check_space(
            folder,
            repo,
            space_repo,
            private=private,
            baseline=baseline,
            token=None if dry_run else get_token(),
            force=force,
        )
    if dry_run:
        check_repo_id(repo)
        check_revision(revision)
        check_collection(collection)
        contents = repository_files(
            folder, repo_id=repo, base=base, results=results, card=card, metadata=metadata, force=force
        )
        say_files(console, {file.path: file.size for file in contents.files}, repo)
        say_left_out(console, contents.left_out)
        for note in contents.notes:
            console.print(note, highlight=False)
        if space:
            files = space_files(repo, baseline=baseline)
            say_files(console, {name: len(content) for name, content in files.items()}, f"the Space {space_repo}")
            pinned = package()
            unsure = (
                "" if "@" in pinned else ", and is built once the index has that; installed from a commit, it pins it"
            )
            console.print(f"The Space installs {pinned}{unsure}", highlight=False)
        say_next(typed_again("publish", without="--dry-run"))
        return
    report = run(
        folder,
        repo,
        private=private,
        revision=revision,
        base=base,
        collection=collection,
        results=results,
        card=card,
        metadata=metadata,
        force=force,
        console=console,
    )
    size = decimal(sum(file.size for file in report.files))
    console.print(f"Published {len(report.files)} files, {size}, to {report.repo_id}", highlight=False)
    if report.removed:
        console.print(f"Removed there: {', '.join(report.removed)}", highlight=False)
    say_left_out(console, report.left_out)
    console.print(report.url, soft_wrap=True)
    console.print(report.load, soft_wrap=True, highlight=False)
    if report.collection:
        console.print(f"Collection: {report.collection}", soft_wrap=True, highlight=False)
    if space:
        try:
            shown = publish_space(report, space_repo, baseline=baseline, force=force, console=console)
        except ValueError as error:
            raise ValueError(
                f"The model is published at {report.url}, its Space is not: {error} The same command tries again."
            ) from error
        console.print(f"Space: {shown.url}", soft_wrap=True)
    say_next(use_of(report, folder, base))


def use_of(report: Any, folder: Path, base: str | None) -> tuple[object, ...]:
    """The command that uses what was published."""
    from ..checkpoints.source import ADAPTER, read_json
    from ..model_cards.siblings import ADAPTERS, GGUF
    from ..publishing.siblings import kind_of

    kind = kind_of(folder)
    if kind == GGUF:
        return "llama-cli", "-hf", report.repo_id
    if kind == ADAPTERS:
        model = base or read_json(folder / ADAPTER, "folder").get("base_model_name_or_path") or "MODEL"
        return "rigpt", "generate", model, "TEXT", "--adapter", folder
    has_tokenizer = any(file.path == "tokenizer_config.json" for file in report.files)
    verb, *text = ("generate", "TEXT") if has_tokenizer else ("info",)
    branch = () if report.revision == "main" else ("--revision", report.revision)
    return "rigpt", verb, report.repo_id, *text, *branch


def say_files(console: Any, sizes: dict[str, int], place: str):
    """A table of files with their sizes in bytes, and where they would go."""
    table = Table("file", Column("size", justify="right"))
    for name, size in sizes.items():
        table.add_row(visible(name), decimal(size))
    console.print(table)
    line = f"{len(sizes)} files, {decimal(sum(sizes.values()))}, would go to {place}. Nothing was sent."
    console.print(line, soft_wrap=True)


def say_left_out(console: Any, names: tuple[str, ...]):
    """One line if the folder has files that a repository does not hold."""
    if names:
        shown = ", ".join(map(visible, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        console.print(f"Left out: {shown}", highlight=False)
