"""A tokenizer by name, from the Hugging Face hub or from what was fetched before.

Owns how long a name is tried: once. The library's own way repeats itself for half a minute, in two
dozen lines, before a misspelt name is called one. Called by `tokenizer`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FILE = "tokenizer.json"
_TIMEOUT_SECONDS = 10.0
_LIBRARY_LOGGER = "huggingface_hub"


def fetch_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that the hub has under `name`; without the hub, the one of last time.

    Raises: whatever the library does, if there is none or the hub cannot be reached.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from tokenizers import Tokenizer

    with _quiet():
        try:
            get_hf_file_metadata(hf_hub_url(name, _FILE), timeout=_TIMEOUT_SECONDS)
        except Exception as error:  # noqa: BLE001 - its own, its HTTP library's, plain OSError
            try:
                path = hf_hub_download(name, _FILE, local_files_only=True)
            except Exception:  # noqa: BLE001 - what the hub said is what counts
                raise error from None
            return Tokenizer.from_file(path)
        return Tokenizer.from_pretrained(name)


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger(_LIBRARY_LOGGER)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
