"""Everything a run can be told, as typed dataclasses; `hvdlocal train --help` is made from the texts below.

`budget`, `progress` and "scale-invariant epochs" are explained in docs/method.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

BUFFER_POLICIES = ("average", "local", "reestimate")
Preset = Literal["sync", "local", "acc-lin", "acc-ada", "local-lin", "local-ada", "local-ada-nostale"]


@dataclass
class DataConfig:
    """The training images."""

    path: str
    """Directory of a data set in hvdlocal's format (python -m data_prep …)."""
    train_split: str = "train"
    test_split: str = "test"
    batch_size: int = 128
    """B: images per rank and micro-batch."""
    crop_padding: int = 0
    """Crop each training image at random after adding so many black pixels on every side; 0 for no crop."""
    flip: bool = False
    """Mirror each training image left to right, or not, at random."""
    image_size: int | None = None
    """Bring images to so many pixels a side: training images by a random resized crop, test images by resizing and a central
    crop. Needed for JPEGs; images of one size are left as they are by default."""
    min_area: float | None = None
    """Smallest share of an image that a random resized crop keeps; by default 0.08 if most training images are larger than
    image_size on their shorter side, else 0.25."""
    test_crop: float | None = None
    """Share of the side of a resized test image that its central crop keeps; by default 0.875 (224 of 256 pixels) if most test
    images are larger than image_size on their shorter side, else 1."""
    randaugment: int = 0
    """Magnitude of RandAugment, 1 to 30; 0 for none."""
    randaugment_ops: int = 2
    """RandAugment's operations per image."""
    mixup: float = 0.0
    """α of MixUp; 0 for none."""
    order: Literal["auto", "global", "block", "replacement"] = "auto"
    """Of the images in an epoch: a permutation, one of blocks (for streamed data), or independent draws."""
    tail: Literal["carry", "partial", "drop"] = "carry"
    """What happens to images that do not fill a batch of all ranks: carried into the next epoch, a smaller batch, or dropped."""
    storage: Literal["auto", "ram", "mmap", "stream"] = "auto"
    """Where the training images are while they are used: one copy per node in memory, mapped files, or read block by block."""
    share: Literal["node", "job"] = "node"
    """Who fills the memory of a node with `ram`: the node itself, or one reader per job that broadcasts."""
    prefetch: int = 2
    """Batches prepared ahead."""
    threads: int | None = None
    """Background threads that read, decode and augment; by default the cores of a rank less one."""


@dataclass
class ModelConfig:
    """The network."""

    name: str
    """One of digits_cnn, small_cnn, resnet9, resnet9_narrow, resnet18_cifar, wrn_28_2, resnet50, resnet152, vit_b_16."""
    channels_last: bool = False
    """Keep convolutions in NHWC memory format."""
    compile: bool = False
    """Compile the forward pass with torch.compile."""


@dataclass
class OptimizerConfig:
    """What each rank steps with."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    """γ, the base learning rate at its peak."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = False
    """Of SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: float = 0.0
    max_norm: float | None = None
    """Clip the gradient of every optimizer step to this norm."""


@dataclass
class ScheduleConfig:
    """The base learning rate γ(s) as a function of the run's progress s, measured in scale-invariant epochs."""

    name: Literal["constant", "cosine", "linear", "step"] = "cosine"
    warmup_epochs: float = 0.0
    """Rise linearly from final_lr to lr first."""
    final_lr: float = 0.0
    """Where warm-up starts and where cosine and linear end."""
    step_epochs: float | None = None
    """Of step: multiply by step_factor every so many epochs."""
    step_factor: float = 0.1


@dataclass
class PeriodConfig:
    """H, the local steps between two averagings. For acc-lin and acc-ada: the micro-batches of one step."""

    rule: Literal["constant", "qsr", "power", "post-local", "adacomm"] = "constant"
    period: int = 8
    """H of constant and adacomm (its first), and of post-local after the switch."""
    alpha: float | None = None
    """α of qsr, or the coefficient of power: H = max(h_base, ⌊(alpha/η)^exponent⌋)."""
    h_base: int | None = None
    """Smallest H of qsr and power."""
    exponent: float | None = None
    """Of power."""
    switch_epochs: float | None = None
    """Of post-local: scale-invariant epochs before local steps begin."""
    max_period: int | None = None
    """H never exceeds it."""
    rate: Literal["scaled", "base"] = "scaled"
    """The η that qsr and power see: the rate that is applied, or the base rate."""


