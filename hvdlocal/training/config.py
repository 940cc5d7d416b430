"""The settings of a run, each with its type, default, text and facts. A new setting is entered here and where it is used.

`hvdlocal train --help` shows the texts and ranges; `config_checks` applies the facts, which `settings` explains.

`budget`, `progress` and "scale-invariant epochs" are explained in docs/method.md.
"""

from __future__ import annotations  # without it, jsonargparse would show the facts as parts of the types

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal

from hvdlocal.training.settings import LARGE, Affects, Arguments, Named, NeededBy, Range, UsedIf, settings_of

Preset = Literal[
    "sync", "local", "acc-lin", "acc-ada", "local-lin", "local-ada", "local-ada-nostale", "diloco", "slowmo"
]

OUTER_OF_PRESET = {"diloco": "nesterov", "slowmo": "slowmo"}
"""The presets that are local steps with an outer optimizer, and its name."""

COUNT = Range(1, 2**31 - 1)
BATCH = Range(1, 2**20)
THREADS = Range(1, 1024)
POSITIVE = Range(0, LARGE, above=True)
NOT_NEGATIVE = Range(0, LARGE)
SHARE = Range(0, 1, below=True)
POSITIVE_SHARE = Range(0, 1, above=True)

EXECUTION, RECORDS = Affects.EXECUTION, Affects.RECORDS
WITH_PERIOD = ("constant", "post-local", "adacomm")

RESIZED = UsedIf(lambda run: run.data.image_size is not None)
RANDAUGMENT = UsedIf(lambda run: run.data.randaugment > 0)
IN_MEMORY = UsedIf(lambda run: run.data.storage in ("auto", "ram"))
OWN_FILES = UsedIf(lambda run: run.data.inputs is not None)
SHARDS = UsedIf(lambda run: run.data.inputs is None)
CLASSES = UsedIf(lambda run: run.task == "image-classification")
OWN_OPTIMIZER = UsedIf(lambda run: ":" in run.optimizer.name)
OWN_SCHEDULE = UsedIf(lambda run: ":" in run.schedule.name)
OWN_TRANSFORM = UsedIf(lambda run: run.data.transform is not None)
NAMED_OPTIMIZER = UsedIf(lambda run: ":" not in run.optimizer.name)
SGD = UsedIf(lambda run: run.optimizer.name == "sgd")
ADAMW = UsedIf(lambda run: run.optimizer.name == "adamw")
STEP = UsedIf(lambda run: run.schedule.name == "step")
FINAL_LR = UsedIf(lambda run: run.schedule.name in ("cosine", "linear") or run.schedule.warmup_epochs > 0)
LOCAL = UsedIf(lambda run: run.method.is_local)
ADAPTIVE = UsedIf(lambda run: run.method.is_adaptive)
LINEAR = UsedIf(lambda run: run.method.preset.endswith("-lin"))
NOT_ACCUMULATED = UsedIf(lambda run: not run.method.accumulates)
REESTIMATE = UsedIf(lambda run: "reestimate" in run.method.buffer_policies)
SKETCH = UsedIf(lambda run: run.method.statistics == "sketch")
POWERS = UsedIf(lambda run: run.method.period.rule in ("qsr", "power"))
OUTER = UsedIf(lambda run: run.method.outer_optimizer != "none")
ISLANDS = UsedIf(lambda run: run.method.island != 1)
PERIOD = UsedIf(lambda run: run.method.accumulates or (run.method.is_local and run.method.period.rule in WITH_PERIOD))


def takes_local_steps(preset: str) -> bool:
    """Whether a preset averages replicas after local steps; else it averages gradients."""
    return preset != "sync" and not preset.startswith("acc-")


def needed_by_rule(*rules: str) -> NeededBy:
    """The fact that these rules for H need a setting, and the others refuse it."""
    return NeededBy(lambda run: run.method.is_local and run.method.period.rule in rules, rules)


