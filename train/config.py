"""From a YAML node to a typed, frozen `RunConfig`: types, unknown keys and combinations.

All problems are reported at once, each with its key, what was found and what to do, before any
process group, folder or tensor is made. Imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from launch.cluster import problems as cluster_problems
from train.amounts import AmountUnit
from train.data.checks import data_problems
from train.data.settings import SourceSettings, StageSettings, TokenizerKind
from train.engines.deepspeed_keys import OWNED_KEYS, TOP_LEVEL_KEYS
from train.errors import ConfigError
from train.recovery.policy import LISTED_RUNGS, Rule
from train.settings import ChaosKind, Decay, Device, EngineKind, RunConfig, Veto

# Of what a user names or numbers, one after the other: the keys below each.
_NAMED_SETTINGS: dict[tuple[str, ...], Any] = {
    ("data", "sources"): SourceSettings,
    ("data", "stages"): StageSettings,
}
_CALLBACKS = Path(__file__).parent / "callbacks"

# Keys that may differ when a run is taken up again: they do not change what is learnt.
FREE_KEYS = (
    "run.overwrite",
    "run.dir",
    "run.name",
    "engine.",
    "checkpoint.",
    "tracker.",
    "callbacks.",
    "cluster.",
    "integrity.",
    "recovery.",
    "health.",
    "data.paths",  # their digests are compared instead
    "data.read_ahead_batches",
    "data.validation_interval_steps",
    "data.verify",
    "data.on_bad_shard",
    "data.cache_",
)
# Keys that may differ too, but change what is learnt from there on: the run says so. A change of
# the mixture is allowed in its future alone: samples that were read already must stay the same.
CHANGEABLE_KEYS = (
    "run.steps",
    "schedule.",
    "data.sequence_length",
    "data.sources",
    "data.stages",
)


def parse_config(node: Mapping[str, Any], *, world_size: int) -> RunConfig:
    """Return the config of a resolved YAML node (plain containers).

    Raises: ConfigError with all problems at once.
    """
    try:
        config = _adapter().validate_python(node)
    except ValidationError as error:
        raise ConfigError([_explain(dict(item)) for item in error.errors()]) from error
    problems = list(_problems(config, world_size))
    if problems:
        raise ConfigError(problems)
    return config


@cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


@cache
def known_keys() -> tuple[str, ...]:
    """Return all dotted keys of the schema."""
    groups = get_type_hints(RunConfig, include_extras=False)
    return tuple(
        f"{group}.{field.name}"
        for group, settings in groups.items()
        if is_dataclass(settings)
        for field in fields(settings)
    )


def _explain(error: Mapping[str, Any]) -> str:
    """Turn one pydantic error into our form: key, found, what to do."""
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    found = error["input"]
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        close = _did_you_mean(path)
        hint = f"did you mean {close}?" if close else "remove it (`--cfg job` lists all keys)"
        return f"{key}={found!r}: unknown key; {hint}"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{key}: missing; set it, e.g. {key}=..."
    if key == "run.name":
        return (
            f"run.name={found!r}: should be a folder name of letters, digits and . _ , = + @ -, "
            "starting with a letter or digit"
        )
    expected = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{key}={found!r}: should be {expected.removeprefix('expected ')}"


def _did_you_mean(path: Sequence[str]) -> str | None:
    key, last = ".".join(path), path[-1]
    if named := _NAMED_SETTINGS.get(tuple(path[:2])):
        names = [field.name for field in fields(named)]
        close = difflib.get_close_matches(last, names, n=1, cutoff=0.6)
        return ".".join([*path[:-1], close[0]]) if close else None
    groups = [field.name for field in fields(RunConfig)]
    matches = difflib.get_close_matches(key, [*known_keys(), *groups], n=1, cutoff=0.6)
    if matches:
        return matches[0]
    by_last: dict[str, str] = {}
    for known in known_keys():
        by_last.setdefault(known.rsplit(".", 1)[-1], known)
    matches = difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)
    return by_last[matches[0]] if matches else None


def _problems(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from _model_problems(config)
    yield from _schedule_problems(config, world_size)
    yield from _engine_problems(config, world_size)
    yield from _file_problems(config)
    yield from data_problems(config.data)
    yield from _recovery_problems(config)
    yield from _integrity_problems(config)
    yield from _chaos_problems(config, world_size)
    yield from cluster_problems(config.cluster)


def _model_problems(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.hidden_size % model.num_heads:
        yield (
            f"model.num_heads={model.num_heads} does not divide "
            f"model.hidden_size={model.hidden_size}; use {_divisors_near(model)}"
        )
    elif model.hidden_size // model.num_heads % 2:
        yield (
            f"model.num_heads={model.num_heads} gives heads of odd size "
            f"{model.hidden_size // model.num_heads}; rotary embeddings need an even one"
        )
    if model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_kv_heads={model.num_kv_heads} does not divide "
            f"model.num_heads={model.num_heads}; use 1 (multi-query) up to {model.num_heads}"
        )
    if model.num_block_norms == 1 and not model.is_parallel:
        yield (
            "model.num_block_norms=1 needs model.is_parallel=true; a sequential block has two "
            "norms: set model.num_block_norms=2"
        )
    if config.tokenizer.kind is not TokenizerKind.FILE:
        size = 257 if config.tokenizer.kind is TokenizerKind.BYTES else config.tokenizer.vocab_size
        if size > model.vocab_size:
            yield (
                f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {size}; "
                f"set model.vocab_size={size} or lower tokenizer.vocab_size"
            )


def _divisors_near(model: Any) -> str:
    near = [n for n in range(1, model.hidden_size + 1) if model.hidden_size % n == 0]
    near.sort(key=lambda n: abs(n - model.num_heads))
    return " or ".join(str(n) for n in sorted(near[:2]))


def _schedule_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    schedule, steps = config.schedule, config.run.steps
    if schedule.warmup_steps > steps:
        yield (
            f"schedule.warmup_steps={schedule.warmup_steps} is longer than the run of "
            f"run.steps={steps}; lower it or lengthen the run"
        )
    if schedule.decay is Decay.CONSTANT and schedule.final_lr_ratio != 1:
        yield (
            f"schedule.final_lr_ratio={schedule.final_lr_ratio} has no effect with "
            "schedule.decay=constant; set it to 1"
        )
    sizes = {"schedule.batch_samples": schedule.batch_samples}
    if schedule.batch_ramp_steps:
        sizes["schedule.batch_ramp_start_samples"] = schedule.batch_ramp_start_samples
        sizes["schedule.batch_ramp_increment_samples"] = schedule.batch_ramp_increment_samples
        if schedule.batch_ramp_start_samples > schedule.batch_samples:
            yield (
                f"schedule.batch_ramp_start_samples={schedule.batch_ramp_start_samples} is above "
                f"schedule.batch_samples={schedule.batch_samples}; a ramp only rises"
            )
    for key, size in sizes.items():
        if size % world_size:
            below = size - size % world_size
            near = f"{below} or {below + world_size}" if below else str(world_size)
            yield f"{key}={size} does not divide among {world_size} ranks; use {near}"


def _engine_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    engine = config.engine
    if engine.kind is EngineKind.SINGLE and world_size > 1:
        yield (
            f"engine.kind=single runs on one process, and {world_size} were started; use "
            "engine=ddp, fsdp or deepspeed, or --nproc-per-node 1"
        )
    if engine.kind is EngineKind.DEEPSPEED and config.recovery.veto not in (Veto.AUTO, Veto.OFF):
        yield (
            f"recovery.veto={config.recovery.veto} is impossible with engine=deepspeed: it takes "
            "its norm inside its own step, so no update can be refused from outside; set "
            "recovery.veto=off (a rewind then undoes a bad update) or use engine=fsdp"
        )
    for key in engine.deepspeed:
        if key in OWNED_KEYS:
            yield (
                f"engine.deepspeed.{key} is set by Trimtab itself; use {OWNED_KEYS[key]} instead"
            )
        elif key not in TOP_LEVEL_KEYS:
            close = difflib.get_close_matches(key, TOP_LEVEL_KEYS, n=1)
            hint = f"did you mean engine.deepspeed.{close[0]}?" if close else "remove it"
            yield (
                f"engine.deepspeed.{key}: DeepSpeed has no such key and would silently ignore "
                f"it; {hint}"
            )
    if engine.deepspeed and engine.kind is not EngineKind.DEEPSPEED:
        yield (
            f"engine.deepspeed is set, but engine.kind={engine.kind}; use engine=deepspeed "
            "or remove it"
        )
    if engine.device is Device.CUDA and not Path("/dev/nvidiactl").exists():
        yield "engine.device=cuda, but this machine has no NVIDIA device; use engine.device=cpu"


def _file_problems(config: RunConfig) -> Iterator[str]:
    data, tokenizer = config.data, config.tokenizer
    keys = {f"data.sources.{name}.paths": source.paths for name, source in data.sources.items()}
    for key, paths in {"data.paths": data.paths, **keys}.items():
        for path in paths:
            is_plain = "://" not in path and not any(mark in path for mark in "*?[")
            # Megatron's files go by what their names share.
            names = (Path(path).expanduser(), Path(f"{path}.idx").expanduser())
            if is_plain and not any(name.exists() for name in names):
                yield f"{key}: {path} does not exist; give a file, a folder or a glob"
    if tokenizer.kind is TokenizerKind.FILE:
        if tokenizer.path is None:
            yield "tokenizer.path is missing; tokenizer=file needs a tokenizer.json"
        elif _looks_local(tokenizer.path) and not Path(tokenizer.path).expanduser().exists():
            yield (
                f"tokenizer.path={tokenizer.path} does not exist; give a tokenizer.json, a folder "
                "with one, or a name on the Hugging Face hub"
            )


def _looks_local(path: str) -> bool:
    """Return whether a tokenizer is a path rather than a name on the hub, as `org/name` is."""
    return path.endswith(".json") or path.startswith(("/", ".", "~")) or "/" not in path


def _recovery_problems(config: RunConfig) -> Iterator[str]:
    recovery, checkpoint = config.recovery, config.checkpoint
    known = sorted(path.stem for path in _CALLBACKS.glob("[a-z]*.py"))
    for name in config.callbacks.names:
        if name not in known:
            yield f"callbacks.names: there is no callback {name!r}; use some of {known}"
    if recovery.rule is not Rule.NONE:
        for name in ("spike_detection", "spike_recovery", "checkpointing"):
            if name not in config.callbacks.names:
                yield (
                    f"recovery.rule={recovery.rule} needs the callback {name} in callbacks.names; "
                    "add it, or set recovery=none"
                )
        rungs = recovery.ladder
        for rung in sorted(set(rungs) - LISTED_RUNGS):
            yield (
                f"recovery.ladder: {rung} is no attempt; use some of "
                f"{', '.join(sorted(LISTED_RUNGS))}, in the order in which they are tried"
            )
        cannot_refuse = config.engine.kind is EngineKind.DEEPSPEED
        if recovery.rule is Rule.SKIP_STEP and (recovery.veto is Veto.OFF or cannot_refuse):
            where = "engine=deepspeed" if cannot_refuse else "recovery.veto=off"
            yield (
                f"recovery.rule=skip_step only ever refuses updates, and {where} refuses none; use "
                "recovery=ladder"
            )
        if recovery.rule in (Rule.LADDER, Rule.OBSERVE) and not rungs:
            yield "recovery.ladder is empty; name at least one attempt, or use recovery=skip_step"
        if recovery.max_flagged_steps <= recovery.persistence_steps:
            yield (
                f"recovery.max_flagged_steps={recovery.max_flagged_steps} accepts a level before "
                f"recovery.persistence_steps={recovery.persistence_steps} high steps make a spike; "
                f"use {recovery.persistence_steps + 1} or more"
            )
        longest, key = checkpoint.longest_interval_steps, "checkpoint.interval_steps"
        if checkpoint.interval_steps == "auto":
            key = "checkpoint.max_interval_steps"
        if not checkpoint.save_at_start and longest > config.run.steps:
            yield (
                f"{key}={longest} is longer than the run of "
                f"run.steps={config.run.steps} and checkpoint.save_at_start=false: recovery would "
                "have nothing to go back to"
            )


def _integrity_problems(config: RunConfig) -> Iterator[str]:
    interval = config.integrity.reexecution_interval_steps
    if interval is not None and not config.run.is_deterministic:
        yield (
            f"integrity.reexecution_interval_steps={interval} needs run.is_deterministic=true: "
            "otherwise sound hardware gives other bits too; set it, or null for the interval"
        )


def _chaos_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    chaos = config.chaos
    if chaos.kind is ChaosKind.NONE:
        return
    if chaos.length.value == 0:
        yield "chaos.length is zero; set an amount, or chaos=none"
    if chaos.kind not in (ChaosKind.BAD_DATA, ChaosKind.LEVEL_SHIFT):
        for key, amount in (("start", chaos.start), ("length", chaos.length)):
            if amount.unit is AmountUnit.TOKENS:
                yield (
                    f"chaos.{key}={amount}: chaos={chaos.kind} strikes at a step, not at data; "
                    'give "100 steps"'
                )
    if chaos.start.unit is not AmountUnit.TOKENS and chaos.start.value >= config.run.steps:
        yield (
            f"chaos.start={chaos.start} lies behind the last step, run.steps={config.run.steps}: "
            "it would never strike; set it earlier"
        )
    flips = (ChaosKind.BIT_FLIP, ChaosKind.QUIET_BIT_FLIP)
    if chaos.kind in flips and config.engine.kind is EngineKind.DEEPSPEED:
        yield (
            f"chaos.kind={chaos.kind} is impossible with engine=deepspeed: it keeps copies of the "
            "weights of its own, which would undo the flip; use engine=ddp or fsdp"
        )
    if chaos.kind in (ChaosKind.LR_SHOCK, ChaosKind.SLOW_DIVERGENCE) and chaos.factor == 1:
        yield (
            f"chaos.factor=1 changes no learning rate, and chaos.kind={chaos.kind} is nothing "
            "else; set a factor, or chaos=none"
        )
    if chaos.rank >= world_size:
        yield (
            f"chaos.rank={chaos.rank} is no rank of {world_size}; use 0 to {world_size - 1}, or "
            "start more processes"
        )


def flatten(node: object, prefix: str = "") -> dict[str, object]:
    """Return `{dotted key: leaf}` of nested mappings; lists are leaves."""
    if isinstance(node, Mapping) and node:
        flat: dict[str, object] = {}
        for key, value in node.items():
            flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: node}


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line a key that differs and matters for what is learnt."""
    old_flat, new_flat = flatten(old), flatten(new)
    lines = []
    for key in sorted(old_flat.keys() | new_flat.keys()):
        if old_flat.get(key) != new_flat.get(key) and not key.startswith(FREE_KEYS):
            lines.append(f"{key}: the folder has {old_flat.get(key)!r}, now {new_flat.get(key)!r}")
    return lines


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line a key that differs, and must not while a run is taken up again."""
    return [line for line in _differing(old, new) if not line.startswith(CHANGEABLE_KEYS)]


def allowed_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line a key that differs and changes what is learnt from here on."""
    return [line for line in _differing(old, new) if line.startswith(CHANGEABLE_KEYS)]
