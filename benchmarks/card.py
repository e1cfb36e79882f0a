"""What a GPU says of itself while it works: its clock, its power and how warm it is."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import torch

ASKED = "clocks.sm,power.draw,temperature.gpu"


def card_asked(device: torch.device) -> Callable[[], str]:
    """Asks the card now, and goes on; who calls the result has its answer.

    A card that is warm or draws all the power it may have lowers its clock, and what comes second
    in a process seems slower than it is. "" where nobody answers: on a CPU, without nvidia-smi.
    """
    if device.type != "cuda":
        return str
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return answer_of(
        ["nvidia-smi", f"--id={card}", f"--query-gpu={ASKED}", "--format=csv,noheader"]
    )


def answer_of(command: list[str]) -> Callable[[], str]:
    """Starts a command that prints three values; who calls the result has them in words."""
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
