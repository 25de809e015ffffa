"""The command that `trimtab prepare` starts, and the help that it gives."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import cli, local
from launch.prepare import prepare_entry
from train.data.prepare import command as script


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(arguments: list[str], added: Mapping[str, str]) -> None:
        commands.append(arguments)

    monkeypatch.setattr(local, "run", run)
    return commands


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.build_app(), ["prepare", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_options_that_are_given_are_handed_on(started: list[list[str]]) -> None:
    assert prepare_entry().is_file()
    begin = [sys.executable, str(prepare_entry())]
    invoke("a.txt", "-o", "out")
    invoke("a", "b", "--output", "out", "--no-deduplicate", "--shard-tokens", "9", "--overwrite")
    invoke("--verify", "out")
    assert started == [
        [*begin, "--output=out", "--", "a.txt"],
        [
            *begin,
            *("--output=out", "--no-deduplicate", "--shard-tokens=9", "--overwrite"),
            *("--", "a", "b"),
        ],
        [*begin, "--verify=out", "--"],
    ]


def test_every_option_is_one_of_the_script(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "--tokenizer": "bytes",
        "--separator": "-x",
        "--text-key": "body",
        "--normalise": "nfc",
        "--validation-share": "0.1",
        "--processes": "2",
        "--max-bad-records": "3",
        "--max-document-bytes": "4",
        "--shard-tokens": "5",
    }
    given = [f"{name}={value}" for name, value in values.items()]
    invoke("a", "-o", "out", "--deduplicate", "--overwrite", *given)
    seen: list[Any] = []
    monkeypatch.setattr(script, "_prepare", seen.append)
    assert script.main(started[0][2:]) == 0
    for name, value in values.items():
        assert str(getattr(seen[0], name[2:].replace("-", "_"))) == value
    assert (seen[0].sources, seen[0].deduplicate, seen[0].overwrite) == (["a"], True, True)


def test_help_names_the_defaults_that_the_script_has(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(script, "_prepare", seen.append)
    script.main(["a", "--output", "out"])
    text = re.sub(r"\s+", " ", invoke("--help"))
    for option in (
        "tokenizer",
        "text_key",
        "normalise",
        "validation_share",
        "max_bad_records",
        "max_document_bytes",
        "shard_tokens",
    ):
        assert f"[default: {getattr(seen[0], option)}]" in text, option
    assert "trimtab prepare --verify corpus" in text
