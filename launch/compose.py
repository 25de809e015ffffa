"""The composed config, from a list of overrides, as the training entry would compose it.

Owns the override grammar of the command line and Hydra's search for the files.
Refuses what Hydra refuses, in one message.
Called by `launch.cli` and `launch.explain`. Hydra is imported inside: `trimtab --help` needs none.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from launch.errors import LaunchError
from launch.paths import conf_folder

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from omegaconf import DictConfig

CONFIG_NAME = "train"

DEFAULT_RUN_NAME = "${run_name:}"
"""How `train.yaml` says "the name of the experiment"; the training entry resolves it."""


def normalise(overrides: Sequence[str]) -> list[str]:
    """Return the overrides as Hydra takes them: `exp=x` becomes `+exp=x`, there is no default."""
    return [f"+{text}" if text.startswith("exp=") else text for text in overrides]


def compose(overrides: Sequence[str], *, conf_dir: Path | None = None) -> "DictConfig":
    """Return the config of `train.yaml` with `overrides` applied; interpolations stay as they are.

    Raises:
        LaunchError: Hydra refused an override or a file.
    """
    import hydra

    with searching(conf_dir):
        return hydra.compose(CONFIG_NAME, overrides=normalise(overrides))


@contextmanager
def searching(conf_dir: Path | None) -> Iterator["ConfigLoader"]:
    """Give Hydra's loader over `conf_dir` (None: the shipped folder); its errors become ours."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    folder = (conf_folder() if conf_dir is None else conf_dir).resolve()
    if not (folder / f"{CONFIG_NAME}.yaml").is_file():
        raise LaunchError(f"{folder} holds no {CONFIG_NAME}.yaml; install trimtab with its config")
    try:
        with hydra.initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    except OverrideParseException as error:
        raise LaunchError(f"{error.override}: cannot be read; {_one_line(error)}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise LaunchError(_one_line(error)) from error


def select(config: "DictConfig", key: str) -> object:
    """Return the resolved value at `key` as plain Python, None where it is absent or null.

    Raises:
        LaunchError: an interpolation in it leads nowhere.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        value = OmegaConf.select(config, key)
        return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise LaunchError(_one_line(error)) from error


def pin_run_name(config: "DictConfig", overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Return the run's name, and the overrides with it said outright where it was the default.

    A job that Slurm requeues, on other nodes, must come back to the same folder.

    Raises:
        LaunchError: an interpolation in the name leads nowhere.
    """
    from omegaconf import OmegaConf

    run = OmegaConf.select(config, "run")
    written = OmegaConf.to_container(run, resolve=False) if OmegaConf.is_dict(run) else None
    name = written.get("name") if isinstance(written, dict) else None
    if name is not None and DEFAULT_RUN_NAME not in str(name):
        return str(select(config, "run.name")), list(overrides)
    experiments = [text.removeprefix("+exp=") for text in overrides if text.startswith("+exp=")]
    default = experiments[-1].replace("/", "-") if experiments else "trimtab"
    pinned = str(name or DEFAULT_RUN_NAME).replace(DEFAULT_RUN_NAME, default)
    key = "++run.name" if name is None else "run.name"  # ++ sets a key that was deleted
    return pinned, [*overrides, f"{key}={pinned}"]


def _one_line(error: Exception) -> str:
    # Hydra says the reason in the cause: "Could not override 'a.b'" <- "Key 'b' is not in struct".
    message, _, _ = str(error).partition("Config search path:")
    lines = [line.strip() for line in f"{message}\n{error.__cause__ or ''}".splitlines()]
    kept = [line for line in lines if line and not line.startswith(("full_key:", "object_type="))]
    return "; ".join(dict.fromkeys(kept)).replace(":; ", ": ").replace(".; ", "; ")
