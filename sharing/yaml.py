"""Plain values as YAML, as far as the header of a model card has any."""

from __future__ import annotations

import json
from typing import Any


def as_yaml(content: Any, indent: str = "") -> str:
    """Dictionaries, lists, text and numbers as YAML in lines; a text stands as in JSON."""
    if isinstance(content, dict):
        return "\n".join(_entry(f"{key}:", value, indent) for key, value in content.items())
    if isinstance(content, list):
        return "\n".join(_item(value, indent) for value in content)
    return json.dumps(content, ensure_ascii=False)


def _entry(key: str, value: Any, indent: str) -> str:
    if isinstance(value, dict | list) and value:
        return f"{indent}{key}\n{as_yaml(value, indent + '  ')}"
    return f"{indent}{key} {as_yaml(value)}" if value != [] else f"{indent}{key} []"


def _item(value: Any, indent: str) -> str:
    if isinstance(value, dict):
        lines = as_yaml(value, indent + "  ")
        return f"{indent}- {lines.removeprefix(indent + '  ')}"
    return f"{indent}- {as_yaml(value)}"
