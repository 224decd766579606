"""The exceptions and the warning of zsu_fast, and checks of simple arguments.

Every message names the argument, says what was passed, and says what to pass instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any


class ZsuFastError(Exception):
    """Base class of all errors that zsu_fast raises deliberately."""


class ArgumentError(ZsuFastError, ValueError):
    """An argument can't be used.

    Args:
        argument: its name.
        got: what was passed, and why it can't be used.
        remedy: what to pass instead.
    """

    def __init__(self, argument: str, got: str, remedy: str) -> None:
        self.argument, self.got, self.remedy = argument, got, remedy
        super().__init__(f"{argument}: {got}. {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets pickle rebuild the error from its message, without calling ``__init__``."""
        return type(self).__new__, (type(self), *self.args), self.__dict__


class ModelError(ArgumentError):
    """The model can't be used as it is."""

    def __init__(self, got: str, remedy: str) -> None:
        super().__init__("model", got, remedy)


class CheckpointError(ZsuFastError, ValueError):
    """A weights file is missing, damaged, unsafe to open, or does not fit the model."""


class LedgerError(ZsuFastError, ValueError):
    """A ledger is damaged, or belongs to other weights."""


class RankError(ZsuFastError, RuntimeError):
    """Another rank of the process group failed or can't be reached; the message names it."""


class OutputError(ZsuFastError, OSError):
    """A file could not be written; an existing file at the path is unchanged."""


class VerdictError(ZsuFastError, RuntimeError):
    """A verdict did not pass; raised by `Verdict.raise_for_status`."""


class UnlearningWarning(UserWarning):
    """The category of all warnings of zsu_fast, such as that only the outputs forget."""


def check_flag(argument: str, value: Any) -> None:
    """Checks that ``value`` is True or False, not merely truthy or falsy.

    Raises:
        ArgumentError: it is something else.
    """
    if not isinstance(value, bool):
        raise ArgumentError(argument, f"got {value!r}", "Pass True or False.")


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite real number; bools do not count."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_int(argument: str, value: Any, least: int = 1, *, optional: bool = False) -> None:
    """Checks that ``value`` is an int of at least ``least``; bools do not count.

    Args:
        argument: its name, for the error.
        value: what was passed.
        least: smallest allowed value.
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
    """Checks that ``value`` is one of ``choices``.

    Raises:
        ArgumentError: it is something else.
    """
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(argument, f"got {value!r}", f"Pass one of {', '.join(choices)}.")


def shorten(items: Iterable[Any], most: int = 8) -> str:
    """Joins at most ``most`` items with commas and says how many more there are."""
    texts = [str(item) for item in items]
    shown = ", ".join(texts[:most])
    return shown + (f" and {len(texts) - most} more" if len(texts) > most else "")
