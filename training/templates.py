"""Chat templates: programs of somebody else, which may fail in any way, never end, or leave out what a chat says."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jinja2

from rigpt_hf.text import files


TEMPLATE_SECONDS = 60.0  # that a chat template may take for a conversation


def check_tools(messages: list[dict], tokenizer: Any, where: str) -> None:
    """A `ValueError` if a conversation calls tools of which the template says nothing: silence would be learned."""
    if not any(message.get("tool_calls") for message in messages):
        return
    without = [{"content": ""} | {key: message[key] for key in message if key != "tool_calls"} for message in messages]
    with accepted(where):
        said = tokenizer.apply_chat_template(messages, tokenize=False)
    try:
        with limited(TEMPLATE_SECONDS):
            is_silent = said == tokenizer.apply_chat_template(without, tokenize=False)
    except Exception:  # it missed them
        return
    if is_silent:
        raise files.Unreadable(
            f"`chat_template` must say which tools are called, got one that leaves `tool_calls` out of {where}. Give "
            "another with `--chat-template FILE`, or leave the row out."
        )


@contextmanager
def accepted(where: str) -> Iterator[None]:
    """
    For a block that renders a conversation.

    Raises:
        ValueError: if the template fails, as it may in any way, or comes to no end.
    """
    try:
        with limited(TEMPLATE_SECONDS):
            yield
    except files.Unreadable:
        raise
    except Exception as error:  # a template is a program
        kind = "" if isinstance(error, (jinja2.TemplateError, TimeoutError)) else f"{type(error).__name__}: "
        reason = f"{kind}{' '.join(str(error).split())[:200].rstrip('.')}"
        raise ValueError(
            f"`data` must have chats that the chat template accepts, got {where}: {reason}. Leave it out, or give "
            "another template with `--chat-template FILE`."
        ) from error


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises a `TimeoutError` in a block of the main thread that takes longer; other threads are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds:g} seconds")

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
