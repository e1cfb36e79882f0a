"""Checks of the numbers that a loss is made with, given by their names.

Each raises a ValueError with the name and the value of the first that is not as it must be.
"""

from __future__ import annotations


def positive(**values: float) -> None:
    """They must be above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, not {value}.")


def not_negative(**values: float) -> None:
    """They must be 0 or more."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or more, not {value}.")


def share(**values: float) -> None:
    """They must be above 0 and at most 1."""
    for name, value in values.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, not {value}.")


def whole(**values: float) -> None:
    """They must be whole numbers."""
    for name, value in values.items():
        if value != int(value):
            raise ValueError(f"{name} must be a whole number, not {value}.")
