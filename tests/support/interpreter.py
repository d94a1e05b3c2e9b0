"""Triton's interpreter without what it does again at each call of a device function.

At a launch, and at each call of a device function within it, Triton looks through its language for
what it has to replace. That takes more than half of a kernel's time. Here it looks once in a
process: a launch puts these replacements in place, and takes them back when it ends.
"""

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

# Of `triton.runtime.interpreter`, in Triton 3.6 to 3.9; another release runs as it is.
PRIVATE = ("_patch_lang", "_LangPatchScope", "_MISSING")


class Language:
    """Triton's language, as compiled kernels or as interpreted ones see it.

    Args:
        replace: Triton's own function, which replaces what a kernel's module sees of the language.
    """

    def __init__(self, replace: Any) -> None:
        # Device functions of the language itself see its second module.
        scope = replace(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        first = {(owner, name): was for owner, name, was in reversed(scope._changes)}
        self._replaced = [
            (owner, name, was, getattr(owner, name)) for (owner, name), was in first.items()
        ]
        scope.restore()
        self._is_interpreted = False

    def interpret(self, kernel: Any) -> "Language":
        """In the place of `replace`, whose result has a method `restore`."""
        del kernel
        if not self._is_interpreted:
            for owner, name, _, interpreted in self._replaced:
                setattr(owner, name, interpreted)
            self._is_interpreted = True
        return self

    def restore(self) -> None:
        for owner, name, compiled, _ in self._replaced:
            if compiled is interpreter._MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, compiled)
        self._is_interpreted = False


def look_once() -> None:
    """Make Triton's interpreter look through its language once in this process."""
    if all(hasattr(interpreter, name) for name in PRIVATE):
        interpreter._patch_lang = Language(interpreter._patch_lang).interpret