@dataclass
class DataConfig:
    """The training samples."""

    path: Annotated[str, EXECUTION]
    """Directory of a data set in hvdlocal's format (python -m data_prep …); or, with inputs and targets, an HDF5 or .npz file of
    your own, or several by a pattern such as fields/*.h5."""
    train_split: Annotated[str, SHARDS] = "train"
    """Name of the training samples in the data set."""
    test_split: Annotated[str, SHARDS] = "test"
    """Name of the test samples in the data set."""
    inputs: str | None = None
    """Names of the arrays of inputs in your own file, separated by commas: x, or fields/density,fields/velocity."""
    targets: str | None = None
    """Names of the arrays of targets in your own file, separated by commas."""
    holdout: Annotated[float | None, Range(0, 1, above=True, below=True), OWN_FILES] = None
    """Share of your own file that is tested on, the same samples in every run; by default 0.1, without test_path."""
    test_path: Annotated[str | None, OWN_FILES] = None
    """Your own file of test samples, in arrays of the same names."""
    block: Annotated[int | None, COUNT, SHARDS] = None
    """Tokens of a sequence, for a data set of tokens; by default as many as it was prepared for."""
    batch_size: Annotated[int, BATCH] = 128
    """B: images per rank and micro-batch."""
    crop_padding: Annotated[int, Range(0, 1024)] = 0
    """Crop each training image at random after adding this number of black pixels on every side; 0 for no crop."""
    flip: bool = False
    """Mirror half of the training images, chosen at random, left to right."""
    image_size: Annotated[int | None, Range(1, 16384)] = None
    """Height and width in pixels that images are brought to: training images by a random resized crop, test images by resizing
    and a central crop. Needed for JPEGs; images of one size are left as they are by default."""
    min_area: Annotated[float | None, POSITIVE_SHARE, RESIZED] = None
    """Smallest share of an image that a random resized crop keeps; by default 0.08 if most training images are larger than
    image_size on their shorter side, else 0.25."""
    test_crop: Annotated[float | None, POSITIVE_SHARE, RESIZED] = None
    """Share of the side of a resized test image that its central crop keeps; by default 0.875 (224 of 256 pixels) if most test
    images are larger than image_size on their shorter side, else 1."""
    randaugment: Annotated[int, Range(0, 30)] = 0
    """Magnitude of RandAugment, 1 to 30; 0 for none."""
    randaugment_ops: Annotated[int, Range(0, 100), RANDAUGMENT] = 2
    """RandAugment's operations per image."""
    mixup: Annotated[float, Range(0, 1000)] = 0.0
    """α of MixUp; 0 for none."""
    order: Literal["auto", "global", "block", "replacement"] = "auto"
    """Order of the samples in an epoch: a permutation, one of blocks (for streamed data), or independent draws."""
    tail: Literal["carry", "partial", "drop"] = "carry"
    """What happens to samples that do not fill a batch of all ranks: carried into the next epoch, a smaller batch, or dropped."""
    storage: Annotated[Literal["auto", "ram", "mmap", "stream"], EXECUTION] = "auto"
    """Where the training samples are while they are used: one copy per node in memory, mapped files, or read block by block."""
    share: Annotated[Literal["node", "job"], EXECUTION, IN_MEMORY] = "node"
    """Who fills the memory of a node with `ram`: the node itself, or one reader per job that broadcasts."""
    prefetch: Annotated[int, Range(1, 1024), EXECUTION] = 2
    """Batches prepared ahead."""
    threads: Annotated[int | None, THREADS, EXECUTION] = None
    """Background threads that read, decode and augment; by default the cores of a rank less one."""
    transform: str | None = None
    """Your own transform of the training inputs, by import path: package.module:Class."""
    transform_arguments: Annotated[Arguments, OWN_TRANSFORM] = field(default_factory=dict)
    """The arguments of your own transform."""


@dataclass
class ModelConfig:
    """The network."""

    name: str
    """One of digits_cnn, small_cnn, resnet9, resnet9_narrow, resnet18_cifar, wrn_28_2, resnet50, resnet152, vit_b_16; for the
    task language-model, gpt; or the import path of a function or class that builds a torch.nn.Module: package.module:name."""
    channels_last: Annotated[bool, EXECUTION] = False
    """Keep convolutions in NHWC memory format."""
    compile: Annotated[bool, EXECUTION] = False
    """Compile the forward pass with torch.compile."""
    arguments: Arguments = field(default_factory=dict)
    """The arguments that the model is built with."""


