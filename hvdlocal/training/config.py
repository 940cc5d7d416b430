"""Everything a run can be told, as typed dataclasses; `hvdlocal train --help` is made from the texts below.

`budget`, `progress` and "scale-invariant epochs" are explained in docs/method.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

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
    buffers: Literal["average", "local", "reestimate"] = "average"
    """Batch-norm statistics."""
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


FREE_TO_CHANGE = (
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


def check_ranges(config: TrainConfig) -> None:
    """Refuses numbers that no run can have; what depends on the data or the ranks is checked where it is used.

    Raises:
        ValueError: naming the setting, its value and what it may be.
    """
    for name, value in leaves(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not abs(number) <= 1e30:  # NaN too; more would overflow float32
                raise ValueError(f"{name}={value}: must be a finite number")
            if type(number) is int and name != "seed" and abs(number) >= 2**31:
                raise ValueError(f"{name}={value}: must be below 2**31")
    data, optimizer, method = config.data, config.optimizer, config.method
    checkpoint, limit = config.checkpoint, config.time_limit_minutes
    every_steps, every_minutes = checkpoint.every_steps, checkpoint.every_minutes
    checks: list[tuple[str, Any, bool, str]] = [
        ("data.path", data.path, data.path != "", "name a directory"),
        ("output", config.output, config.output != "", "name a directory"),
        ("data.batch_size", data.batch_size, 0 < data.batch_size <= 2**20, "at least 1, at most 2**20"),
        ("data.crop_padding", data.crop_padding, 0 <= data.crop_padding <= 1024, "from 0 to 1024"),
        (
            "data.image_size",
            data.image_size,
            data.image_size is None or 0 < data.image_size <= 16384,
            "from 1 to 16384",
        ),
        ("data.min_area", data.min_area, data.min_area is None or 0 < data.min_area <= 1, "above 0, at most 1"),
        ("data.test_crop", data.test_crop, data.test_crop is None or 0 < data.test_crop <= 1, "above 0, at most 1"),
        ("data.randaugment_ops", data.randaugment_ops, 0 <= data.randaugment_ops <= 100, "from 0 to 100"),
        ("data.prefetch", data.prefetch, 0 < data.prefetch <= 1024, "at least 1, at most 1024"),
        ("data.threads", data.threads, data.threads is None or 0 < data.threads <= 1024, "at least 1, at most 1024"),
        ("optimizer.momentum", optimizer.momentum, 0 <= optimizer.momentum < 1, "from 0 to below 1"),
        ("optimizer.weight_decay", optimizer.weight_decay, optimizer.weight_decay >= 0, "must not be negative"),
        ("optimizer.betas", optimizer.betas, all(0 <= beta < 1 for beta in optimizer.betas), "each from 0 to below 1"),
        ("schedule.step_factor", config.schedule.step_factor, config.schedule.step_factor > 0, "must be positive"),
        ("method.accumulate", method.accumulate, 0 < method.accumulate <= 2**20, "at least 1, at most 2**20"),
        ("epochs", config.epochs, config.epochs > 0, "must be positive"),
        ("seed", config.seed, 0 <= config.seed < 2**62, "from 0 to below 2**62"),
        ("evaluate_every_epochs", config.evaluate_every_epochs, config.evaluate_every_epochs > 0, "must be positive"),
        (
            "evaluation_batch_size",
            config.evaluation_batch_size,
            0 < config.evaluation_batch_size <= 2**20,
            "at least 1, at most 2**20",
        ),
        ("log_every_seconds", config.log_every_seconds, config.log_every_seconds >= 0, "must not be negative"),
        ("label_smoothing", config.label_smoothing, 0 <= config.label_smoothing < 1, "from 0 to below 1"),
        ("threads", config.threads, config.threads is None or 0 < config.threads <= 1024, "at least 1, at most 1024"),
        ("optimizer.lr", optimizer.lr, optimizer.lr > 0, "must be positive"),
        (
            "method.reestimate_batches",
            method.reestimate_batches,
            0 < method.reestimate_batches <= 2**20,
            "at least 1, at most 2**20",
        ),
        ("checkpoint.every_steps", every_steps, every_steps is None or every_steps > 0, "at least 1"),
        ("checkpoint.every_minutes", every_minutes, every_minutes is None or every_minutes > 0, "must be positive"),
        (
            "checkpoint.every_minutes",
            every_minutes,
            every_minutes is None or every_steps is None,
            "give this or checkpoint.every_steps, not both",
        ),
        ("checkpoint.failure_hours", checkpoint.failure_hours, checkpoint.failure_hours > 0, "must be positive"),
        ("checkpoint.keep", checkpoint.keep, checkpoint.keep > 0, "at least 1"),
        ("time_limit_minutes", limit, limit is None or limit > 0, "must be positive"),
    ]
    for name, value, holds, rule in checks:
        if not holds:
            raise ValueError(f"{name}={value}: {rule}")


def unused_settings(config: TrainConfig) -> list[str]:
    """Settings that differ from their defaults and have no effect with the chosen preset, rule, optimizer and schedule.

    They are not refused: comparing two presets should take one changed word. They are said at the start of a run.
    """
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
        "method.reestimate_batches": method.buffers == "reestimate",
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
    default = {
        "data": DataConfig(path=""),
        "optimizer": OptimizerConfig(),
        "schedule": ScheduleConfig(),
        "method": MethodConfig(),
    }
    given, usual = leaves(config), leaves(default)
    return [
        f"{name}={given[name]}" for name, has_effect in used.items() if not has_effect and given[name] != usual[name]
    ]


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The settings of a configuration (or of a dictionary of configurations) by their dotted names."""
    named = tree if isinstance(tree, dict) else {f.name: getattr(tree, f.name) for f in fields(tree)}
    found: dict[str, Any] = {}
    for name, value in named.items():
        found |= leaves(value, f"{prefix}{name}.") if is_dataclass(value) else {prefix + name: value}
    return found
