"""What the ranks of the engine tests do: each function runs on all ranks and writes JSON.

Batches are synthetic and learnable, from seeded noise with a pattern, the same on every rank; each
rank takes its own rows, as `SampleStream` hands them out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.tensor import DTensor

from train.checkpoint.info import Health
from train.checkpoint.store import CheckpointStore
from train.config import parse_config
from train.data.layout import DocumentLayout
from train.distributed import World, join_world, launched_rank, launched_size
from train.engines.base import Engine
from train.engines.build import build_engine
from train.engines.optimizer import MOMENTS
from train.engines.staging import num_predictions
from train.errors import CheckpointError
from train.main import CONF, rewrite_arguments
from train.models.decoder import Decoder
from train.models.init import initialise
from train.settings import EngineKind, Precision, RunConfig, Veto
from train.signals import Gate, StepSignals
from train.state import TrainState

NUM_STEPS = 30
SAVED_STEP = 15
BATCH_SAMPLES = 8
SEQUENCE_LENGTH = 32
LR = 3e-3


def base_config(*, device: str = "cpu") -> RunConfig:
    """Return a tiny model of Falcon's shape, on as many ranks as were started."""
    overrides = [
        "exp=falcon_like",
        f"engine.device={device}",
        "engine.precision=fp32",
        "engine.timeout_seconds=60",
        "model.hidden_size=32",
        "model.num_layers=2",
        "model.num_heads=2",
        "model.vocab_size=257",
        "tokenizer=bytes",
        "schedule.batch_samples=12",  # divides among 1 to 4 ranks; batches come from below
        "schedule.batch_ramp_steps=0",
    ]
    OmegaConf.register_new_resolver("run_name", lambda: "engine", replace=True)
    OmegaConf.register_new_resolver("scratch_dir", lambda: ".", replace=True)
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        node = compose("train", overrides=rewrite_arguments(overrides))
    plain: Any = OmegaConf.to_container(node, resolve=True)
    return parse_config(plain, world_size=launched_size())


def with_engine(config: RunConfig, **settings: Any) -> RunConfig:
    return replace(config, engine=replace(config.engine, **settings))


