"""What is odd about a finished corpus, though nothing is wrong with it.

Owns the sentences. Derived from the manifest alone, so that they are said of a corpus that was
finished earlier, too. Called by `command` and by `train.data.corpus`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def notes(manifest: dict[str, Any]) -> list[str]:
    """Return what a user should know, one sentence each; usually nothing."""
    return [*_of_text(manifest), *_of_tokenizer(manifest), *_of_split(manifest)]


def _of_text(manifest: dict[str, Any]) -> Iterator[str]:
    counts, settings = manifest["counts"], manifest["settings"]
    # Corpora of earlier versions do not count these.
    if num_not_utf8 := counts.get("not_utf8", 0):
        yield (
            f"{num_not_utf8:,} documents are not UTF-8 throughout: what was not became U+FFFD; "
            "convert their files, with iconv for example"
        )
    if num_json := counts.get("json_as_text", 0):
        key = settings["text_key"]
        yield (
            f"{num_json:,} .json files have a field {key!r}, and each was read as one text, "
            "brackets and all; write one object a line into a .jsonl file to have records"
        )


def _of_tokenizer(manifest: dict[str, Any]) -> Iterator[str]:
    tokenizer, asked = manifest["tokenizer"], manifest["settings"]["tokenizer"]
    found = manifest["vocab_size"]
    wanted = asked.get("vocab_size", found)
    if found < wanted:
        yield (
            f"the tokenizer has {found:,} tokens, {wanted:,} were asked for: the text is too small "
            "for more"
        )
    if asked.get("fingerprint", tokenizer["fingerprint"]) != tokenizer["fingerprint"]:
        yield (
            f"the tokenizer has no separator that is known: {tokenizer['separator']} was added to "
            f"it, as token {tokenizer['separator_id']:,}; name its own with --separator "
            "(tokenizer.separator)"
        )


def _of_split(manifest: dict[str, Any]) -> Iterator[str]:
    share = manifest["settings"]["validation_share"]
    if share > 0 and not manifest["splits"]["validation"]["num_documents"]:
        num_documents = manifest["splits"]["train"]["num_documents"]
        yield (
            f"no document is held out, at a share of {share:g} of {num_documents:,}; raise "
            "--validation-share (data.validation_share), or a run holds back the end of the tokens"
        )
