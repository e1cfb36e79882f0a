"""Checkpoints as .pth and as .safetensors, a format of tensors and text that holds no code.

torch is imported only when it is needed, so that `--help` answers at once. Our .safetensors files
keep the entries of a checkpoint that are not tensors as JSON in the file's metadata.
"""

from __future__ import annotations

import argparse
import functools
import json
import pickle
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

from storage.archives import opened, write_archive
from storage.text import as_json
from storage.writing import write_content
from utils import DamagedError, InputError, first_line, in_words, installing, join_words

if TYPE_CHECKING:
    import torch

_NOTE = "anchorage"


def save_tensors(path: Path, content: dict) -> None:
    """Saves tensors and plain values with torch.save, atomically and with a checksum.

    Raises:
        InputError: the content holds something else, which `load_tensors` would refuse.
    """
    import torch

    def write(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
            file.seek(0)
            with torch.serialization.safe_globals(_harmless()):
                others = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if others:
                raise _not_plain(path, join_words(sorted(others), "and"))
        except (pickle.PicklingError, AttributeError, TypeError) as error:  # a lambda, an open file
            raise _not_plain(path, first_line(error)) from error
        except RuntimeError as error:
            # When the disk is full, torch fails once more as it closes its unfinished archive.
            cause = error.__context__
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from None

    write_archive(path, write)


def _not_plain(path: Path, what: str) -> InputError:
    return InputError(
        f"{path} cannot be written, because it could not be read again ({what}): the state of a "
        "method or a loss of your own must be tensors and plain values"
    )


def load_tensors(path: Path, what: str = "checkpoint") -> dict:
    """Loads a .pth of `save_tensors` or of others, or a .safetensors; never runs code from it.

    Raises:
        InputError: the file is missing, differs from its checksum, is of another kind, or holds
            objects that only pickle can load.
    """
    import torch

    with opened(path, what) as file:
        try:
            if Path(path).suffix == ".safetensors":
                return _load_safetensors(Path(path))
            with torch.serialization.safe_globals(_harmless()):
                content = torch.load(file, map_location="cpu", weights_only=True)
        except InputError:
            raise
        except Exception as error:  # torch reports damage through a dozen unrelated types
            if isinstance(error, OSError) and (meant := in_words(error)):
                raise meant from error
            raise DamagedError(
                f"{what} {path} cannot be read safely as tensors{_why_not(error)}"
            ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{what} {path} holds a {type(content).__name__}, not a dictionary of weights; "
            "choose another file"
        )
    return content


def _why_not(error: Exception) -> str:
    """The end of the sentence about a file that torch cannot read: the reason, and what to do."""
    if made := re.search(r"GLOBAL (\S+) was not", str(error)):
        return (
            f": it also holds {made[1]}, which only running code could make; load it where that "
            "code is, and save the state_dict alone"
        )
    if "TorchScript" in str(error):
        return ": it is a TorchScript program; save the state_dict of the network instead"
    # For a pickle, torch's message explains how to run the code in it: nobody should.
    is_pickle = isinstance(error, pickle.UnpicklingError)
    why = "it holds something else" if is_pickle else first_line(error)
    return f" ({why}); it is damaged, or not a file of weights: save it again or choose another"


@functools.cache
def _harmless() -> list:
    """Types that training codes save beside weights, and that run no code when they are loaded.

    Options, and NumPy's numbers and arrays, whose module has another name in files of NumPy 1.
    """
    import numpy as np

    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    named = [(made, f"numpy.core.multiarray.{made.__name__}") for made in (scalar, array)]
    kinds = {type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + "?efd"}
    return [argparse.Namespace, scalar, array, *named, np.ndarray, np.dtype, *kinds]


def save_safetensors(path: Path, tensors: dict[str, torch.Tensor], note: dict) -> None:
    """Writes the weights of a checkpoint as .safetensors, atomically.

    Args:
        tensors: its `model_state_dict`. note: its other entries, as values for JSON.

    Raises:
        InputError: the file cannot be written, or the package is missing.
    """
    save = _safetensors(path).torch.save
    # Copies, because the format does not allow tensors that share memory.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_content(path, save(own, {"format": "pt", _NOTE: as_json(note).decode()}))


def _load_safetensors(path: Path) -> dict:
    """The tensors of a file; if it is one of ours, the checkpoint with its other entries."""
    with _safetensors(path).safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        note = (file.metadata() or {}).get(_NOTE)
    return tensors if note is None else {**json.loads(note), "model_state_dict": tensors}


def _safetensors(path: Path) -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise InputError(
            f"{path} needs the package safetensors, which is not installed here; "
            f"{installing('safetensors')}"
        ) from error
    return safetensors
