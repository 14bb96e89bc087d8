"""The facts that make a run (settings, data, versions), compared with what it was when it was started."""

import json
from collections.abc import Iterator
from typing import Any


Facts = dict[str, Any]


def check_facts(saved: Facts, now: Facts, override: str) -> None:
    """
    Raise if a run goes on with other settings, data or versions than it was started with.

    Args:
        saved (`dict`): `facts` of a checkpoint.
        now (`dict`): The same of this run; both may be nested.
        override (`str`): How the message calls the way to go on all the same.

    Raises:
        ValueError: if any field differs; it lists them, old → new.
    """
    before, after = (dict(_dotted(json.loads(json.dumps(facts)))) for facts in (saved, now))
    changes = []
    for name in sorted(before.keys() | after.keys()):
        old, new = (_json(facts[name]) if name in facts else "absent" for facts in (before, after))
        # 1 and 1.0 are equal though spelled differently; NaN is spelled as itself though not equal to it.
        if old != new and not (name in before and name in after and before[name] == after[name]):
            changes.append(f"{name} {_short(old)} → {_short(new)}")
    if changes:
        raise ValueError(
            f"What the run is made of must be as when it was started, but changed: {'; '.join(changes)}. Go back to "
            f"that, start in a new folder, or pass {override} to go on with what is new."
        )


def _dotted(facts: Facts, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
