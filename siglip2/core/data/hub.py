"""Repositories of the Hugging Face hub: told from local paths, and downloaded."""

import re
from collections.abc import Sequence
from pathlib import Path

FILE_ENDINGS = (".ckpt", ".npz", ".safetensors", ".bin", ".pt", ".pth", ".json", ".model")
PREFIX = "hf-hub:"  # open_clip's


def is_hub_id(text: str) -> bool:
    """Says whether this is `owner/name` and nothing local: neither that path nor a folder of the owner's name."""
    text = text.removeprefix(PREFIX)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) or text.endswith(FILE_ENDINGS):
        return False
    return not Path(text).exists() and not Path(text.partition("/")[0]).is_dir()


def download(hub_id: str, patterns: Sequence[str]) -> Path:
    """Returns the folder into which files of a repository were downloaded, or lay before.

    Args:
        hub_id: `owner/name`, also with `hf-hub:` before it.
        patterns: of the files that are wanted.

    Raises:
        ValueError: if the hub cannot be reached, or has no such repository.
    """
    from huggingface_hub import snapshot_download

    name = hub_id.removeprefix(PREFIX)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # offline, absent, private: the hub's client has a class for each, and so have sockets
        raise ValueError(
            f"'{name}' is no local path, and as a hub id it could not be downloaded ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}). Without a network, download it "
            f"elsewhere and give its folder"
        ) from error