@dataclass
class OptimizerConfig:
    """What each rank steps with."""

    name: str = "sgd"
    """The optimizer: sgd or adamw of torch, or the import path of a class or function that is called with the model's parameters
    and lr, such as torch.optim:Adam."""
    lr: Annotated[float, POSITIVE] = 0.1
    """γ, the base learning rate at its peak."""
    momentum: Annotated[float, SHARE, SGD] = 0.9
    """Momentum of SGD."""
    nesterov: Annotated[bool, SGD] = False
    """Whether SGD's momentum is Nesterov's."""
    betas: Annotated[tuple[float, float], SHARE, ADAMW] = (0.9, 0.999)
    """Decay of AdamW's two moving averages."""
    weight_decay: Annotated[float, NOT_NEGATIVE, NAMED_OPTIMIZER] = 0.0
    """The optimizer's weight decay: SGD adds it to the gradient, AdamW decouples it."""
    max_norm: Annotated[float | None, POSITIVE] = None
    """Clip the gradient of every optimizer step to this norm."""
    arguments: Annotated[Arguments, OWN_OPTIMIZER] = field(default_factory=dict)
    """The further arguments of an optimizer by import path."""


@dataclass
class ScheduleConfig:
    """The base learning rate γ(s) as a function of the run's progress s, measured in scale-invariant epochs."""

    name: str = "cosine"
    """How γ goes on after the warm-up: constant, cosine, linear or step; or the import path of a function that returns γ and is
    called with epoch, epochs and lr."""
    warmup_epochs: Annotated[float, NOT_NEGATIVE] = 0.0
    """Rise linearly from final_lr to lr first."""
    final_lr: Annotated[float, NOT_NEGATIVE, FINAL_LR] = 0.0
    """Where warm-up starts and where cosine and linear end."""
    step_epochs: Annotated[float | None, Range(1e-6, LARGE)] = None
    """With step: epochs between two multiplications of γ by step_factor."""
    step_factor: Annotated[float, POSITIVE_SHARE, STEP] = 0.1
    """With step: what γ is multiplied by."""
    arguments: Annotated[Arguments, OWN_SCHEDULE] = field(default_factory=dict)
    """The further arguments of a schedule by import path."""


@dataclass
class PeriodConfig:
    """H, the local steps between two averagings. For acc-lin and acc-ada: the micro-batches of one step."""

    rule: Annotated[Literal["constant", "qsr", "power", "post-local", "adacomm"], LOCAL] = "constant"
    """The rule for H; docs/method.md explains each."""
    period: Annotated[int, COUNT, PERIOD] = 8
    """H of constant and adacomm (its first), and of post-local after the switch."""
    alpha: Annotated[float | None, POSITIVE, needed_by_rule("qsr", "power")] = None
    """α of qsr, or the coefficient of power: H = max(h_base, ⌊(alpha/η)^exponent⌋)."""
    h_base: Annotated[int | None, COUNT, needed_by_rule("qsr", "power")] = None
    """Smallest H of qsr and power."""
    exponent: Annotated[float | None, Range(0, 100, above=True), needed_by_rule("power")] = None
    """Exponent of power; qsr is power with 2."""
    switch_epochs: Annotated[float | None, NOT_NEGATIVE, needed_by_rule("post-local")] = None
    """With post-local: scale-invariant epochs before local steps begin."""
    max_period: Annotated[int | None, COUNT, LOCAL] = None
    """Largest H; null for no limit."""
    rate: Annotated[Literal["scaled", "base"], LOCAL, POWERS] = "scaled"
    """The η that qsr and power see: the rate that is applied, or the base rate."""


@dataclass
class OuterConfig:
    """The outer optimizer, which steps from where a round began in the direction of the mean of its replicas."""

    name: Annotated[Literal["none", "nesterov", "slowmo"] | None, LOCAL] = None
    """nesterov is DiLoCo's, slowmo a heavy ball over steps divided by the rate; none lets every replica become the mean. By
    default the preset's: nesterov for diloco, slowmo for slowmo, else none."""
    lr: Annotated[float | None, POSITIVE, LOCAL, OUTER] = None
    """Its learning rate; by default 0.7 for nesterov and 1 for slowmo."""
    momentum: Annotated[float | None, SHARE, LOCAL, OUTER] = None
    """Its momentum; by default 0.5 for nesterov, and for slowmo what suits K: 0 below 4 workers, 0.2 from 4, 0.5 from 8, 0.6 from
    16 on."""
    normalize: Annotated[bool | None, LOCAL, OUTER] = None
    """Whether the difference on which it steps is divided by the sum of the round's rates, as it should be where H or the rate
    changes; by default true for slowmo and false for nesterov."""


