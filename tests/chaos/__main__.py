"""`python -m tests.chaos`: play the scenarios, print the table, write it into the docs."""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console

from . import table
from .play import References, play
from .runner import Result
from .scenarios import SCENARIOS
from .soak import soak

NUM_SOAK_FAULTS = {"soak_single": 200, "soak_ddp": 60}
NUM_QUICK_FAULTS, QUICK_STEPS = 6, 160
Play = Callable[[Path, References, Callable[[str], None]], Result]


def plays(options: argparse.Namespace) -> dict[str, Play]:
    """Return what there is to play, by name, in the order of the table."""
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    scenarios = SCENARIOS
    if options.quick:
        scenarios = tuple(one.shorter(QUICK_STEPS) for one in SCENARIOS if one.is_quick)
    every: dict[str, Play] = {
        scenario.name: lambda work, references, tell, scenario=scenario: play(
            scenario, work, references
        )
        for scenario in scenarios
    }
    for num_ranks, name in ((1, "soak_single"), (2, "soak_ddp")):
        if options.quick and num_ranks > 1:
            continue
        default = NUM_QUICK_FAULTS if options.quick else NUM_SOAK_FAULTS[name]
        num_faults = options.faults or default
        every[name] = lambda work, references, tell, ranks=num_ranks, faults=num_faults: soak(
            ranks, faults, work, references, seed=seed, tell=tell
        )
    unknown = set(options.only) - every.keys()
    if unknown:
        raise SystemExit(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    return {name: one for name, one in every.items() if not options.only or name in options.only}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three scenarios of a minute in all")
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--faults", type=int, help="of each soak")
    parser.add_argument("--seed", type=int, help="of the soaks; drawn and shown by default")
    parser.add_argument("--json", type=Path, help="take results up from here, and keep them there")
    parser.add_argument("--output", type=Path, help="a page, such as docs/reliability.md")
    parser.add_argument("--work", type=Path, help="where the runs lie; kept if given")
    return parser.parse_args(arguments)


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="trimtab-chaos-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def machine() -> str:
    """Return what the figures were made on."""
    import torch

    system = f"{platform.system()} {platform.release().partition('-')[0]}"
    load = f"load average {os.getloadavg()[2]:.0f}"
    return f"{os.cpu_count()} cores ({load}), {system}, torch {torch.__version__}"


def main(arguments: list[str]) -> int:
    """Play what was asked for and return 1 if a run did not get over its fault."""
    options, console = parse(arguments), Console()
    stored = table.load(options.json) if options.json else {"results": {}}
    every = plays(options)
    names = [*(scenario.name for scenario in SCENARIOS), *NUM_SOAK_FAULTS]
    results = []
    with work_folder(options.work) as work:
        references = References(work)
        for number, (name, one) in enumerate(every.items(), start=1):
            title = f"{number}/{len(every)} {name}"
            started = time.monotonic()
            with console.status(title) as status:
                tell = partial(_tell, status.update, title)
                result = one(work, references, tell)
            results.append(result)
            console.print(f"{title}: {_verdict(result)} ({time.monotonic() - started:.0f} s)")
            stored["results"][name] = result.as_dict()
            stored["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
            stored["machine"] = machine()
            if options.json:
                table.save(options.json, stored)
    if options.output:
        table.write_into(options.output, table.render(stored, names))
    failed = [result.name for result in results if result.problems]
    skipped = [result.name for result in results if result.skipped]
    console.print(f"{len(results)} played, {len(skipped)} skipped, {len(failed)} not recovered")
    return 1 if failed else 0


def _tell(update: Callable[[str], None], title: str, what: str) -> None:
    update(f"{title}: {what}")


def _verdict(result: Result) -> str:
    if result.skipped:
        return f"skipped: {result.skipped}"
    head = f"NOT RECOVERED ({'; '.join(result.problems)})" if result.problems else "recovered"
    return f"{head}; {result.happened}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
