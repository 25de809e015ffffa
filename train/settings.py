"""The shape of the configuration: one flat, frozen dataclass a group, and `RunConfig` over them.

Owns names, types and single-value limits; values live in `conf/`, combinations are checked in
`config.py`. Imports no torch, so a bad config is refused in well under a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from launch.cluster import ClusterConfig
from monitoring.retention import parse_size
from monitoring.trackers import TrackerConfig
from train.amounts import (
    REFUSE_UNKNOWN,
    Amount,
    AmountField,
    AmountUnit,
    Count,
    NonNegative,
    PositiveFloat,
    Scale,
    Share,
)
from train.data.settings import DataSettings, TokenizerSettings
from train.recovery.policy import Rule, Rung


def _whole_number_as_text(value: object) -> object:
    return str(value) if type(value) is int else value


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """`run`: name and folder, length, seed."""

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    name: Annotated[
        str,
        BeforeValidator(_whole_number_as_text),
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,=+@-]*$", max_length=200),
    ]
    dir: str
    overwrite: bool
    steps: Count
    seed: int
    is_deterministic: bool

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.dir).expanduser() / self.name


class Activation(StrEnum):
    """Activation of the MLP."""

    GELU = "gelu"
    SWIGLU = "swiglu"


class Norm(StrEnum):
    """Normalisation layer."""

    LAYERNORM = "layernorm"
    RMSNORM = "rmsnorm"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """`model`: the decoder. A family sets the parts, `model/size` the numbers."""

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    hidden_size: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    mlp_multiple: PositiveFloat
    vocab_size: Count
    activation: Activation
    norm: Norm
    norm_epsilon: PositiveFloat
    num_block_norms: Annotated[int, Field(ge=1, le=2)]
    is_parallel: bool
    has_bias: bool
    has_tied_embeddings: bool
    rope_theta: PositiveFloat
    init_std: PositiveFloat


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimSettings:
    """`optim`: AdamW and the loss it minimises."""

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    lr: PositiveFloat
    betas: tuple[Share, Share]
    epsilon: PositiveFloat
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: PositiveFloat | None
    z_loss: Annotated[float, Field(ge=0)]


class Decay(StrEnum):
    """Shape of the learning rate after warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSettings:
    """`schedule`: learning rate and batch size as functions of the step."""

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    decay: Decay
    warmup_steps: NonNegative
    final_lr_ratio: Annotated[float, Field(ge=0, le=1)]
    batch_samples: Count
    batch_ramp_start_samples: Count
    batch_ramp_steps: NonNegative
    batch_ramp_increment_samples: Count


class EngineKind(StrEnum):
    """How the model is spread over processes."""

    AUTO = "auto"
    SINGLE = "single"
    DDP = "ddp"
    FSDP = "fsdp"
    DEEPSPEED = "deepspeed"