@dataclass
class MethodConfig:
    """How the ranks work together."""

    preset: Preset = "local-ada"
    """sync is data parallelism, local is Local SGD without scaling, diloco and slowmo are the same with an outer optimizer; the
    others are the methods of Balles et al."""
    period: PeriodConfig = field(default_factory=PeriodConfig)
    accumulate: Annotated[int, BATCH, NOT_ACCUMULATED] = 1
    """Micro-batches per optimizer step, for sync and the local presets."""
    momentum: Annotated[Literal["local", "average", "reset"] | dict[str, int], LOCAL] = "local"
    """What becomes of the optimizer's moments at an averaging: each rank keeps its own, they are averaged, or set to 0. Or a
    mapping of moments to n, each averaged in every n-th round: {exp_avg: 3, exp_avg_sq: 6}; others are each rank's own."""
    buffers: str | dict[str, str] = "average"
    """Batch-norm statistics: average, local or reestimate; every other buffer is each rank's own. Or a mapping of names of
    buffers or modules, with * for any part of them, to these three."""
    reestimate_batches: Annotated[int, BATCH, REESTIMATE] = 16
    """Batches per rank before an evaluation, with buffers: reestimate."""
    statistics: Annotated[Literal["sketch", "exact"], LOCAL, ADAPTIVE] = "sketch"
    """What local-ada sends to estimate the gradient's norm: a projection, or the gradient."""
    sketch_size: Annotated[int | None, Range(16, 2**31 - 1), LOCAL, ADAPTIVE, SKETCH] = None
    """Length of the projection; by default a 64th of the parameters, between 1,024 and 16,384."""
    c: Annotated[float, NOT_NEGATIVE, LOCAL, ADAPTIVE] = 1.0
    """Weight of the local steps' bias in local-ada's gain; 0 is AdaScale's gain."""
    smoothing: Annotated[float | None, SHARE, ADAPTIVE] = None
    """θ of the statistics' moving averages; by default max(1 − M/1000, 0) for M micro-batches between two estimates."""
    linear_warmup: Annotated[float, SHARE, LINEAR] = 0.05
    """Share of the budget over which acc-lin and local-lin raise the gain from 1."""
    island: Annotated[Literal["node"] | int, COUNT, EXECUTION, LOCAL] = 1
    """Ranks that are one worker of the local presets, averaging their gradients at every step: those of a node, or a number that
    divides them, or those of several whole nodes; 1 for no islands."""
    island_period: Annotated[int, COUNT, EXECUTION, LOCAL, ISLANDS] = 1
    """Steps between two averages of the parameters inside an island; 1 averages gradients instead. For presets without
    statistics."""
    outer: OuterConfig = field(default_factory=OuterConfig)
    overlap: Annotated[int, Range(0, 2**31 - 1), LOCAL] = 0
    """τ: steps that are taken while an average is under way, before it is applied; 0 waits for it."""
    mixing: Annotated[float | None, SHARE, LOCAL] = None
    """α: with overlap, the replica becomes α · itself + (1 − α) · the average; by default the steps taken meanwhile are carried
    over to the average."""

    @property
    def is_local(self) -> bool:
        """Whether ranks take local steps between two averagings."""
        return takes_local_steps(self.preset)

    @property
    def is_adaptive(self) -> bool:
        """Whether the gain comes from gradient statistics."""
        return "-ada" in self.preset

    @property
    def accumulates(self) -> bool:
        """Whether `period` counts the micro-batches of one step (acc-lin, acc-ada)."""
        return self.preset.startswith("acc-")

    @property
    def outer_optimizer(self) -> str:
        """The outer optimizer, or "none"."""
        return self.outer.name or OUTER_OF_PRESET.get(self.preset, "none")

    @property
    def moment_periods(self) -> dict[str, int]:
        """The rounds between two averagings of each moment that `momentum` names."""
        return self.momentum if isinstance(self.momentum, dict) else {}

    @property
    def buffer_policies(self) -> tuple[str, ...]:
        """What `buffers` names: policies for all or some of the model's buffers."""
        return tuple(self.buffers.values()) if isinstance(self.buffers, dict) else (self.buffers,)