def batch(step: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Return the global batch of a step, [BATCH_SAMPLES, SEQUENCE_LENGTH + 1]."""
    generator = np.random.default_rng(step)
    starts = generator.integers(0, 64, (BATCH_SAMPLES, 1))
    ramp = np.arange(SEQUENCE_LENGTH + 1)[None, :] * generator.integers(1, 3, (BATCH_SAMPLES, 1))
    return ((starts + ramp) % 257).astype(np.uint16)


def own_rows(world: World, step: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Return this rank's rows of the global batch of a step."""
    share = BATCH_SAMPLES // world.size
    return batch(step)[world.rank * share : (world.rank + 1) * share]


def layout_of(step: int, *, first: int = 0, stop: int = BATCH_SAMPLES) -> DocumentLayout:
    """Return where documents begin in some rows of a batch, and their padding: most have some."""
    generator = np.random.default_rng((step, 1))
    length = SEQUENCE_LENGTH + 1
    starts = np.sort(generator.integers(1, length + 8, (BATCH_SAMPLES, 4)), axis=1)
    starts = np.pad(np.minimum(starts, length), ((0, 0), (1, 0)))
    lengths = np.minimum(generator.integers(2, length + 16, BATCH_SAMPLES), length)
    layout = DocumentLayout(starts=starts.astype(np.int32), lengths=lengths.astype(np.int32))
    return layout.rows(first, stop)


def one_isolated_step(engine: Engine, world: World, step: int) -> StepSignals:
    """Step with documents told apart and padding."""
    share = BATCH_SAMPLES // world.size
    first = world.rank * share
    vector = engine.step(
        own_rows(world, step),
        layout=layout_of(step, first=first, stop=first + share),
        num_tokens=num_predictions(batch(step), layout_of(step)),
        lr=LR,
        gate=Gate(),
    )
    return StepSignals.from_vector(vector.tolist())


def one_step(
    engine: Engine,
    world: World,
    step: int,
    gate: Gate | None = None,
    *,
    lr: float = LR,
    flag: bool = False,
) -> StepSignals:
    vector = engine.step(
        own_rows(world, step),
        num_tokens=BATCH_SAMPLES * SEQUENCE_LENGTH,
        lr=lr,
        gate=gate or Gate(),
        flag=flag,
    )
    return StepSignals.from_vector(vector.tolist())


def train(engine: Engine, world: World, first: int, last: int) -> list[float]:
    return [one_step(engine, world, step).loss_nats for step in range(first, last)]


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor on the host (a collective where it is sharded)."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()


def digest(engine: Any) -> dict[str, str]:
    """Return the SHA-256 of each parameter, moment and step counter, whole (a collective)."""
    return {
        name: hashlib.sha256(whole(tensor).numpy().tobytes()).hexdigest()
        for name, tensor in _whole_state(engine).items()
    }


def _whole_state(engine: Any) -> dict[str, Tensor]:
    """Return parameters, moments and counters; of DeepSpeed, as its own functions gather them."""
    gather = _own_state if hasattr(engine, "optimizer") else _zero_state
    return {
        f"{name}/{kind}": tensor
        for name, parameter in engine.model.named_parameters()
        for kind, tensor in gather(engine, parameter).items()
    }


def _own_state(engine: Any, parameter: Any) -> dict[str, Tensor]:
    return {"parameter": parameter, **engine.optimizer.state[parameter]}


def _zero_state(engine: Any, parameter: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = engine._engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()
    state = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
    counter = next(iter(optimizer.optimizer.state.values()))["step"]
    return {"parameter": safe_get_full_fp32_param(parameter), **state, "step": counter}


@contextmanager
def results(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Collect what a task found, and write it as `NAME.RANK.json`."""
    found: dict[str, Any] = {}
    yield found
    (folder / f"{name}.{launched_rank()}.json").write_text(json.dumps(found))


def conformance(folder: str, name: str, kind: str, zero_stage: int = 2) -> None:
    """Train, save, go on, load into a fresh engine, accumulate, evaluate."""
    config = with_engine(base_config(), kind=EngineKind(kind), zero_stage=zero_stage)
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        _conformance(found, config, world, Path(folder) / f"{name}-checkpoints")


def jobs_in_a_row(folder: str, name: str, kind: str) -> None:
    """Run three jobs in one process, as a sweep does, each in a world of its own."""
    config = with_engine(base_config(), kind=EngineKind(kind))
    with results(Path(folder), name) as found:
        for job in range(3):
            with join_world(config.engine, job_name=f"{name}-{job}") as world:
                found[str(job)] = _losses_of_a_job(config, world)


def _losses_of_a_job(config: RunConfig, world: World) -> list[float]:
    return train(build_engine(config, world), world, 0, 5)


def _conformance(found: dict[str, Any], config: RunConfig, world: World, folder: Path) -> None:
    engine = build_engine(config, world)
    store = CheckpointStore(folder, world, keep_good=2)
    store.open()
    signals = [one_step(engine, world, step) for step in range(SAVED_STEP)]
    found["losses"] = [signal.loss_nats for signal in signals]
    found["grad_norms"] = [signal.grad_norm for signal in signals]
    state = TrainState(step=SAVED_STEP, clock=SAVED_STEP)
    info = store.save(engine, state, {"ledger": []}, health=Health.GOOD)
    found["digest"] = digest(engine)
    found["losses"] += train(engine, world, SAVED_STEP, NUM_STEPS)
    found["evaluation"] = engine.evaluate(batch(1000))
    fresh = build_engine(config, world)
    store.load(fresh, info)
    found["digest_loaded"] = digest(fresh)
    found["losses_loaded"] = train(fresh, world, SAVED_STEP, NUM_STEPS)
    accumulating = build_engine(with_engine(config, micro_batch_samples=1), world)
    signals = [one_step(accumulating, world, step) for step in range(NUM_STEPS)]
    found["losses_accumulated"] = [signal.loss_nats for signal in signals]
    found["grad_norms_accumulated"] = [signal.grad_norm for signal in signals]
    found["evaluation_accumulated"] = accumulating.evaluate(batch(1000))
    found["isolated"] = [_isolated(other, world) for other in (fresh, accumulating)]


def _isolated(engine: Engine, world: World) -> dict[str, Any]:
    """Step and evaluate with documents told apart and padding; of two engines at the same step."""
    signals = [one_isolated_step(engine, world, step) for step in range(NUM_STEPS, NUM_STEPS + 3)]
    return {
        "losses": [signal.loss_nats for signal in signals],
        "grad_norms": [signal.grad_norm for signal in signals],
        "sample_losses": _of_all_ranks(engine.recent_sample_losses()[-1], world),
        "evaluation": engine.evaluate(batch(1000), layout_of(1000)),
    }


def _of_all_ranks(values: list[float], world: World) -> list[float]:
    """Return the values of all ranks, in the order of ranks (a collective)."""
    parts = [values]
    if world.size > 1:
        parts *= world.size
        dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def exchange(
    folder: str, name: str, kind: str, zero_stage: int, checkpoints: tuple[str, ...]
) -> None:
    """Load the checkpoints that others wrote, and go on from each."""
    config = with_engine(base_config(), kind=EngineKind(kind), zero_stage=zero_stage)
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        for checkpoint in checkpoints:
            store = CheckpointStore(Path(folder) / f"{checkpoint}-checkpoints", world, keep_good=2)
            store.open()
            engine = build_engine(config, world)
            store.load(engine, store.entries()[-1])
            found[checkpoint] = {
                "digest": digest(engine),
                "losses": train(engine, world, SAVED_STEP, NUM_STEPS),
            }


OFFLOADS: dict[str, Any] = {
    "1": {},
    "3": {},
    "1-offloaded": {"offload_optimizer": {"device": "cpu"}},
    "3-offloaded": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


def reload_in_bf16(folder: str, name: str) -> None:
    """Save and load with DeepSpeed where fp32 weights stand beside the ones that compute."""
    config = with_engine(base_config(), kind=EngineKind.DEEPSPEED, precision=Precision.BF16)
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        for label, zero in OFFLOADS.items():
            settings = {"zero_optimization": zero} if zero else {}
            staged = with_engine(config, zero_stage=int(label[0]), deepspeed=settings)
            engine, fresh = build_engine(staged, world), build_engine(staged, world)
            store = CheckpointStore(Path(folder) / f"{name}-{label}", world, keep_good=2)
            store.open()
            start = store.save(engine, TrainState(), {"ledger": []}, health=Health.GOOD)
            train(engine, world, 0, 3)
            state = TrainState(step=3, clock=3)
            info = store.save(engine, state, {"ledger": []}, health=Health.GOOD)
            store.load(fresh, start)
            again = train(fresh, world, 0, 3)
            store.load(fresh, info)
            found[label] = {
                "format": engine.checkpoint_format,
                "can_snapshot": engine.can_snapshot,
                "digests": [digest(each) for each in (engine, fresh)],
                "losses": [train(each, world, 3, 6) for each in (engine, fresh)],
                "first_losses": [again, train(build_engine(staged, world), world, 0, 3)],
            }


def failing_save(folder: str, name: str, failing_rank: int) -> None:
    """Let the engine's save fail on one rank alone; report what each rank is told."""

    class Failing:
        checkpoint_format = "test"

        def begin_save(self, staged: object = None) -> Any:
            return self

        def is_finite(self) -> bool:
            return True

        def write(self, path: Path, world: World) -> None:
            if launched_rank() == failing_rank:
                raise OSError(28, "No space left on device")
            (path / f"part-{launched_rank()}").write_text("x")

    config = with_engine(base_config(), kind=EngineKind.DDP, timeout_seconds=10.0)
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        store = CheckpointStore(Path(folder) / f"{name}-checkpoints", world, keep_good=2)
        store.open()
        engine: Any = Failing()
        try:
            store.save(engine, TrainState(step=1, clock=1), {}, health=Health.GOOD)
        except CheckpointError as error:
            found["error"] = str(error)
        found["left"] = [path.name for path in store.folder.iterdir()] if world.is_main else []


def _local_state(engine: Any) -> dict[str, Tensor]:
    """Return copies of this rank's parameters, moments and step counters."""
    copies = {}
    for name, parameter in engine.model.named_parameters():
        for kind, tensor in {"parameter": parameter, **engine.optimizer.state[parameter]}.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            copies[f"{name}/{kind}"] = local.detach().clone()
    return copies


def _changed(engine: Any, before: dict[str, Tensor]) -> list[str]:
    after = _local_state(engine)
    return [name for name in before if not torch.equal(before[name], after[name])]


@contextmanager
def poisoned_gradient(engine: Any, *, is_here: bool) -> Iterator[None]:
    """Turn the gradient of one parameter into NaN, on the ranks where `is_here`."""
    linear = engine.model.blocks[0].mlp.down
    hooks = []

    def poison(module: torch.nn.Module, inputs: Any) -> None:
        # In forward, a sharded parameter is whole; its gradient is poisoned before it travels.
        del inputs
        hooks.append(module.weight.register_hook(lambda gradient: gradient * math.nan))

    if is_here:
        hooks.append(linear.register_forward_pre_hook(poison))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _report(signals: StepSignals) -> dict[str, Any]:
    return {
        "loss": signals.loss_nats,
        "grad_norm": signals.grad_norm,
        "is_vetoed": signals.is_vetoed,
        "is_finite": signals.is_finite,
    }


def veto(folder: str, name: str, kind: str, device: str = "cpu") -> None:
    """Veto by the gate and by a NaN on the last rank; compare with an undisturbed engine."""
    config = with_engine(base_config(device=device), kind=EngineKind(kind))
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        engine, control = build_engine(config, world), build_engine(config, world)
        train(engine, world, 0, 5)
        train(control, world, 0, 5)
        gates: dict[str, Callable[[], StepSignals]] = {
            "loss_gate": lambda: one_step(engine, world, 5, Gate(max_loss_nats=1e-6)),
            "norm_gate": lambda: one_step(engine, world, 5, Gate(max_grad_norm=1e-6)),
        }
        for label, step in gates.items():
            before = _local_state(engine)
            found[label] = {**_report(step()), "changed": _changed(engine, before)}
        with poisoned_gradient(engine, is_here=world.rank == world.size - 1):
            before = _local_state(engine)
            signals = one_step(engine, world, 5)
        found["nan"] = {**_report(signals), "changed": _changed(engine, before)}
        before = _local_state(engine)
        clean = one_step(engine, world, 5)
        expected = one_step(control, world, 5)
        found["clean"] = {
            **_report(clean),
            "is_as_control": clean == expected and not _changed(engine, _local_state(control)),
            "num_changed": len(_changed(engine, before)),
            "num_tensors": len(before),
        }
        found["unguarded"] = _without_veto(config, world)


def _without_veto(config: RunConfig, world: World) -> dict[str, Any]:
    """Show that the poison is one: with recovery.veto=off it reaches the parameters."""
    config = replace(config, recovery=replace(config.recovery, veto=Veto.OFF))
    engine: Any = build_engine(config, world)
    with poisoned_gradient(engine, is_here=world.rank == world.size - 1):
        signals = one_step(engine, world, 0)
    is_nan = any(bool(whole(parameter).isnan().any()) for parameter in engine.model.parameters())
    return {**_report(signals), "is_nan": is_nan}


def clipping(folder: str, name: str, kind: str) -> None:
    """Compare clipping in the fused step with torch's own clipping and a plain AdamW."""
    config = base_config()
    limit = 0.25
    config = replace(config, optim=replace(config.optim, max_grad_norm=limit))
    config = with_engine(config, kind=EngineKind(kind))
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        engine: Any = build_engine(config, world)
        reference, optimizer = _plain(config)
        worst, worst_norm, num_clipped = 0.0, 0.0, 0
        for step in range(NUM_STEPS):
            signals = one_step(engine, world, step)
            norm = _plain_step(reference, optimizer, batch(step), config, limit)
            worst_norm = max(worst_norm, abs(norm - signals.grad_norm) / norm)
            num_clipped += norm > limit
            for ours, theirs in zip(engine.model.parameters(), reference.parameters(), strict=True):
                worst = max(worst, float((whole(ours) - theirs.detach()).abs().max()))
        found |= {"worst": worst, "worst_norm": worst_norm, "num_clipped": num_clipped}


def _plain(config: RunConfig) -> tuple[Decoder, torch.optim.AdamW]:
    model = Decoder(config.model)
    initialise(model, config.model, seed=config.run.seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas, epsilon = config.optim.betas, config.optim.epsilon
    return model, torch.optim.AdamW(groups, lr=LR, betas=betas, eps=epsilon, foreach=False)


def _plain_step(
    model: Decoder,
    optimizer: torch.optim.AdamW,
    rows: np.ndarray[Any, np.dtype[np.uint16]],
    config: RunConfig,
    limit: float,
) -> float:
    optimizer.zero_grad()
    cross_entropy, square_log_z = model(torch.from_numpy(rows).to(torch.int64))
    loss = (cross_entropy.sum() + config.optim.z_loss * square_log_z) / rows[:, 1:].size
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    return float(norm)
