"""`push_to_hub` with the card of a RiGPT, in place of one that says nothing."""

from functools import wraps
from importlib import import_module

from transformers.modeling_utils import PreTrainedModel
from transformers.utils import PushToHubMixin, logging


logger = logging.get_logger(__name__)


class RiGPTHubMixin(PushToHubMixin):
    """`push_to_hub` with the card of a RiGPT."""

    @wraps(PreTrainedModel.push_to_hub, assigned=())
    def push_to_hub(self, *args, **kwargs):
        """
        As for every model, with the same arguments: weights, configuration and the code that loads them.

        Where `rigpt_hf` is installed, the card is that of `rigpt card`, of what the weights say by themselves. A card
        in the repository that a person wrote or changed stays as it is.

        The tokenizer and the results of an evaluation do not go along, nor what a training run wrote down:
        `tokenizer.push_to_hub` brings the first, `rigpt publish` all of it.
        """
        return super().push_to_hub(*args, **kwargs)

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        try:
            # By name: this file also travels with the weights, to where the package is not.
            pushed = import_module("rigpt_hf.model_cards.pushed")
        except ImportError:
            logger.warning(f"The card of {repo_id} is that of Transformers: install rigpt-hf for that of a RiGPT.")
        else:
            pushed.write_card_of_push(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)