@dataclass
class MethodConfig:
    """How the ranks work together."""

    preset: Preset = "local-ada"
    """sync is data parallelism, local is Local SGD without scaling; the others are the methods of Balles et al."""
    period: PeriodConfig = field(default_factory=PeriodConfig)
    accumulate: int = 1
    """Micro-batches per optimizer step, for sync and the local presets."""
    momentum: Literal["local", "average", "reset"] = "local"
    """The optimizer's moments at an averaging."""
    buffers: str | dict[str, str] = "average"
    """Batch-norm statistics: average, local or reestimate; every other buffer is each rank's own. Or a mapping of names of
    buffers or modules, with * for any part of them, to these three."""
    reestimate_batches: int = 16
    """Batches per rank before an evaluation, with buffers: reestimate."""
    statistics: Literal["sketch", "exact"] = "sketch"
    """What local-ada sends to estimate the gradient's norm: a projection, or the gradient."""
    sketch_size: int | None = None
    """Length of the projection; by default a 64th of the parameters, between 1,024 and 16,384."""
    c: float = 1.0
    """Weight of the local steps' bias in local-ada's gain; 0 is AdaScale's gain."""
    smoothing: float | None = None
    """θ of the statistics' moving averages; by default max(1 − M/1000, 0) for M micro-batches between two estimates."""
    linear_warmup: float = 0.05
    """Share of the budget over which acc-lin and local-lin raise the gain from 1."""


@dataclass
class CheckpointConfig:
    """What a run keeps so that, interrupted, it goes on as if nothing had happened."""

    every_steps: int | None = None
    """Optimizer steps between two checkpoints."""
    every_minutes: float | None = None
    """Or minutes. With neither, Young's √(2 · cost of a checkpoint · time between failures), from the measured cost."""
    failure_hours: float = 24.0
    """Mean time between failures of the whole job, for Young's rule."""
    keep: int = 2
    """Checkpoints to keep; older ones are removed."""


@dataclass
class TrainConfig:
    """One training run."""

    data: DataConfig
    model: ModelConfig
    output: str
    """Directory for everything that the run writes."""
    epochs: float = 10.0
    """Passes over the data at gain 1: the budget in scale-invariant epochs."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    seed: int = 0
    """Of the initial weights, the order of the images and their augmentation."""
    label_smoothing: float = 0.0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the forward pass (autocast); parameters stay float32."""
    evaluate_every_epochs: float = 1.0
    """Scale-invariant epochs between evaluations, each at the first averaging that is due."""
    evaluation_batch_size: int = 500
    log_every_seconds: float = 10.0
    """Time between two lines on the terminal and in metrics.jsonl."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    """CPU threads of a rank; by default OMP_NUM_THREADS, else the cores of the node divided by its ranks."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    time_limit_minutes: float | None = None
    """Leave so long after the start, with a checkpoint and exit code 85. The end of a Slurm job is known without it."""
    tensorboard: bool = False
    """Also write event files for TensorBoard (pip install hvdlocal[tensorboard])."""
    overwrite: bool = False
    """Replace what an earlier run left in the output directory, instead of continuing it."""


RESUMABLE_SETTINGS = (
    "output",
    "data.path",
    "data.storage",
    "data.share",
    "data.prefetch",
    "data.threads",
    "model.channels_last",
    "model.compile",
    "evaluation_batch_size",
    "log_every_seconds",
    "device",
    "threads",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.failure_hours",
    "checkpoint.keep",
    "time_limit_minutes",
    "tensorboard",
    "overwrite",
)
"""Settings that may differ when a run is continued: where and how it runs, not what it computes."""


