"""The shape of the configuration: one flat, frozen dataclass a group, and `RunConfig` over them.

Owns names, types and single-value limits; values live in `conf/`, combinations are checked in
`config.py`. Imports no torch, so a bad config is refused in well under a second.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from launch.cluster import ClusterConfig
from monitoring.trackers import TrackerConfig
from train.recovery.policy import Rule, Rung

REFUSE_UNKNOWN = ConfigDict(extra="forbid")

Count = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Scale = Annotated[float, Field(gt=0, le=1e6)]
Share = Annotated[float, Field(ge=0, lt=1)]


class AmountUnit(StrEnum):
    """What an amount of training counts."""

    TOKENS = "tokens"
    BATCHES = "batches"
    STEPS = "steps"


_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_MAX_AMOUNT = 10**15
_AMOUNT = re.compile(r"^\s*([\d_]*\.?\d+)\s*([kmbt]?)\s*(tokens|batches|steps)\s*$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Amount:
    """An amount of data: `1B tokens`, `300 batches`, `100 steps` (a step reads one batch)."""

    value: int
    unit: AmountUnit

    @classmethod
    def parse(cls, text: object) -> Amount:
        """Read an amount from the config. Raises: ValueError with the accepted forms."""
        if isinstance(text, Amount):
            return text
        match = _AMOUNT.match(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError('expected an amount such as "1B tokens", "300 batches" or "100 steps"')
        number, multiple, unit = match.groups()
        value = round(float(number.replace("_", "")) * _MULTIPLES[multiple.lower()])
        if value > _MAX_AMOUNT:
            raise ValueError(f"expected at most {_MAX_AMOUNT:,} of anything")
        return cls(value, AmountUnit(unit.lower()))

    def scaled(self, factor: float) -> Amount:
        """Return this amount times `factor`, at least 1."""
        return Amount(max(1, round(self.value * factor)), self.unit)

    def __str__(self) -> str:
        return f"{self.value:,} {self.unit}"


AmountField = Annotated[Amount, BeforeValidator(Amount.parse)]


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


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class Packing(StrEnum):
    """How documents become samples of one length."""

    CONCATENATE = "concatenate"
    """All documents behind one another, cut every `sequence_length` tokens."""
    BEST_FIT = "best_fit"
    """Whole documents where they fit, the rest of a sample is padding."""


class Normalise(StrEnum):
    """Unicode normalisation of text before it is tokenised."""

    NONE = "none"
    NFC = "nfc"
    NFKC = "nfkc"


class Verify(StrEnum):
    """What is compared with the manifest when a corpus is opened."""

    SIZES = "sizes"
    DIGESTS = "digests"


class OnBadShard(StrEnum):
    """What happens if files of tokens are missing or damaged."""

    STOP = "stop"
    SKIP = "skip"
    """Their samples go into the skip ledger, and the run says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """`data.sources.NAME`: one source of a mixture.

    `weight`: its share of the samples, relative to the others'. `max_epochs`: how often it is read
    at most; null: without limit. `text_key`: null takes `data.text_key`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    paths: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    max_epochs: PositiveFloat | None = None
    text_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """One of `data.stages`: from `start` on, sources have these weights.

    `ramp`: how long the shares take to get there, in a straight line; 0: at once.
    """

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    start: AmountField
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    ramp: AmountField = Amount(0, AmountUnit.TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """`data`: the corpus, or a mixture of several, and how it becomes samples.

    `paths` is one source, `sources` are several. Without either, the corpus is the running
    interpreter's own standard library.
    """

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    paths: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
    sources: dict[str, SourceSettings]
    stages: tuple[StageSettings, ...]
    text_key: str
    normalise: Normalise
    deduplicate: bool
    max_bad_records: NonNegative
    token_dtype: str | None
    sequence_length: Count
    packing: Packing
    isolates_documents: bool
    block_samples: Count | None
    window_blocks: Count
    validation_share: Share
    validation_samples: NonNegative
    validation_interval_steps: Count | None
    read_ahead_batches: NonNegative
    verify: Verify
    on_bad_shard: OnBadShard
    cache_dir: str | None
    cache_bytes: Count

    def named_sources(self) -> dict[str, SourceSettings]:
        """Return the sources by name, in order; `paths` alone is one that is called text."""
        return dict(self.sources) or {"text": SourceSettings(paths=self.paths)}


class TokenizerKind(StrEnum):
    """Which tokenizer."""

    BPE = "bpe"
    FILE = "file"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """`tokenizer`: trained on the corpus, read from a `tokenizer.json`, or plain bytes.

    `path`: a tokenizer.json, a folder with one, or a name on the Hugging Face hub. `separator`: the
    token behind each document; null takes the tokenizer's own.
    """

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    kind: TokenizerKind
    path: str | None
    vocab_size: Annotated[int, Field(ge=257)]
    separator: str | None = None


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


def _none_or_several(value: int) -> int:
    if value < 0 or value == 1:
        raise ValueError("expected 0, or at least 2: one that is good and one that is to be")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSettings:
    """`checkpoint`: when to save, when to trust, what to keep."""

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    interval_steps: Count
    good_after_steps: Count
    keep_good: Annotated[int, Field(ge=2)]
    keep_incidents: NonNegative
    keep_snapshots: Annotated[int, AfterValidator(_none_or_several)]
    snapshot_interval_steps: Count | None
    save_at_start: bool
    save_at_end: bool

    @property
    def snapshot_steps(self) -> int:
        """How many steps lie between snapshots in memory."""
        return self.snapshot_interval_steps or self.interval_steps


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
class CallbackSettings:
    """`callbacks`: names of the callbacks that run; each is a module of `train/callbacks`."""

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    names: tuple[str, ...]


class ChaosKind(StrEnum):
    """Faults that can be put into a run on purpose."""

    NONE = "none"
    BAD_DATA = "bad_data"
    LR_SHOCK = "lr_shock"
    BIT_FLIP = "bit_flip"
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
    tracker: TrackerConfig
    callbacks: CallbackSettings
    chaos: ChaosSettings
    cluster: ClusterConfig
