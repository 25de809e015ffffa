"""The `trimtab` command line.

Owns the commands, what they print, and the exit codes: 2 for a `LaunchError`, one line on stderr;
130 if waiting for an answer was cut short by Ctrl-C.
Refuses to do work of its own: each command calls one or two functions of this package.
Called by the console script `trimtab`, through `main`.
"""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.checkpoints import checkpoints, prune, verify
from launch.convert import convert
from launch.errors import LaunchError
from launch.prepare import prepare

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from launch.cluster import ClusterConfig
    from launch.control import Answer, Liveness, Request

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Hydra overrides: exp=NAME, group=option, key=value.", show_default=False),
]
Run = Annotated[str, typer.Argument(help="A run folder, or a name under ./runs.")]
Wait = Annotated[
    float, typer.Option(help="Seconds to wait for the run's answer; 0: do not wait.", min=0)
]


_GOODPUT_EXAMPLE = "Example: trimtab goodput falcon_like --output waterfall.html"


def build_app() -> typer.Typer:
    """Return the command line with all its commands."""
    app = typer.Typer(
        name="trimtab",
        help="Launch long pretraining runs, and ask where their settings and rewinds came from.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_options)
    app.command("prepare")(prepare)
    app.command("launch")(launch)
    app.command("explain")(explain)
    app.command("report")(report)
    app.command("incidents")(incidents)
    app.command("goodput", epilog=_GOODPUT_EXAMPLE)(goodput)
    app.command("rewind")(rewind)
    app.command("skip")(skip)
    app.command("unskip")(unskip)
    app.command("replay")(replay)
    app.command("checkpoints")(checkpoints)
    app.command("verify")(verify)
    app.command("prune")(prune)
    app.command("convert")(convert)
    return app


def main() -> None:
    """Run `trimtab` and leave with its exit code."""
    try:
        build_app()()
    except LaunchError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        sys.exit(1)


def launch(
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run, and run nothing.")
    ] = False,
) -> None:
    """Start a run: torchrun here, or a Slurm job, as the cluster group says."""
    from launch.cluster import ClusterKind, parse_cluster
    from launch.compose import compose, normalise, select

    given = normalise(overrides or [])
    config = compose(given)
    cluster = parse_cluster(select(config, "cluster"))
    if cluster.kind is ClusterKind.slurm:
        _launch_slurm(cluster, config, given, dry_run=dry_run)
    else:
        _launch_local(cluster, given, dry_run=dry_run)


def _launch_local(cluster: "ClusterConfig", overrides: list[str], *, dry_run: bool) -> None:
    from launch import local
    from launch.paths import training_entry

    arguments = local.command(
        cluster, overrides, python=Path(sys.executable), entry=training_entry()
    )
    if dry_run:
        print(local.preview(arguments, local.variables(cluster)))
    else:
        sys.exit(local.supervise(arguments, local.variables(cluster)))


def _launch_slurm(
    cluster: "ClusterConfig", config: "DictConfig", overrides: list[str], *, dry_run: bool
) -> None:
    from launch import slurm
    from launch.compose import pin_run_name, select
    from launch.paths import run_folder, training_entry
    from launch.render import render

    name, overrides = pin_run_name(config, overrides)
    folder = run_folder(str(select(config, "run.dir") or "runs"), name)
    script = render(
        cluster,
        overrides,
        run_folder=folder,
        python=Path(sys.executable),
        entry=training_entry(),
    )
    if dry_run:
        print(script, end="")
        return
    job = slurm.submit(script, folder)
    print(f"submitted job {job}; output in {folder / 'logs'}")


def explain(
    key: Annotated[str, typer.Argument(help="A key, such as optim.lr, or a group, such as optim.")],
    overrides: Overrides = None,
) -> None:
    """Say which file or override sets a key, at which line, and why."""
    from launch.explain import explain as find
    from launch.show import show_settings

    print(show_settings(key, find(key, overrides or [])))


def report(
    run: Run,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write it, instead of the run folder."),
    ] = None,
) -> None:
    """Write a run's report and print where it is."""
    from launch.paths import find_run
    from monitoring.records import UnreadableRecordsError
    from monitoring.report import write_report

    try:
        page = write_report(find_run(run), output)
    except (UnreadableRecordsError, OSError) as error:
        raise LaunchError(f"no report of {run}: {error}") from error
    print(page)


