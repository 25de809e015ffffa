"""How much processor time does a token cost, and what can a loader do? Side by side with peers.

Each loader reads the same 150.66M tokens as batches of 64 samples of 2,048, as one process and as
rank 0 of 8, in subprocesses of its own, without worker processes: what is counted is processor time
of all threads. One JSON line a case, then a table. Peers are looked for in the interpreters that
`--peer-python` names, since their pins contradict ours and one another's; which versions were
measured, and how to install them, is in `loaders-peers.txt`. A peer that is not there is listed,
and no more.

The folder keeps what each loader made of the tokens (1.7 GB), so a second run is quicker.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from loader_peers import PEERS, Peer, peer_of
from loader_peers.workload import NUM_SAMPLES, Workload, write_tokens
from rich.console import Console
from rich.table import Table

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
TIMEOUT_SECONDS = 240
RESUME_REPEATS = 2
LIST_DISTRIBUTIONS = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in m.distributions()}))"
)
# What the peers' own defaults would add: telemetry, downloads, threads that fight for two cores.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}
Figures = dict[str, Any]


class Bench:
    """All measurements of one run, by the adapter's name."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._folder = options.folder.resolve() / str(options.samples)
        self._pythons = [sys.executable, *options.peer_python]
        self._installed = {python: _distributions(python) for python in self._pythons}
        self.figures: dict[str, Figures] = {}

    def run(self) -> None:
        """Measure what can be measured, the loaders in turn, so that noise hits all alike."""
        write_tokens(self._folder / "tokens", Workload(num_samples=self._options.samples))
        chosen = [peer for peer in PEERS if _is_chosen(peer, self._options.only)]
        ready = [peer for peer in chosen if self._is_ready(peer)]
        for _ in range(self._options.repeats):
            for peer in ready:
                self._note(peer, "rate", self._measure(peer, "rate"))
        complete = [peer for peer in ready if peer.measures == "all"]
        for repeat in range(RESUME_REPEATS):
            for peer in complete:
                if repeat == 0 or peer.divisor == 1:
                    self._note(peer, "resume", self._measure(peer, "resume"))
        for peer in complete:
            self._note(peer, "order", self._measure(peer, "order"))

    def _python(self, peer: Peer) -> str | None:
        """Return the interpreter that has the loader; the one that runs this has ours."""
        if peer.distribution is None:
            return sys.executable
        found = [each for each in self._pythons if peer.distribution in self._installed[each]]
        return found[-1] if found else None

    def _is_ready(self, peer: Peer) -> bool:
        """Make the loader's own files, unless a run before did, and say what it is."""
        figures = self.figures.setdefault(peer.module, {"loader": peer.name})
        python = self._python(peer)
        if python is None:
            figures["error"] = f"not installed (pip install {peer.install})"
            self._print(peer, "prepare", {"error": figures["error"]})
            return False
        if peer.distribution is not None:
            figures["version"] = self._installed[python][peer.distribution]
        kept = self._folder / "prepared" / f"{peer.module}.json"
        if not kept.exists() or _is_ours(peer):  # ours may have changed since
            shutil.rmtree(self._folder / peer.module, ignore_errors=True)
            made = self._measure(peer, "prepare")
            if "error" not in made:
                kept.parent.mkdir(exist_ok=True)
                kept.write_text(json.dumps(made))
        else:
            made = json.loads(kept.read_text())
        self._note(peer, "prepare", made)
        return "error" not in made

    def _measure(self, peer: Peer, case: str) -> Figures:
        python = self._python(peer)
        assert python is not None
        command = [python, "-m", "loader_peers.child", case, peer.module]
        command += ["--folder", str(self._folder), "--samples", str(self._options.samples)]
        command += ["--seconds", str(self._options.seconds)]
        paths = [BENCHMARKS, ROOT] if _is_ours(peer) else [BENCHMARKS]
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths),
            "HF_HOME": str(self._folder / "hf_home"),
        }
        started = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=self._folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"nothing after {TIMEOUT_SECONDS} s"}
        if done.returncode:
            reason = [line for line in done.stderr.splitlines() if line.strip()]
            return {"error": reason[-1] if reason else f"exit code {done.returncode}"}
        result: Figures = json.loads(done.stdout.splitlines()[-1])
        return {**result, "case_seconds": time.monotonic() - started}

    def _note(self, peer: Peer, case: str, result: Figures) -> None:
        self._print(peer, case, result)
        self.figures[peer.module].setdefault(case, []).append(result)

    @staticmethod
    def _print(peer: Peer, case: str, result: Figures) -> None:
        print(json.dumps({"loader": peer.name, "case": case, **_rounded(result)}), flush=True)


