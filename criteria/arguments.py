"""The arguments of losses, and the errors about wrong ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from utils import nearest_names

SIZES = frozenset({"num_classes", "embedding_size"})
"""The arguments that the user does not give, because they follow from the data and the network."""

LARGEST = (2 - 2.0**-23) * 2.0**127
"""The largest float32. Losses compute in float32."""

Parameters = Mapping[str, inspect.Parameter]

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def arguments_of(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword arguments of a class or function, by name.

    A class whose constructor has ``**`` takes those of its base's constructor too, and so on.
    """
    found: dict[str, inspect.Parameter] = {}
    for constructor in _constructors(make):
        parameters = inspect.signature(constructor).parameters.values()
        named = (parameter for parameter in parameters if parameter.kind in NAMED)
        found = {parameter.name: parameter for parameter in named} | found
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    found.pop("self", None)
    return found


def _constructors(make: Callable[..., Any]) -> list[Callable[..., Any]]:
    if not inspect.isclass(make):
        return [make]
    return [vars(base)["__init__"] for base in make.__mro__ if "__init__" in vars(base)]


def check_arguments(owner: str, given: Mapping[str, Any], known: Parameters) -> None:
    """Raise ValueError for an argument that ``owner`` lacks, or a value of the wrong kind."""
    for name, value in given.items():
        if name not in known:
            raise ValueError(unknown(f"option of {owner}", name, known))
        if isinstance(value, int | float) and not abs(value) <= LARGEST:
            raise ValueError(
                f"The option {name} of {owner} must be a finite number in float32, not {value}."
            )
        default = known[name].default
        if not _fits(value, default):
            raise ValueError(
                f"The option {name} of {owner} cannot be {value!r}: "
                f"give it a value like its default, {default!r}."
            )


def check_complete(owner: str, given: Collection[str], known: Parameters) -> None:
    """Raise ValueError for arguments that have no default and are not given.

    ``owner`` begins the sentence: "The loss MS".
    """
    needed = [
        name
        for name, one in known.items()
        if one.default is one.empty and one.kind in NAMED and name not in given
    ]
    if needed:
        raise ValueError(
            f"{owner} needs a value for {' and '.join(needed)}: give it as an option, "
            f"{' '.join(f'{name}=VALUE' for name in needed)}."
        )


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of the same kind as a default: a number for a number, say.

    0 and 1 may stand for false and true, but true is not a number. A number also fits if the
    default is a word, such as "all" for a number of triplets. If the default or the value is of
    another kind (None, a tuple), any value fits.
    """
    if not isinstance(value, str | int | float) or not isinstance(default, str | int | float):
        return True
    if isinstance(default, bool):
        return value in (0, 1)
    if isinstance(value, bool):
        return False
    return isinstance(default, str) or not isinstance(value, str)


def unknown(what: str, name: str | float, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist, with the nearest ones that do."""
    return f"There is no {what} called {name!r}; {nearest_names(str(name), known)}"