@dataclass
class CheckpointConfig:
    """What a run keeps so that, interrupted, it goes on as if nothing had happened."""

    every_steps: Annotated[int | None, COUNT, RECORDS] = None
    """Optimizer steps between two checkpoints."""
    every_minutes: Annotated[float | None, POSITIVE, RECORDS] = None
    """Minutes between two checkpoints, in place of every_steps. With neither, Young's √(2 · cost of a checkpoint · time between
    failures), from the measured cost."""
    failure_hours: Annotated[float, POSITIVE, RECORDS] = 24.0
    """Mean time between failures of the whole job, for Young's rule."""
    keep: Annotated[int, COUNT, RECORDS] = 2
    """Checkpoints to keep; older ones are removed."""


@dataclass
class TrainConfig:
    """One training run."""

    data: DataConfig
    model: ModelConfig
    output: Annotated[str, RECORDS]
    """Directory for everything that the run writes."""
    epochs: Annotated[float, POSITIVE] = 10.0
    """Passes over the data at gain 1: the budget in scale-invariant epochs."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    seed: Annotated[int, Range(0, 2**62, below=True)] = 0
    """Seed of the initial weights, the order of the images and their augmentation."""
    label_smoothing: Annotated[float, SHARE, CLASSES] = 0.0
    """Share of each label that is spread over all classes in the training loss."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the forward pass (autocast); parameters stay float32."""
    evaluate_every_epochs: Annotated[float, POSITIVE] = 1.0
    """Scale-invariant epochs between evaluations, each at the first averaging that is due."""
    evaluation_batch_size: Annotated[int, BATCH, EXECUTION] = 500
    """Test images per rank and batch."""
    log_every_seconds: Annotated[float, NOT_NEGATIVE, RECORDS] = 10.0
    """Time between two lines on the terminal and in metrics.jsonl."""
    device: Annotated[Literal["auto", "cpu", "cuda"], EXECUTION] = "auto"
    """Where each rank computes; auto is CUDA if there is a GPU."""
    threads: Annotated[int | None, THREADS, EXECUTION] = None
    """CPU threads of a rank; by default OMP_NUM_THREADS, else the cores of the node divided by its ranks."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    survive: Annotated[bool, EXECUTION] = False
    """Go on without ranks that die, with engine mpi4py under mpirun --with-ft ulfm; docs/survive.md has what it needs."""
    min_workers: Annotated[int, COUNT, EXECUTION] = 1
    """With survive: the fewest ranks, or islands, that go on; fewer leave with a checkpoint and exit code 85."""
    time_limit_minutes: Annotated[float | None, POSITIVE, RECORDS] = None
    """Minutes after the start at which the run leaves with a checkpoint and exit code 85. The end of a Slurm job is known without
    it."""
    callbacks: Annotated[Named, RECORDS] = field(default_factory=list)
    """What the run calls at its events: tensorboard, wandb, mlflow, trackio, or your own class as package.module:Class. One with
    arguments is a mapping, {name: …, arguments: {…}}."""
    tensorboard: Annotated[bool, RECORDS] = False
    """The same as tensorboard among the callbacks: write event files for TensorBoard (pip install hvdlocal[tensorboard])."""
    overwrite: Annotated[bool, RECORDS] = False
    """Replace what an earlier run left in the output directory, instead of continuing it."""
    task: str = "image-classification"
    """What is learned: image-classification, language-model or regression, or your own subclass of hvdlocal.Task:
    package.module:Class."""
    task_arguments: Arguments = field(default_factory=dict)
    """The arguments of the task."""


SETTINGS = settings_of(TrainConfig)
"""Every setting by its dotted name."""


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The settings of a configuration by their dotted names.

    Args:
        tree: a `TrainConfig`, or what a config.yaml holds, which may have settings of another version.
        prefix: goes before each name.

    Raises:
        ValueError: the tree is neither.
    """
    if isinstance(tree, Mapping):
        named = dict(tree)
    elif is_dataclass(tree):
        named = {field.name: getattr(tree, field.name) for field in fields(tree)}
    else:
        raise ValueError("not a configuration")
    found: dict[str, Any] = {}
    for key, value in named.items():
        name = f"{prefix}{key}"
        is_section = is_dataclass(value) or (isinstance(value, Mapping) and name not in SETTINGS)
        found |= flatten(value, f"{name}.") if is_section else {name: value}
    return found
