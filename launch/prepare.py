"""The command `trimtab prepare`: its options, and the process that does the work.

Owns the command line of `train/prepare.py`. Refuses nothing: that script sees the options, and says
what is wrong with them. Called by `launch.cli`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from launch import local

Option = str | int | float | bool | Path | None

# Options that are not given keep the script's own defaults, which are named here for the reader.
Sources = Annotated[
    list[str] | None,
    typer.Argument(
        help="Files, folders, globs, or addresses (s3://, gs://, hf://datasets/...) of text, JSONL,"
        " Parquet, or datasets saved to disk; .gz, .zst, .bz2 and .xz are unpacked. Each line of"
        " .jsonl, .ndjson and .json.gz is a record; any other .json, .csv or .ipynb is one text.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="The folder that gets the corpus.")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help="bytes; bpe:SIZE, trained on the text; a tokenizer.json or a folder with one; a name"
        " on the Hugging Face hub.  [default: bpe:32000]"
    ),
]
Separator = Annotated[
    str | None,
    typer.Option(
        help="The token behind each document, which the tokenizer must have; bytes have their own."
        "  [default: the tokenizer's own; where none is known, <|endoftext|> is added]"
    ),
]
TextKey = Annotated[
    str | None, typer.Option(help="The field or column that holds the text.  [default: text]")
]
Normalise = Annotated[str | None, typer.Option(help="Unicode: none, nfc or nfkc.  [default: none]")]
Deduplicate = Annotated[
    bool | None,
    typer.Option(
        "--deduplicate/--no-deduplicate",
        help="Of documents with equal text, keep the first alone.  [default: deduplicate]",
    ),
]
ValidationShare = Annotated[
    float | None,
    typer.Option(
        help="Share of the documents, chosen by the hash of their text, that is never trained on."
        "  [default: 0.005]"
    ),
]
Processes = Annotated[
    int | None, typer.Option(help="They do not change the result.  [default: one a core]")
]
MaxBadRecords = Annotated[
    int | None,
    typer.Option(
        help="Give up if more records cannot be read; a file that is cut short or damaged stops it"
        " at once.  [default: 1000]"
    ),
]
MaxDocumentBytes = Annotated[
    int | None,
    typer.Option(
        help="Longer JSONL lines and Parquet values are bad records; text files have no limit."
        "  [default: 268435456]"
    ),
]
ShardTokens = Annotated[
    int | None, typer.Option(help="About how many tokens a file gets.  [default: 268435456]")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start over, whatever of a corpus is there.")
]
Verify = Annotated[
    Path | None, typer.Option(help="Check a prepared folder byte by byte, and prepare nothing.")
]


def prepare(
    sources: Sources = None,
    output: Output = None,
    tokenizer: Tokenizer = None,
    separator: Separator = None,
    text_key: TextKey = None,
    normalise: Normalise = None,
    deduplicate: Deduplicate = None,
    validation_share: ValidationShare = None,
    processes: Processes = None,
    max_bad_records: MaxBadRecords = None,
    max_document_bytes: MaxDocumentBytes = None,
    shard_tokens: ShardTokens = None,
    overwrite: Overwrite = False,
    verify: Verify = None,
) -> None:
    """Turn text into tokens once, for data.paths=[FOLDER] of any number of runs.

    Killed or stopped, the same command goes on where it was; the result is the same to the byte.

    \b
    trimtab prepare texts/ more/*.jsonl.gz --output corpus --tokenizer bpe:32000
    trimtab prepare 's3://bucket/*.parquet' -o corpus --tokenizer tokenizer.json
    trimtab prepare --verify corpus
    """
    options: dict[str, Option] = {
        "output": output,
        "tokenizer": tokenizer,
        "separator": separator,
        "text_key": text_key,
        "normalise": normalise,
        "deduplicate": deduplicate,
        "validation_share": validation_share,
        "processes": processes,
        "max_bad_records": max_bad_records,
        "max_document_bytes": max_document_bytes,
        "shard_tokens": shard_tokens,
        "overwrite": overwrite or None,
        "verify": verify,
    }
    local.run(command(sources or [], options), {})


def prepare_entry() -> Path:
    """Return the script that prepares a corpus."""
    return Path(__file__).resolve().parent.parent / "train" / "prepare.py"


def command(sources: Sequence[str], options: Mapping[str, Option]) -> list[str]:
    """Return the command that prepares `sources`; an option that is None keeps its default.

    True and False are `--name` and `--no-name`.
    """
    arguments = [sys.executable, str(prepare_entry())]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            # In one word: a value may begin with a dash.
            arguments.append(f"--{flag}={value}")
    return [*arguments, "--", *sources]