@dataclass(frozen=True)
class Range:
    """What a number may be: from `low` to `high`, either of which can be left out of it."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def holds(self, number: float) -> bool:
        """Whether it does; NaN never does."""
        over = number > self.low if self.above else number >= self.low
        return over and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        low, high = f"{self.low:,}", "1e30" if self.high == LARGE else f"{self.high:,}"
        if self.above:
            return f"{'positive' if self.low == 0 else f'above {low}'}, and at most {high}"
        return f"at least {low}, and below {high}" if self.below else f"from {low} to {high}"


LARGE = 1e30
"""Larger numbers would overflow float32 in a product."""
COUNT = Range(1, 2**31 - 1)
BATCH = Range(1, 2**20)
THREADS = Range(1, 1024)
POSITIVE = Range(0, LARGE, above=True)
NOT_NEGATIVE = Range(0, LARGE)
SHARE = Range(0, 1, below=True)

RANGES = {
    "data.batch_size": BATCH,
    "data.crop_padding": Range(0, 1024),
    "data.image_size": Range(1, 16384),
    "data.min_area": Range(0, 1, above=True),
    "data.test_crop": Range(0, 1, above=True),
    "data.randaugment": Range(0, 30),
    "data.randaugment_ops": Range(0, 100),
    "data.mixup": Range(0, 1000),
    "data.prefetch": Range(1, 1024),
    "data.threads": THREADS,
    "optimizer.lr": POSITIVE,
    "optimizer.momentum": SHARE,
    "optimizer.betas": SHARE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.max_norm": POSITIVE,
    "schedule.warmup_epochs": NOT_NEGATIVE,
    "schedule.final_lr": NOT_NEGATIVE,
    "schedule.step_epochs": Range(1e-6, LARGE),
    "schedule.step_factor": Range(0, 1, above=True),
    "method.period.period": COUNT,
    "method.period.alpha": POSITIVE,
    "method.period.h_base": COUNT,
    "method.period.exponent": Range(0, 100, above=True),
    "method.period.switch_epochs": NOT_NEGATIVE,
    "method.period.max_period": COUNT,
    "method.accumulate": BATCH,
    "method.reestimate_batches": BATCH,
    "method.sketch_size": Range(16, 2**31 - 1),
    "method.c": NOT_NEGATIVE,
    "method.smoothing": SHARE,
    "method.linear_warmup": SHARE,
    "epochs": POSITIVE,
    "seed": Range(0, 2**62, below=True),
    "label_smoothing": SHARE,
    "evaluate_every_epochs": POSITIVE,
    "evaluation_batch_size": BATCH,
    "log_every_seconds": NOT_NEGATIVE,
    "threads": THREADS,
    "checkpoint.every_steps": COUNT,
    "checkpoint.every_minutes": POSITIVE,
    "checkpoint.failure_hours": POSITIVE,
    "checkpoint.keep": COUNT,
    "time_limit_minutes": POSITIVE,
}
"""What each number may be, whether or not the chosen method uses it."""


def check_ranges(config: TrainConfig) -> None:
    """Refuses what no run can have; what depends on the data or the ranks is checked where it is used.

    Raises:
        ValueError: naming the setting, its value and what it may be.
    """
    for name, value in flatten(config).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if name in RANGES and value is not None and not all(map(RANGES[name].holds, numbers)):
            raise ValueError(f"{name}={value}: must be {RANGES[name]}")
    for name, path in (("data.path", config.data.path), ("output", config.output)):
        if not path:
            raise ValueError(f"{name}={path!r}: name a directory")
        if "\0" in path:
            raise ValueError(f"{name}={path!r}: a path has no zero byte")
    if not all(policy in BUFFER_POLICIES for policy in _buffer_policies(config.method)):
        choices = f"choose one of {', '.join(BUFFER_POLICIES)}, or a mapping of names to these"
        raise ValueError(f"method.buffers={config.method.buffers}: {choices}")
    checkpoint = config.checkpoint
    if checkpoint.every_steps is not None and checkpoint.every_minutes is not None:
        raise ValueError(
            f"checkpoint.every_minutes={checkpoint.every_minutes} and checkpoint.every_steps={checkpoint.every_steps}: give one "
            "of them"
        )


def _buffer_policies(method: MethodConfig) -> list[str]:
    return list(method.buffers.values()) if isinstance(method.buffers, dict) else [method.buffers]


def unused_settings(config: TrainConfig) -> list[str]:
    """Settings that differ from their defaults and have no effect with the chosen preset, rule, optimizer and schedule.

    They are not refused: comparing two presets should take one changed word. They are said at the start of a run.
    """
    default = {
        "data": DataConfig(path=""),
        "optimizer": OptimizerConfig(),
        "schedule": ScheduleConfig(),
        "method": MethodConfig(),
    }
    given, usual = flatten(config), flatten(default)
    return [f"{name}={given[name]}" for name in _without_effect(config) if given[name] != usual[name]]


def effective_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that have an effect in this run, by their dotted names: those that a continued run must share."""
    idle = _without_effect(config)
    return {name: value for name, value in flatten(config).items() if name not in idle}


def _without_effect(config: TrainConfig) -> list[str]:
    method, period = config.method, config.method.period
    local, adaptive = method.preset.startswith("local"), "-ada" in method.preset
    accumulates = method.preset.startswith("acc-")
    powers = local and period.rule in ("qsr", "power")
    used = {
        "optimizer.momentum": config.optimizer.name == "sgd",
        "optimizer.nesterov": config.optimizer.name == "sgd",
        "optimizer.betas": config.optimizer.name == "adamw",
        "schedule.step_factor": config.schedule.name == "step",
        "schedule.final_lr": config.schedule.name in ("cosine", "linear") or config.schedule.warmup_epochs > 0,
        "method.momentum": local,
        "method.period.rule": local,
        "method.period.period": accumulates or (local and period.rule in ("constant", "post-local", "adacomm")),
        "method.period.alpha": powers,
        "method.period.h_base": powers,
        "method.period.exponent": local and period.rule == "power",
        "method.period.switch_epochs": local and period.rule == "post-local",
        "method.period.max_period": local,
        "method.period.rate": powers,
        "method.accumulate": not accumulates,
        "method.reestimate_batches": "reestimate" in _buffer_policies(method),
        "method.statistics": local and adaptive,
        "method.sketch_size": local and adaptive and method.statistics == "sketch",
        "method.c": local and adaptive,
        "method.smoothing": adaptive,
        "method.linear_warmup": method.preset.endswith("-lin"),
        "data.min_area": config.data.image_size is not None,
        "data.test_crop": config.data.image_size is not None,
        "data.randaugment_ops": config.data.randaugment > 0,
        "data.share": config.data.storage in ("auto", "ram"),
    }
    return [name for name, has_effect in used.items() if not has_effect]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The settings of a configuration (or of a dictionary of configurations) by their dotted names."""
    named = tree if isinstance(tree, dict) else {f.name: getattr(tree, f.name) for f in fields(tree)}
    found: dict[str, Any] = {}
    for name, value in named.items():
        found |= flatten(value, f"{prefix}{name}.") if is_dataclass(value) else {prefix + name: value}
    return found
