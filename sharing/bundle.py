"""The shared files of a run: weights with their description, a model card, results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evaluation.networks import WEIGHTS_FILE, Opened
from runs import FORMAT
from sharing.card import Card
from sharing.naming import named_by_data, without_folders
from storage import save_safetensors, write_content, write_json

KEPT = ("epoch", "step", "metrics", "data")
"""Entries of a checkpoint that are shared unchanged, if it has them."""


def note_of(opened: Opened) -> dict[str, Any]:
    """The description in a file of weights: the network, and how it was trained.

    Folders of this machine are left out.
    """
    kept = {name: opened.content[name] for name in KEPT if name in opened.content}
    trained = {"args": without_folders(opened.trained)} if opened.trained else {}
    described = {"format": FORMAT, "network": opened.network.description()}
    return {**described, **trained, **named_by_data(kept)}


def write_weights(opened: Opened, file: Path) -> None:
    """Writes an open network as .safetensors, for `load_run` and evaluate.py.

    Raises:
        InputError: the file cannot be written, or safetensors is not installed.
    """
    save_safetensors(file, opened.network.state_dict(), note_of(opened))


def write_card(card: Card, file: Path) -> None:
    """Writes a model card.

    Raises:
        InputError: the file cannot be written.
    """
    write_content(file, card.text())


def write_bundle(opened: Opened, card: Card, folder: Path) -> None:
    """Writes the files for the Hub: weights, card, and JSON with the description and the results.

    Raises:
        InputError: a file cannot be written.
    """
    write_weights(opened, folder / WEIGHTS_FILE)
    write_card(card, folder / "README.md")
    write_json(folder / "config.json", note_of(opened))
    if card.record.outcome:
        write_json(folder / "results.json", named_by_data(card.record.outcome))
