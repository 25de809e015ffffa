"""Train: `torchrun train/main.py +exp=falcon_like key=value ...`. Thin: compose, check, execute.

`--help` shows the groups, `--cfg job` the config, `-m` runs a sweep; `trimtab explain KEY` says
which file set a value. Running it again with the same arguments resumes the run. Exit codes: 0 the
run is complete, 2 the config or the data is wrong, 3 recovery gave up, 1 anything else, 130
interrupted.
"""

from __future__ import annotations

import gc
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

from train.errors import ConfigError, TrimtabError

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


def run_job(node: DictConfig) -> None:
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
    from train.build import execute

    execute(config, plain, job_name=f"{number}-{folder.name}", birth=born)


def _is_multirun() -> bool:
    return HydraConfig.get().mode == hydra.types.RunMode.MULTIRUN


def main() -> int:
    """Run with the arguments of the command line and return the exit code."""
    arguments = rewrite_arguments(sys.argv[1:])
    sys.argv[1:] = arguments
    failures: list[TrimtabError] = []

    def attempt(node: DictConfig) -> None:
        """Run one job; in a sweep, one that fails does not keep the others from running."""
        try:
            run_job(node)
        except TrimtabError as error:
            failures.append(error)
            _report(str(error), error.exit_code)

    scratch = tempfile.mkdtemp(prefix="trimtab-")
    OmegaConf.register_new_resolver("run_name", lambda: run_name(arguments), replace=True)
    OmegaConf.register_new_resolver("scratch_dir", lambda: scratch, replace=True)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors to us instead of ending the process
    entry = hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(attempt)
    try:
        entry()
    except hydra.errors.HydraException as error:
        return _report(_first_lines(error), ConfigError.exit_code)
    except KeyboardInterrupt:
        return _report("interrupted; the same command resumes from the last checkpoint", 130)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return failures[0].exit_code if failures else 0


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
