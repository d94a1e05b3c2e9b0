"""What error messages have in common: one line, in which no value takes up the screen."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

_MAX_WORD, _MAX_LINE = 200, 1000

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _MAX_WORD
_repr.maxlong = 40


def shown(value: Any) -> str:
    """A value as Python writes it, abbreviated."""
    return _repr.repr(value)


def one_line(message: object) -> str:
    """A message that others wrote, as one line in which no word is longer than a reader wants."""
    line = " ".join(part.strip() for part in str(message).splitlines())
    line = re.sub(rf"(\S{{{_MAX_WORD}}})\S+", r"\1...", line)
    return line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}..."


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?` for a misspelt name, or one of another group; else nothing.

    Args:
        name: Such as "lr" or "sae.k".
        known: The names that exist, in the same form.
    """
    if len(name) > _MAX_WORD:
        return ""
    known = sorted(known)
    leaf = name.rpartition(".")[2]
    same_leaf = [other for other in known if other.rpartition(".")[2] == leaf]
    close = get_close_matches(name, same_leaf, 1, cutoff=0) or get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


@contextmanager
def named_sae(name: str) -> Generator[None]:
    """Within, messages that speak of `sae` speak of one of several by its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"\bsae(?=[.:])", lambda _: f"saes.{name}", str(error))) from error


def named_values(error: Exception, values: Mapping[str, Any]) -> str:
    """The values of the settings that an error speaks of and does not show, in parentheses."""
    words = set(re.findall(r"[\w.]+", str(error)))
    named = [
        f"{name}: {shown(value)}"
        for name, value in values.items()
        if not words.isdisjoint({name, f"cfg.{name}"}) and shown(value) not in words
    ]
    return f" ({', '.join(named)})" if named else ""
