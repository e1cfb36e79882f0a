"""Uploads a folder of files to the Hugging Face hub, and downloads one."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from utils import InputError, first_line

PREFIX = "hf:"
"""The prefix of the name of a model there: `hf:USER/NAME`, or `hf:USER/NAME@REVISION`."""
FILES = ("*.safetensors", "*.json", "README.md")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_name(name: str) -> str:
    """Returns the name, or raises InputError if it cannot name a model on the Hub."""
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} names no model on the Hub; give USER/NAME")
    return name


def upload(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Uploads the files of a folder to the model `name`, which is created if it does not exist.

    Returns:
        Its address.

    Raises:
        InputError: the package is missing, nobody is logged in, the Hub refuses, or `private` is
            set and the model exists and is public.
    """
    hub, name = _hub(), check_name(name)
    if not hub.get_token():
        raise InputError(
            "nobody is logged in to the Hub here; run `hf auth login`, or set HF_TOKEN to a token "
            "with the right to write"
        )
    api = hub.HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        # An existing repository keeps its visibility, whatever `private` is.
        if private and not api.model_info(name).private:
            raise InputError(
                f"{name} exists on the Hub and is public, which --private does not change; make "
                "it private in its settings there, or give another name"
            )
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except InputError:
        raise
    except Exception as error:  # network errors come from whatever library the hub uses
        raise InputError(
            f"{name} could not be uploaded ({first_line(error)}); {_advice(error)}"
        ) from error
    return str(address)


def _advice(error: Exception) -> str:
    """What to do about an error of an upload."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            "the token here may not write there: give a name of your own, or log in with a token "
            "that has the right to write (`hf auth login`, or HF_TOKEN)"
        )
    return "try again"


def download(name: str) -> Path:
    """The folder with the files of `hf:USER/NAME`, downloaded if they are not here yet.

    Raises:
        InputError: the package is missing, there is no such model, or it cannot be fetched.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    hub = _hub()
    check_name(repository)
    try:
        found = hub.snapshot_download(repository, revision=revision or None, allow_patterns=FILES)
    except Exception as error:
        raise InputError(
            f"{name} cannot be downloaded from the Hub ({first_line(error)}); check the name, and "
            "if the model is private, that you are logged in"
        ) from error
    return Path(found)


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            "this needs the package huggingface_hub, which is not installed here; "
            "pip install huggingface_hub"
        ) from error
    return huggingface_hub