def incidents(
    run: Run,
    has_all: Annotated[bool, typer.Option("--all", help="List refused updates, too.")] = False,
    is_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List what recovery and operators did to a run, attempt by attempt."""
    from launch.incidents import read_incidents
    from launch.paths import find_run
    from launch.show import show_incidents, show_incidents_json

    found = read_incidents(find_run(run))
    if is_json:
        lines = show_incidents_json(found, has_all=has_all)
        print(lines, end="\n" if lines else "")
        return
    width = shutil.get_terminal_size(fallback=(100, 24)).columns
    print(show_incidents(found, width=width, has_all=has_all))


def goodput(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or names under ./runs.")],
    is_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line and run.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the waterfall, too: a path in .html or .svg."),
    ] = None,
) -> None:
    """Say where the wall time of runs went, from their first start on, across restarts."""
    from launch.goodput import read_goodput, show_goodput, show_goodput_json, write_picture
    from launch.paths import find_run

    found = read_goodput([find_run(run) for run in runs])
    page = None if output is None else write_picture(found, output)
    width = shutil.get_terminal_size(fallback=(100, 24)).columns
    print(show_goodput_json(found) if is_json else show_goodput(found, width=width))
    if page is not None and not is_json:
        print(f"\nwaterfall: {page}")


def rewind(
    run: Run,
    to: Annotated[int, typer.Option("--to", help="Go back to the last good state up to STEP.")],
    skip: Annotated[
        str | None,
        typer.Option(
            help='Data to skip from there: "1B tokens", "300 batches", "100 steps", or "seen":'
            " all that the run has seen since. Without it the same data come again.",
            show_default=False,
        ),
    ] = None,
    far: Annotated[
        bool, typer.Option("--far", help="Go even where the last good state lies far before STEP.")
    ] = False,
    wait: Wait = 60,
) -> None:
    """Ask a run to go back to a good state, now or when it starts again."""
    from launch.control import SEEN, Kind, Request, read_amount

    amount = skip if skip in (None, SEEN) else read_amount(skip)
    _ask(run, Request(kind=Kind.REWIND, to_step=to, amount=amount, is_far=far), wait)


def skip(
    run: Run,
    tokens: Annotated[str | None, typer.Option(help="So many: 200M.", show_default=False)] = None,
    batches: Annotated[str | None, typer.Option(help="So many.", show_default=False)] = None,
    steps: Annotated[str | None, typer.Option(help="So many.", show_default=False)] = None,
    wait: Wait = 60,
) -> None:
    """Ask a run to skip the data that it would read next."""
    from launch.control import Kind, Request, read_amount

    given = {"tokens": tokens, "batches": batches, "steps": steps}
    amounts = [f"{count} {unit}" for unit, count in given.items() if count is not None]
    if len(amounts) != 1:
        raise LaunchError(
            f"{' and '.join(amounts) or 'no amount'} given; use one of --tokens 200M,"
            " --batches 300 and --steps 100"
        )
    _ask(run, Request(kind=Kind.SKIP, amount=read_amount(amounts[0])), wait)


def unskip(
    run: Run,
    incident: Annotated[int, typer.Option(help="Its number in `trimtab incidents`.")],
    wait: Wait = 60,
) -> None:
    """Ask a run to put what an incident skipped back, at the end of its data."""
    from launch.control import Kind, Request

    _ask(run, Request(kind=Kind.UNSKIP, incident=incident), wait)


def replay(
    run: Run,
    incident: Annotated[int, typer.Option(help="Its number in `trimtab incidents`.")],
    nproc: Annotated[
        int | None,
        typer.Option(help="Ranks; by default as many as the run had on one host."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="How far to go beyond the step at which it was found.  [default: 4]"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write it, instead of the incident's folder."),
    ] = None,
) -> None:
    """Find out why an incident came: data, state, both, or hardware. Changes nothing of the run."""
    from launch import local
    from launch.paths import find_run
    from launch.replay import command, environment

    folder = find_run(run)
    arguments = command(folder, incident, num_ranks=nproc, num_steps=steps, output=output)
    local.run(arguments, environment(folder))


def _ask(run: str, request: "Request", wait_seconds: float) -> None:
    from launch import control
    from launch.paths import find_run
    from launch.show import show_request

    folder = find_run(run)
    alive = control.liveness(folder)
    control.check(folder, request, alive)
    path = control.leave(folder, request)
    answer = None
    if wait_seconds > 0 and alive is not control.Liveness.STOPPED:
        try:
            answer = _wait(folder, path, wait_seconds, alive)
        except KeyboardInterrupt:
            print(show_request(folder, path, alive), file=sys.stderr)
            raise typer.Exit(130) from None
    if answer is None:
        print(show_request(folder, path, alive))
    elif answer.is_accepted:
        print(answer.message)
    else:
        raise LaunchError(f"{folder} refused: {answer.message}")


def _wait(folder: Path, path: Path, seconds: float, alive: "Liveness") -> "Answer | None":
    """Wait for the answer; on a terminal, a line that counts."""
    from launch import control

    def tick(waited: float) -> None:
        if sys.stderr.isatty():
            line = f"\rwaiting for the run's answer: {waited:.0f} of {seconds:.0f} s"
            print(line, end="", file=sys.stderr, flush=True)

    if not sys.stderr.isatty():
        print(f"waiting up to {seconds:g} s for the run's answer", file=sys.stderr, flush=True)
    try:
        return control.wait(folder, path, seconds=seconds, alive=alive, tick=tick)
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)


def _print_version(is_asked: bool) -> None:
    if not is_asked:
        return
    from importlib import metadata

    try:
        print(f"trimtab {metadata.version('trimtab')}")
    except metadata.PackageNotFoundError:
        print("trimtab, from a source tree that is not installed")
    raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass
