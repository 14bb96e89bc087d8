"""The card that `push_to_hub` of a RiGPT sends."""

from pathlib import Path

from huggingface_hub import ModelCard
from transformers.utils import logging

from rigpt_hf.checkpoints.folder import write_text
from rigpt_hf.checkpoints.read import quiet_loading
from rigpt_hf.checkpoints.written import look

from .card import CARD, TAGS, card_text
from .marker import is_unchanged, read_marker


logger = logging.get_logger(__name__)
# In the card that Transformers writes where a repository has none.
SAYS_NOTHING = "This model card has been automatically generated."


def write_card_of_push(folder: str | Path, repo_id: str) -> None:
    """
    Put the card of a RiGPT in the place of one that Transformers or `rigpt card` wrote; a person's own stays.

    Nothing is raised where no card can be written: the weights matter more, and a warning says why.

    Args:
        folder (`str` or `Path`): That is about to be sent, with the card that is there or that Transformers made.
        repo_id (`str`): Where it goes.
    """
    path = Path(folder) / CARD
    try:
        seen = look(path)
        text = path.read_text(encoding="utf-8")
        marker = read_marker(text)
        if marker is None and SAYS_NOTHING not in text:
            return
        if marker is not None and not is_unchanged(text, marker):
            logger.warning(f"The card of {repo_id} was changed by hand and stays as it is: is it of these weights?")
            return
        tags = [tag for tag in getattr(ModelCard(text).data, "tags", None) or () if tag not in TAGS]
        said = None if marker is None else marker.author_metadata
        with quiet_loading():
            card = card_text(Path(folder), repo_id=repo_id, metadata=said, tags=tags)
        write_text(path, card, seen=seen)
    # A card loads and measures the model, which fails in many ways: an allocator without memory has its own error.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        logger.warning(f"The card of {repo_id} is not that of rigpt card: {reason}")
