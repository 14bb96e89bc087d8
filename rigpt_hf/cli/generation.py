"""The verb that lets a model write."""

import logging
import sys
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from ..checkpoints.source import is_model
from ..command_line import READS
from ..terminal import say, visible_lines
from .arguments import DTYPES, Device, Revision, argument, flag, one_of, option
from .common import check_device, to_dtype


logger = logging.getLogger(__name__)

NEW_TOKENS = 100


def generate(
    model: Annotated[str, argument("Folder or Hub id of a RiGPT or a stock model."), READS, is_model],
    prompt: Annotated[str | None, argument("Text to go on from.", "standard input")] = None,
    chat: Annotated[bool, flag("chat", "Answer the prompt, in the form of the tokenizer's chat template.")] = False,
    max_new_tokens: Annotated[
        int | None, option("Tokens to write at most.", f"{NEW_TOKENS}, or for how many there is room", min=1)
    ] = None,
    temperature: Annotated[float, option("0: the likeliest token each time; 1: as the model says.")] = 0.0,
    top_p: Annotated[float, option("Draw from the likeliest tokens that have this share together.")] = 1.0,
    samples: Annotated[int, option("Texts to write, drawn one by one.", min=1)] = 1,
    adapter: Annotated[Path | None, option("Folder of an adapter of this model, LoRA.", "none"), READS] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Annotated[
        str | None, option(f"Compute in: {', '.join(DTYPES)}.", "as the weights are stored"), one_of(*DTYPES)
    ] = None,
    seed: Annotated[int, option("Of what is drawn.")] = 0,
    json: Annotated[bool, flag("json", "Print one line of JSON for each text, when it is whole.")] = False,
):
    """
    Let a model write on from a text, or answer one.

        rigpt generate my-rigpt "The symmetry of a crystal"

        rigpt generate my-rigpt "What is a gauge?" --chat --temperature 0.7 --top-p 0.9

        cat notes.txt | rigpt generate my-rigpt --adapter my-lora --samples 3 --temperature 1 --json
    """
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise ValueError(
            "`temperature` must be at least 0 and `top_p` above 0 and at most 1, got "
            f"{temperature} and {top_p}. Take 0.7 and 0.9."
        )
    if temperature == 0 and (samples > 1 or top_p < 1):
        raise ValueError(
            f"`samples` and `top_p` need a `temperature` above 0, got {samples} and {top_p} with 0, where all texts "
            "are the same. Take 0.7, or leave them out."
        )
    if prompt == "":
        raise ValueError("`prompt` must be a text, got ''. Write it behind the model, or pipe it in.")
    check_device(device, dtype)
    import torch

    from ..checkpoints.read import check_ids, check_model, load_model, load_tokenizer, quiet_loading

    config, _ = check_model(model, argument="model", revision=revision)
    tokenizer = load_tokenizer(model, argument="model", revision=revision)
    check_ids(tokenizer, config, model)
    loaded = load_model(model, argument="model", revision=revision, dtype=to_dtype(dtype) or "auto")
    if adapter is not None:
        from ..checkpoints.adapters import warn_of_other_base, with_adapter

        loaded = with_adapter(loaded, adapter)
        warn_of_other_base(adapter, model)
    loaded = loaded.to(device or best_device()).eval()
    text = sys.stdin.read() if prompt is None else prompt
    if text.encode(errors="replace").decode() != text:
        raise ValueError(f"`prompt` must be text in UTF-8, got {text[:20]!r}. Save it in that encoding.")
    ids = tokens_of(text, tokenizer, chat).to(loaded.device)
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    # Those that the folder has for drawing mean nothing where nothing is drawn.
    settings: dict[str, Any] = {
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "do_sample": temperature > 0,
    } | drawn
    settings["max_new_tokens"] = room_for(loaded.config, ids.shape[1], max_new_tokens)
    for each in range(seed, seed + samples):
        if samples > 1 and not json:
            say(f"--- seed {each}")
        torch.manual_seed(each)
        streamer = None if json else shown_as_written(tokenizer)
        with quiet_loading(), torch.inference_mode():
            whole = loaded.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **settings)
        written = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        if not written.strip():
            hint = " Its tokenizer has a chat template: try --chat." if tokenizer.chat_template and not chat else ""
            logger.warning(f"The model ended the text at once.{hint}")
        if json:
            print(dumps({"prompt": text, "text": written, "seed": each}), flush=True)


def best_device() -> str:
    """The accelerator that is there, or the CPU."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def tokens_of(text: str, tokenizer: Any, chat: bool) -> Any:
    """
    Ids `[1, S]` of a text, or of a chat in which it is the first that is said.

    Raises:
        ValueError: if it is empty, or there is no template.
    """
    from ..checkpoints.read import reading

    if chat and not tokenizer.chat_template:
        raise ValueError("`chat` needs a tokenizer with a chat template, got one without. Leave `--chat` out.")
    if chat:
        with reading("model", tokenizer.name_or_path, "come with a chat template that works"):
            said = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not ids.numel():
        raise ValueError(f"`prompt` must be a text, got {text[:20]!r}. Write it behind the model, or pipe it in.")
    return ids


def room_for(config: Any, prompt: int, new: int | None) -> int:
    """
    How many tokens to write behind a prompt of so many.

    Raises:
        ValueError: if there are fewer positions.
    """
    positions = getattr(config, "max_position_embeddings", None) or prompt + (new or NEW_TOKENS)
    if prompt + (new or 1) > positions:
        raise ValueError(
            f"`max_new_tokens` must fit behind the prompt into the {positions} positions of the model, got {new or 1} "
            f"behind {prompt}. Take fewer, or a shorter prompt."
        )
    return new or min(NEW_TOKENS, positions - prompt)


def shown_as_written(tokenizer: Any) -> Any:
    """A streamer that prints a text word by word while it is written, without what would steer the terminal."""
    from transformers import TextStreamer

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False):
            print(visible_lines(text), end="\n" if stream_end else "", flush=True)

    return Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)
