"""What zsu_fast raises. Every message names the argument, the value it got, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any


class ZsuFastError(Exception):
    """Base of every error that zsu_fast raises on purpose."""


class ArgumentError(ZsuFastError, ValueError):
    """An argument can't be used.

    Args:
        argument: the name of the argument, as the caller knows it.
        got: what was given, and why it does not do.
        remedy: what to pass instead.
    """

    def __init__(self, argument: str, got: str, remedy: str) -> None:
        self.argument, self.got, self.remedy = argument, got, remedy
        super().__init__(f"{argument}: {got}. {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        """As pickle needs it, where other processes are to see it: not by ``__init__``."""
        return type(self).__new__, (type(self), *self.args), self.__dict__


class ModelError(ArgumentError):
    """The model can't be unlearned as it is."""

    def __init__(self, got: str, remedy: str) -> None:
        super().__init__("model", got, remedy)


class CheckpointError(ZsuFastError, ValueError):
    """A file of weights is missing, damaged, unsafe to open, or does not fit the model."""


class LedgerError(ZsuFastError, ValueError):
    """A ledger is damaged, or does not belong to the model."""


class RankError(ZsuFastError, RuntimeError):
    """Another rank of the process group failed, or is gone; the message names it."""


class OutputError(ZsuFastError, OSError):
    """A result could not be written; what was at the path before is untouched."""


def check_flag(argument: str, value: Any) -> None:
    """Raises unless ``value`` is True or False: no other value may stand for one by accident.

    Raises:
        ArgumentError: it is something else.
    """
    if not isinstance(value, bool):
        raise ArgumentError(argument, f"got {value!r}", "Pass True or False.")


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_int(argument: str, value: Any, least: int = 1, *, optional: bool = False) -> None:
    """Raises unless ``value`` is a whole number of at least ``least``; True and False are none.

    Args:
        argument: the name of the argument.
        value: what was given.
        least: the smallest allowed value.
        optional: whether None is allowed too.

    Raises:
        ArgumentError: it is something else.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        or_none = ", or None" if optional else ""
        raise ArgumentError(
            argument, f"got {value!r}", f"Pass a whole number, {least} or more{or_none}."
        )


def check_choice(argument: str, value: Any, choices: Sequence[str]) -> None:
    """Raises unless ``value`` is one of ``choices``.

    Raises:
        ArgumentError: it is something else.
    """
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(argument, f"got {value!r}", f"Pass one of {', '.join(choices)}.")


def shorten(items: Iterable[Any], most: int = 8) -> str:
    """The first ``most`` items with commas between, and how many more there are."""
    texts = [str(item) for item in items]
    shown = ", ".join(texts[:most])
    return shown + (f" and {len(texts) - most} more" if len(texts) > most else "")
