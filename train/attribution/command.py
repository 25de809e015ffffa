"""The command behind `train/replay.py`: arguments, progress, exit code; called on every rank.

Owns what a person sees of a replay. It only reads the run folder, but for the attribution that rank
0 leaves in the folder of the incident, so the run may go on meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from monitoring.attribution import ATTRIBUTION_FILE, show_attribution, write_attribution
from monitoring.console import ConsoleProgress
from monitoring.records import CONFIG_FILE, UnreadableRecordsError
from monitoring.replay_plan import INCIDENTS_FOLDER, NoReplayError
from train.errors import ConfigError, RunFolderError, TrimtabError
from train.logs import log_to_console


class Progress:
    """The progress line of all trials together; silent on all ranks but the first."""

    def __init__(self, name: str, num_steps: int, *, is_shown: bool) -> None:
        self._line = ConsoleProgress(num_steps, name) if is_shown else None
        self._num_done = 0
        if self._line is not None:
            self._line.start()

    def step(self, loss_nats: float) -> None:
        """Count a step."""
        self._num_done += 1
        if self._line is not None:
            self._line.update({"step": self._num_done, "loss_nats": loss_nats})

    def say(self, text: str) -> None:
        """Show which trial begins."""
        if self._line is not None:
            self._line.message(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._line is not None:
            self._line.stop()


def run(folder: Path, incident: int, num_steps_after: int | None, output: Path | None) -> None:
    """Replay an incident; rank 0 writes the attribution and shows it. A collective.

    Raises: NoReplayError; TrimtabError.
    """
    from train.attribution import replayer  # loads torch, which wrong arguments need not wait for
    from train.attribution.case import config_path, open_corpora, read_case, replay_config
    from train.distributed import join_world, launched_size

    case = read_case(folder, incident)
    config = replay_config(case, _node(folder, config_path(case)), num_ranks=launched_size())
    corpora = open_corpora(case, config)
    _make_deterministic(is_on=config.run.is_deterministic)
    after = replayer.DEFAULT_NUM_STEPS_AFTER if num_steps_after is None else num_steps_after
    num_steps = replayer.num_steps_in_all(case, after)
    with join_world(config.engine, job_name=f"replay-{folder.name}-{incident}") as world:
        case = world.broadcast(case)  # the run may be writing on: all ranks go by what one has read
        progress = Progress(f"replay of incident {incident}", num_steps, is_shown=world.is_main)
        try:
            result = replayer.replay(
                case,
                config,
                corpora,
                world,
                num_steps_after=after,
                progress=lambda point: progress.step(point.loss_nats),
                say=progress.say,
            )
        finally:
            progress.close()
        is_main = world.is_main
    if is_main:
        default = folder / INCIDENTS_FOLDER / case.plan.folder_name / ATTRIBUTION_FILE
        show_attribution(result, write_attribution(result, output or default))


def _make_deterministic(*, is_on: bool) -> None:
    """Ask for the same bits each time, as the run did. CPUs give them by themselves."""
    import torch

    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is used
        torch.use_deterministic_algorithms(is_on)


def _node(folder: Path, path: Path) -> dict[str, Any]:
    """Return the config at `path`, with the present places of the data: they may have moved."""
    node, present = _read_config(path), _read_config(folder / CONFIG_FILE)
    for key in ("paths", "cache_dir", "cache_bytes"):
        node["data"][key] = present["data"][key]
    for name, source in node["data"]["sources"].items():
        source["paths"] = present["data"]["sources"].get(name, source)["paths"]
    return node


def _read_config(path: Path) -> dict[str, Any]:
    try:
        node: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise RunFolderError(
            [f"{path} cannot be read ({error}); it says what to replay"]
        ) from error
    return dict(node)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find out why an incident of a run came.")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--incident", type=int, required=True, help="its number")
    parser.add_argument("--steps", type=int, help="steps beyond the one at which it was found")
    parser.add_argument("--output", type=Path, help="where to write attribution.json")
    return parser.parse_args()


def main() -> int:
    """Run with the arguments of the command line and return the exit code."""
    arguments = _arguments()
    log_to_console()
    try:
        run(arguments.run, arguments.incident, arguments.steps, arguments.output)
    except TrimtabError as error:
        return _report(str(error), error.exit_code)
    except (NoReplayError, UnreadableRecordsError) as error:
        return _report(str(error), ConfigError.exit_code)
    except OSError as error:
        return _report(f"{error.filename} cannot be written ({error.strerror})", 1)
    except KeyboardInterrupt:
        return _report("interrupted; nothing of the run was changed", 130)
    return 0


def _report(message: str, exit_code: int) -> int:
    """Say what went wrong, once for all ranks of a host."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"trimtab: {message}\n")
    return exit_code
