"""The `trimtab` command line.

Owns the commands, what they print, and the exit codes: 2 for a `LaunchError`, one line on stderr.
Refuses to do work of its own: each command calls one or two functions of this package.
Called by the console script `trimtab`, through `main`.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.errors import LaunchError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from launch.cluster import ClusterConfig

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Hydra overrides: exp=NAME, group=option, key=value.", show_default=False),
]
Run = Annotated[str, typer.Argument(help="A run folder, or a name under ./runs.")]


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
    app.command("launch")(launch)
    app.command("explain")(explain)
    app.command("report")(report)
    app.command("incidents")(incidents)
    return app


def main() -> None:
    """Run `trimtab` and leave with its exit code."""
    try:
        build_app()()
    except LaunchError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        sys.exit(2)


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
        local.run(arguments, local.variables(cluster))


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


def incidents(run: Run) -> None:
    """List a run's incidents from its journal."""
    from launch.incidents import read_incidents
    from launch.paths import find_run
    from launch.show import show_incidents

    print(show_incidents(read_incidents(find_run(run))))


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
