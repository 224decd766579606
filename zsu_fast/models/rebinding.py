"""Functions in the attributes of a copied model: they have to refer to the copy.

``copy.deepcopy`` returns functions as they are. A ``forward`` that was replaced on the instance by
a closure, or a lambda in an attribute, would run the layers of the original in each copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn


def rebind_functions(model: nn.Module, memo: dict[int, Any]) -> None:
    """Makes functions in the attributes of a copy refer to the copy, where they do to ``model``.

    They do so by their closure, their defaults, ``functools.partial`` or as bound methods; what a
    function finds among the globals of its file can't be replaced.

    Args:
        model: the original; it is not changed.
        memo: that of ``copy.deepcopy``: the copies by the ids of what they were copied from.
    """
    for module in model.modules():
        copied = memo.get(id(module))
        if copied is None or copied is module:
            continue
        for values in (vars(module), *vars(module).values()):
            target = vars(copied) if values is vars(module) else memo.get(id(values))
            if not isinstance(values, dict | list) or not isinstance(target, type(values)):
                continue
            for key, value in values.items() if isinstance(values, dict) else enumerate(values):
                if _is_function(value) and (new := _rebound(value, memo, {})) is not value:
                    target[key] = new


def _is_function(value: Any) -> bool:
    return isinstance(value, FunctionType | MethodType | functools.partial)


def _rebound(value: Any, memo: dict[int, Any], done: dict[int, Any]) -> Any:
    """``value`` with the copies in ``memo`` in place of the originals that a function refers to."""
    if id(value) in memo and not _is_function(value):
        return memo[id(value)]
    if id(value) in done:
        return done[id(value)]
    done[id(value)] = value  # for functions that refer to themselves

    def each(values: Iterable[Any]) -> list[Any]:
        return [_rebound(v, memo, done) for v in values]

    new: Any = value
    if isinstance(value, FunctionType):
        new = _rebound_function(value, each)
    elif isinstance(value, MethodType):
        function, owner = each([value.__func__, value.__self__])
        if function is not value.__func__ or owner is not value.__self__:
            new = MethodType(function, owner)
    elif isinstance(value, functools.partial):
        old = [value.func, *value.args, *value.keywords.values()]
        func, *rest = each(old)
        if any(a is not b for a, b in zip(old, [func, *rest], strict=True)):
            count = len(value.args)
            keywords = dict(zip(value.keywords, rest[count:], strict=True))
            new = functools.partial(func, *rest[:count], **keywords)
    done[id(value)] = new
    return new


def _rebound_function(
    function: FunctionType, each: Callable[[Iterable[Any]], list[Any]]
) -> FunctionType:
    cells = function.__closure__ or ()
    contents = [cell.cell_contents if _is_filled(cell) else None for cell in cells]
    defaults, keywords = function.__defaults__ or (), function.__kwdefaults__ or {}
    old = [*contents, *defaults, *keywords.values()]
    new = each(old)
    if all(a is b for a, b in zip(old, new, strict=True)):
        return function
    closure = tuple(
        cell if was is now else CellType(now)
        for cell, was, now in zip(cells, contents, new, strict=False)
    )
    rest = new[len(cells) :]
    rebound = FunctionType(
        function.__code__, function.__globals__, function.__name__,
        tuple(rest[: len(defaults)]) or None, closure or None,
    )  # fmt: skip
    rebound.__kwdefaults__ = dict(zip(keywords, rest[len(defaults) :], strict=True)) or None
    rebound.__dict__.update(vars(function))
    return rebound


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