class Device(StrEnum):
    """Where tensors live."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    """Arithmetic of forward and backward; parameters and moments stay fp32."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """`engine`: processes, device, precision, DeepSpeed."""

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    kind: EngineKind
    device: Device
    precision: Precision
    micro_batch_samples: Count | None
    timeout_seconds: PositiveFloat
    peak_tflops: PositiveFloat | None
    zero_stage: Annotated[int, Field(ge=1, le=3)]
    deepspeed: dict[str, object]


NonNegativeSeconds = Annotated[float, Field(ge=0)]


def _none_or_several(value: int) -> int:
    if value < 0 or value == 1:
        raise ValueError("expected 0, or at least 2: one that is good and one that is to be")
    return value


def _size_or_none(value: object) -> int | None:
    return None if value is None else parse_size(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSettings:
    """`checkpoint`: when to save, when to trust, what to keep."""

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    interval_steps: Count | Literal["auto"]
    max_interval_steps: Count
    max_minutes_at_risk: PositiveFloat
    failures_per_day: PositiveFloat | None
    good_after_steps: Count
    keep_good: Annotated[int, Field(ge=2)]
    keep_every_steps: Count | None
    disk_budget: Annotated[int | None, BeforeValidator(_size_or_none)]
    keep_incidents: NonNegative
    keep_snapshots: Annotated[int, AfterValidator(_none_or_several)]
    snapshot_interval_steps: Count | None
    is_async: bool
    retry_seconds: tuple[NonNegativeSeconds, ...]
    max_failures: Count
    remote: Annotated[str, Field(pattern=r"^[A-Za-z0-9+.-]+://.+")] | None
    save_at_start: bool
    save_at_end: bool

    @property
    def longest_interval_steps(self) -> int:
        """How many steps can lie between checkpoints on disk."""
        interval = self.interval_steps
        return interval if isinstance(interval, int) else self.max_interval_steps


class Veto(StrEnum):
    """Which updates the device refuses."""

    AUTO = "auto"
    OFF = "off"
    NONFINITE = "nonfinite"
    OUTLIER = "outlier"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverySettings:
    """`recovery`: the detector, the rule, its amounts and its budgets."""

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    rule: Rule
    veto: Veto
    skip: AmountField
    margin: AmountField
    rewind_steps: NonNegative
    token_scale: Scale
    step_scale: Scale
    ladder: tuple[Rung, ...]
    growth: Annotated[float, Field(ge=1, le=100)]
    cool_factor: Annotated[float, Field(gt=0, lt=1)]
    cool_steps: Count
    cooldown_steps: NonNegative
    max_rewinds: NonNegative
    max_vetoes: NonNegative
    max_vetoes_in_a_row: Count
    announced: tuple[NonNegative, ...]
    announced_steps: Count
    window_steps: Annotated[int, Field(ge=8)]
    warmup_steps: Annotated[int, Field(ge=4)]
    threshold_sigma: PositiveFloat
    persistence_steps: Count
    max_flagged_steps: Count

    @property
    def resolved_veto(self) -> Veto:
        """What `auto` means for the rule: refusing outliers is the ladder's first rung."""
        if self.rule is Rule.OBSERVE:
            return Veto.OFF
        if self.veto is not Veto.AUTO:
            return self.veto
        return Veto.OUTLIER if self.rule in (Rule.LADDER, Rule.SKIP_STEP) else Veto.NONFINITE

    def scaled_steps(self, steps: int) -> int:
        """Return `steps`, scaled to the size of the run; 0 stays 0, others are at least 1."""
        return max(1, round(steps * self.step_scale)) if steps else 0

    def scaled(self, amount: Amount) -> Amount:
        """Return `amount`, scaled to the size of the run; an amount of 0 stays 0."""
        if amount.value == 0:
            return amount
        is_tokens = amount.unit is AmountUnit.TOKENS
        return amount.scaled(self.token_scale if is_tokens else self.step_scale)

    def furthest_rewind_steps(self) -> int:
        """Return how far before an onset a target may be wanted, in steps of this run."""
        further = self.ladder.count(Rung.SKIP_FURTHER)
        is_ladder = self.rule in (Rule.LADDER, Rule.OBSERVE)
        factor = self.growth ** max(0, further - 1) if is_ladder else 1.0
        return round(self.scaled_steps(self.rewind_steps) * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthSettings:
    """`health`: when a rank hangs or lags, and when another attempt would be in vain."""

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    watchdog: bool
    heartbeat_seconds: PositiveFloat
    hang_seconds: PositiveFloat
    hang_factor: Annotated[float, Field(ge=1)]
    start_seconds: PositiveFloat
    straggler_interval_steps: NonNegative
    straggler_sigma: PositiveFloat
    max_same_failures: NonNegative


@dataclass(frozen=True, slots=True, kw_only=True)
class CallbackSettings:
    """`callbacks`: names of the callbacks that run; each is a module of `train/callbacks`."""

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    names: tuple[str, ...]


class OnMismatch(StrEnum):
    """What follows when bits are wrong."""

    REWIND = "rewind"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegritySettings:
    """`integrity`: how often replicas are compared and steps executed twice; null: never."""

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    replica_check_interval_steps: Count | None
    reexecution_interval_steps: Count | None
    on_mismatch: OnMismatch


class ChaosKind(StrEnum):
    """Faults that can be put into a run on purpose."""

    NONE = "none"
    BAD_DATA = "bad_data"
    LR_SHOCK = "lr_shock"
    BIT_FLIP = "bit_flip"
    QUIET_BIT_FLIP = "quiet_bit_flip"
    NAN_ON_ONE_RANK = "nan_on_one_rank"
    SLOW_DIVERGENCE = "slow_divergence"
    LEVEL_SHIFT = "level_shift"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosSettings:
    """`chaos`: a real fault, from a point of the run on, for a length of it.

    Faults of the data count from the start of the order, all others from the start of the run.
    `factor` is what the learning rate is multiplied by; `rank` is where the fault strikes.
    """

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    kind: ChaosKind
    start: AmountField
    length: AmountField
    factor: PositiveFloat
    rank: NonNegative


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The whole configuration of one run."""

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    run: RunSettings
    model: ModelSettings
    data: DataSettings
    tokenizer: TokenizerSettings
    optim: OptimSettings
    schedule: ScheduleSettings
    engine: EngineSettings
    checkpoint: CheckpointSettings
    recovery: RecoverySettings
    health: HealthSettings
    tracker: TrackerConfig
    callbacks: CallbackSettings
    integrity: IntegritySettings
    chaos: ChaosSettings
    cluster: ClusterConfig