def _distributions(python: str) -> dict[str, str]:
    done = subprocess.run(
        [python, "-c", LIST_DISTRIBUTIONS], capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _is_ours(peer: Peer) -> bool:
    return peer.module.startswith("trimtab")


def _is_chosen(peer: Peer, names: list[str]) -> bool:
    return not names or any(name in (peer.module, peer.name) for name in names)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, float):
        return round(value, 5 if value < 100 else 0)
    return value


def summary(figures: Figures, num_tokens: int) -> Figures:
    """Return one loader's figures: the best rates and processor times, the median first batch."""
    peer = peer_of(figures["module"])
    row: Figures = {"loader": figures["loader"], "version": figures.get("version", "")}
    cases = {case: figures.get(case, []) for case in ("prepare", "rate", "resume", "order")}
    errors = [each["error"] for results in cases.values() for each in results if "error" in each]
    if "error" in figures or errors:
        row["error"] = figures.get("error") or errors[0]
    good = {
        case: [each for each in results if "error" not in each] for case, results in cases.items()
    }
    if good["rate"]:
        rates = good["rate"]
        for world in ("world_1", "world_8"):
            row[world] = max(each[world]["per_cpu_second"] for each in rates) / 1e6
        row["cold_ms"] = 1e3 * median(each["cold_seconds"] for each in rates)
        row["import_s"] = median(each["import_seconds"] for each in rates)
        row["private_mb"] = max(each["private_bytes"] for each in rates) / 1e6
        row["peak_mb"] = max(each["peak_bytes"] for each in rates) / 1e6
    if good["prepare"]:
        made = good["prepare"][0]
        row["bytes_per_token"] = made["bytes"] / (num_tokens // peer.divisor)
        row["state_bytes"] = made.get("state_bytes")
    for case, factor in (("resume", 1), ("skip", peer.divisor)):
        timed = [each for each in good["resume"] if f"{case}_seconds" in each]
        if timed:
            row[f"{case}_cpu_ms"] = (
                factor * 1e3 * min(each[f"{case}_cpu_seconds"] for each in timed)
            )
            row[f"{case}_ms"] = factor * 1e3 * min(each[f"{case}_seconds"] for each in timed)
        elif good["resume"]:
            row[f"{case}_cpu_ms"] = "impossible"
    if good["resume"]:
        row["resume"] = good["resume"][0]["resume"]
    if good["order"]:
        row |= {"after_checkpoint": "-", **good["order"][0]}
    return row


COLUMNS = {
    "loader": "loader",
    "world_1": "Mtok/CPU-s\n1 rank",
    "world_8": "of 8\nranks",
    "cold_ms": "cold first\nbatch, ms",
    "import_s": "import,\ns",
    "resume_cpu_ms": "resume\nCPU ms",
    "resume_ms": "wall\nms",
    "resume": "resumes with",
    "skip_cpu_ms": "skip 80%\nCPU ms",
    "bytes_per_token": "bytes a\ntoken",
    "private_mb": "memory\nMB",
    "state_bytes": "state\nbytes",
    "from_start": "1 = 2 = 8 ranks\nfrom the start",
    "after_checkpoint": "after a\ncheckpoint",
}


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return (
        f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    )


def cells(row: Figures) -> list[str]:
    """Return one line of the table; a loader that was not measured says why."""
    if "error" in row and "world_1" not in row:
        return [row["loader"], row["error"], *([""] * (len(COLUMNS) - 2))]
    name = f"{row['loader']} {row['version']}".strip()
    return [name, *(_shown(row.get(key)) for key in list(COLUMNS)[1:])]


def targets(rows: dict[str, Figures]) -> list[tuple[str, str, str, str]]:
    """Return what was wanted of Trimtab, what was found, and whether that is enough."""
    ours, isolated = rows.get("trimtab", {}), rows.get("trimtab_documents", {})
    ratios = [
        ours[world] / isolated[world]
        for world in ("world_1", "world_8")
        if world in ours and world in isolated
    ]
    limits = [
        ("million tokens a CPU-second, 1 rank", ours.get("world_1"), ">=", 1000),
        ("million tokens a CPU-second, rank 0 of 8", ours.get("world_8"), ">=", 300),
        ("cold first batch, ms", ours.get("cold_ms"), "<=", 50),
        ("resume at 90%, CPU ms", ours.get("resume_cpu_ms"), "<=", 2),
        ("skip of 80%, CPU ms", ours.get("skip_cpu_ms"), "<=", 2),
        ("cost of document boundaries, 1 rank", ratios[0] if ratios else None, "<=", 1.3),
        ("cost of document boundaries, rank 0 of 8", ratios[1] if ratios else None, "<=", 1.3),
        ("state, bytes", ours.get("state_bytes"), "<=", 1000),
        ("memory at 10^12 tokens, MB", rows.get("trimtab_huge", {}).get("private_mb"), "<=", 16),
    ]
    found = []
    for what, value, sign, limit in limits:
        if value is not None:
            is_met = value >= limit if sign == ">=" else value <= limit
            figure = _shown(float(value))
            found.append((what, figure, f"{sign} {limit:,}", "met" if is_met else "MISSED"))
    return found


def as_tables(rows: dict[str, Figures]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, head and lines of each table."""
    remarks = [[peer.name, peer.remark] for peer in PEERS if peer.module in rows and peer.remark]
    return [
        ("Loaders", list(COLUMNS.values()), [cells(row) for row in rows.values()]),
        ("Trimtab's targets", ["", "found", "wanted", ""], [list(t) for t in targets(rows)]),
        ("Remarks", ["loader", ""], remarks),
    ]


def show(rows: dict[str, Figures]) -> None:
    """Print the tables."""
    console = Console(width=max(200, Console().width))
    for title, head, lines in as_tables(rows):
        if not lines:
            continue
        table = Table(title=title, title_justify="left")
        for number, name in enumerate(head):
            table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
        for line in lines:
            table.add_row(*line)
        console.print(table)


def write(path: Path, rows: dict[str, Figures]) -> None:
    """Write the tables as Markdown, or the figures as JSON if the name ends so."""
    if path.suffix == ".json":
        path.write_text(json.dumps([_rounded(row) for row in rows.values()], indent=1) + "\n")
        return
    text = []
    for title, head, lines in as_tables(rows):
        if not lines:
            continue
        text += [f"## {title}", "", *(_markdown_row(line) for line in (head, ["---"] * len(head)))]
        text += [*(_markdown_row(line) for line in lines), ""]
    path.write_text("\n".join(text))


def _markdown_row(line: list[str]) -> str:
    return f"| {' | '.join(cell.replace(chr(10), ' ') for cell in line)} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="kept between runs")
    parser.add_argument(
        "--peer-python",
        type=lambda text: text.split(","),
        default=[],
        help="interpreters that have peers, with commas between them",
    )
    parser.add_argument("--only", action="append", default=[], help="an adapter's name; repeatable")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one measurement of a rate")
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--output", type=Path, action="append", default=[], help=".md or .json")
    options = parser.parse_args()
    started = time.monotonic()
    bench = Bench(options)
    bench.run()
    num_tokens = Workload(num_samples=options.samples).num_tokens
    rows = {
        module: summary({**figures, "module": module}, num_tokens)
        for module, figures in bench.figures.items()
    }
    print(json.dumps({"case": "all", "seconds": round(time.monotonic() - started)}))
    show(rows)
    for path in options.output:
        write(path, rows)


if __name__ == "__main__":
    main()
