"""The clock, power and temperature of a GPU while it works."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import torch

ASKED = "clocks.sm,power.draw,temperature.gpu"


def card_asked(device: torch.device) -> Callable[[], str]:
    """Queries the card without waiting; calling the result waits for the answer.

    A card that is hot, or at its power limit, lowers its clock, so that later measurements in a
    process seem slow. The answer is "" on a CPU, or without nvidia-smi.
    """
    if device.type != "cuda":
        return str
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return answer_of(
        ["nvidia-smi", f"--id={card}", f"--query-gpu={ASKED}", "--format=csv,noheader"]
    )


def answer_of(command: list[str]) -> Callable[[], str]:
    """Starts a command that prints three values; calling the result returns them in words."""
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return str

    def reported() -> str:
        try:
            answer, _ = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            answer, _ = process.communicate()
        if process.returncode:
            return ""
        clock, power, warmth = answer.strip().split(", ")
        return f"{clock}, {power}, {warmth} °C"

    return reported
