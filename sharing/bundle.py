"""The files that others get of a run: weights that say what they are, and what the run reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evaluation.networks import WEIGHTS_FILE, Opened
from runs import FORMAT
from sharing.card import Card
from sharing.naming import named_by_data, without_folders
from storage import save_safetensors, write_content, write_json

KEPT = ("epoch", "step", "metrics", "data")
"""Entries of a checkpoint that go along with its weights as they are, where they are there."""


def note_of(opened: Opened) -> dict[str, Any]:
    """What a file of weights says beside them: the network, and how it was trained.

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
    """Writes what the Hub gets: weights, card, and as JSON what the network is and reached.

    Raises:
        InputError: a file cannot be written.
    """
    write_weights(opened, folder / WEIGHTS_FILE)
    write_card(card, folder / "README.md")
    write_json(folder / "config.json", note_of(opened))
    if card.record.outcome:
        write_json(folder / "results.json", named_by_data(card.record.outcome))
