"""Triton's interpreter without what it computes again for each operation of a program.

What a kernel gives is the same, bit for bit. At a launch, and at each call of a device function
within it, Triton looks through its language for what it has to replace. That takes more than half
of a kernel's time. Here it looks once in a process: a launch puts these replacements in place, and
takes them back when it ends. The types of operations are remembered too, a third of what is left.
"""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

# Of `triton.runtime.interpreter`, in Triton 3.6 to 3.9; another release runs as it is.
PRIVATE = ("_patch_lang", "_LangPatchScope", "_MISSING", "_get_np_dtype")


class Language:
    """Triton's language, as compiled kernels or as interpreted ones see it.

    Args:
        replace: Triton's own function, which replaces what a kernel's module sees of the language.
    """

    def __init__(self, replace: Callable[[Any], Any]) -> None:
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


def remembering_dtypes(dtype_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """NumPy's dtype of a type of Triton; `dtype_of` makes a table of all for each answer."""
    of_scalar = cache(dtype_of)
    address = np.dtype(np.uint64)

    def remembered(of: Any) -> Any:
        return address if isinstance(of.scalar, tl.pointer_type) else of_scalar(of.scalar)

    return remembered


def remembering_blocks(make: Callable[..., None]) -> Callable[..., None]:
    """`tl.block_type.__init__`, which writes a name and counts elements for each operation."""
    made: dict[tuple[Any, ...], dict[str, Any]] = {}

    def remembered(self: Any, element: Any, shape: Any) -> None:
        if isinstance(element, tl.pointer_type):
            make(self, element, shape)
            return
        sizes = (n.value if isinstance(n, tl.constexpr) else n for n in shape)
        key = (element, *sizes)
        if key not in made:
            make(self, element, shape)
            made[key] = vars(self).copy()
        vars(self).update(made[key])

    return remembered


def remember() -> None:
    """Make Triton's interpreter remember what does not change in this process."""
    if all(hasattr(interpreter, name) for name in PRIVATE):
        interpreter._patch_lang = Language(interpreter._patch_lang).interpret
        interpreter._get_np_dtype = remembering_dtypes(interpreter._get_np_dtype)
        tl.block_type.__init__ = remembering_blocks(tl.block_type.__init__)
