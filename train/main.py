"""Train: `torchrun train/main.py +exp=falcon_like key=value ...`. Thin: compose, check, execute.

`--help` shows the groups, `--cfg job` the config, `-m` runs a sweep; `trimtab explain KEY` says
which file set a value. Running it again with the same arguments resumes the run. Exit codes: 0 the
run is complete, 2 the config or the data is wrong, 3 recovery gave up or the same failure came too
often, 75 a signal asked for the end and the same command goes on, 130 interrupted, 1 anything else.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # `torchrun train/main.py` puts train/ on the path; the packages lie one level up.
    sys.path[0] = str(ROOT)

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from train.errors import ConfigError, RunEndedError, TrimtabError
from train.health import elastic
from train.health.interruption import Interruption
from train.health.orphans import die_with_launcher
from train.health.outcome import (
    COMPLETED,
    FAILED,
    forget_what_the_launcher_was_told,
    is_final_for_this_launch,
    read_outcomes,
    tell_launcher,
)

CONF = ROOT / "conf"


def rewrite_arguments(arguments: list[str]) -> list[str]:
    """Return the arguments such that Hydra lets unknown keys through to our own check.

    `key=value` becomes `++key=value`, so that all unknown keys are reported together and with a
    suggestion; `exp=x` becomes `+exp=x`, since experiments have no default.
    """
    if {"-sc", "--shell-completion", "--shell_completion"} & set(arguments):
        return arguments
    rewritten = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        is_plain = bool(equals) and key[:1].isalpha() and "@" not in key
        if is_plain and key == "exp":
            rewritten.append(f"+{argument}")
        elif is_plain and not (CONF / key).is_dir() and not key.startswith("hydra"):
            rewritten.append(f"++{key}={value}")
        else:
            rewritten.append(argument)
    return rewritten


def run_name(arguments: list[str]) -> str:
    """Return the default name of a run: its experiment, and in a sweep what this job varies."""
    config = HydraConfig.get()
    name = str(config.runtime.choices.get("exp") or "trimtab").replace("/", "-")
    swept = _swept_keys(arguments)
    varied = [
        re.sub(r"[^A-Za-z0-9._,=+@-]+", "-", override.lstrip("+"))
        for override in config.overrides.task
        if override.lstrip("+").partition("=")[0] in swept
    ]
    return ",".join([name, *varied]) if varied else name


def _swept_keys(arguments: list[str]) -> set[str]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not {"-m", "--multirun"} & set(arguments):
        return set()
    texts = [text for text in arguments if "=" in text and not text.startswith("-")]
    overrides = OverridesParser.create().parse_overrides(texts)
    return {o.key_or_group for o in overrides if o.is_sweep_override()}


def run_job(node: DictConfig, interruption: Interruption) -> None:
    """Check one composed config and execute it. Called by Hydra, once a job."""
    from monitoring.clocks import Birth, birth, now
    from train.config import parse_config
    from train.logs import log_to_console
    from train.run_folder import check_folder

    number = HydraConfig.get().job.num if _is_multirun() else 0
    # A sweep's second job began when the first one ended.
    born = Birth(process=now()) if number else birth()
    plain: Any = OmegaConf.to_container(node, resolve=True)
    config = parse_config(plain, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    folder = config.run.folder
    check_folder(folder, plain, overwrite=config.run.overwrite)
    log_to_console()
    _refuse_restart(folder)
    said = elastic.warning(elastic.agent_command(), os.environ)
    if said is not None and os.environ.get("RANK", "0") == "0":
        logging.getLogger(__name__).warning("%s", said)
    from train.build import execute

    name = f"{number}-{folder.name}"
    execute(config, plain, job_name=name, birth=born, interruption=interruption)


def _refuse_restart(folder: Path) -> None:
    last = read_outcomes(folder).last
    if last is not None and is_final_for_this_launch(last):
        message = f"not started again by this launch: {last.reason}"
        raise RunEndedError(message, code=last.code, exit_code=last.exit_code)


def _is_multirun() -> bool:
    return HydraConfig.get().mode == hydra.types.RunMode.MULTIRUN


def main() -> int:
    """Run with the arguments of the command line, return the exit code and tell the launcher."""
    die_with_launcher()
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        forget_what_the_launcher_was_told()
    exit_code, code = 1, FAILED
    try:
        with Interruption().installed() as interruption:
            exit_code, code = _run(interruption)
        return exit_code
    finally:
        if is_main:
            tell_launcher(code, exit_code)


def _run(interruption: Interruption) -> tuple[int, str]:
    arguments = rewrite_arguments(sys.argv[1:])
    sys.argv[1:] = arguments
    failures: list[TrimtabError] = []

    def attempt(node: DictConfig) -> None:
        """Run one job; in a sweep, one that fails does not keep the others from running."""
        if interruption.is_waiting():
            return  # the rest of a sweep
        try:
            run_job(node, interruption)
        except TrimtabError as error:
            failures.append(error)
            _report(str(error), error.exit_code)

    scratch = tempfile.mkdtemp(prefix="trimtab-")
    interruption.on_leave.append(lambda *_: shutil.rmtree(scratch, ignore_errors=True))
    OmegaConf.register_new_resolver("run_name", lambda: run_name(arguments), replace=True)
    OmegaConf.register_new_resolver("scratch_dir", lambda: scratch, replace=True)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors to us instead of ending the process
    entry = hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(attempt)
    try:
        entry()
    except hydra.errors.HydraException as error:
        return _report(_first_lines(error), ConfigError.exit_code), FAILED
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not failures:
        return 0, COMPLETED
    ended = next((error for error in failures if isinstance(error, RunEndedError)), failures[0])
    return ended.exit_code, getattr(ended, "code", FAILED)


def _first_lines(error: BaseException) -> str:
    causes = [str(error)] + ([str(error.__cause__)] if error.__cause__ else [])
    text = "\n".join(text.partition("Config search path:")[0].strip() for text in causes)
    if "LexerNoViableAlt" in text or "no viable alternative" in text or "mismatched input" in text:
        text += (
            "\nquote what is not plain text, inside the shell's own quotes: "
            '\'data.paths=["~/my texts","~/more/*.jsonl"]\''
        )
    return text


def _report(message: str, exit_code: int) -> int:
    """Say what went wrong, once for all ranks of a host."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"trimtab: {message}\n")
    return exit_code


if __name__ == "__main__":
    exit_code = main()
    gc.freeze()  # to look for what could still be collected takes a process with torch a second
    sys.exit(exit_code)
