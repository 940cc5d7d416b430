"""The studies: the papers' tables and figures as grids of workers, periods and methods, in the paper's setting or a small one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from hvdlocal.data.format.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class Setup:
    """Data, network and budget.

    Attributes:
        file: name of the configuration in experiments/.
        title: description for people.
        table: name of the published table with which results are compared; "" if none was published.
        published_epochs: the budget of that table's runs.
        is_published: whether this is exactly the setting of that table.
        measure: "accuracy" or "top5".
        chance_percent: the value of the measure for an untrained network.
        prepare: the command that prepares the data, without its --output.
    """

    file: str
    title: str
    table: str
    published_epochs: int
    is_published: bool
    measure: str
    chance_percent: float
    prepare: str

    @property
    def path(self) -> Path:
        """Path of the configuration.

        Raises:
            FileNotFoundError: the package was installed without it.
        """
        path = Path(str(resources.files("hvdlocal.papers"))) / "settings" / f"{self.file}.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"no {path}: hvdlocal is not installed completely")
        return path

    def require_data(self, path: str | Path, splits: Sequence[str]) -> None:
        """Checks that the data are prepared.

        Args:
            path: directory of the data set.
            splits: names of the splits that are needed.

        Raises:
            ValueError: a split is missing; the message gives the command that prepares it.
        """
        for split in splits:
            if not (Path(path) / split / MANIFEST_NAME).is_file():
                raise ValueError(
                    f"no data in {path}/{split}: {self.prepare} --output {path}, or name another directory with --data"
                )


SMALL = Setup(
    file="cifar10_small_cnn",
    title="a small network on 20,000 images of CIFAR-10, 16×16",
    table="cifar10",
    published_epochs=200,
    is_published=False,
    measure="accuracy",
    chance_percent=10.0,
    prepare="python -m data_prep cifar10 --source …/cifar-10-batches-bin --pool 2 --limit 20000",
)
SMALL_QSR = replace(SMALL, file="cifar10_small_qsr", table="", published_epochs=0)
CIFAR10 = Setup(
    file="cifar10_resnet18",
    title="ResNet-18 on CIFAR-10",
    table="cifar10",
    published_epochs=200,
    is_published=True,
    measure="accuracy",
    chance_percent=10.0,
    prepare="python -m data_prep cifar10 --source …/cifar-10-batches-bin",
)
IMAGENET32 = Setup(
    file="imagenet32_wrn_28_2",
    title="Wide-ResNet-28-2 on ImageNet-32",
    table="imagenet32",
    published_epochs=40,
    is_published=True,
    measure="top5",
    chance_percent=0.5,
    prepare="python -m data_prep imagenet32 --source …",
)
IMAGENET = Setup(
    file="imagenet_resnet50",
    title="ResNet-50 on ImageNet",
    table="imagenet",
    published_epochs=90,
    is_published=True,
    measure="top5",
    chance_percent=0.5,
    prepare="python -m data_prep imagenet --source …",
)


@dataclass(frozen=True)
class Method:
    """A method that is compared: a preset, run with every H of a grid, or a preset with its own rule for H.

    Attributes:
        name: the name in tables and on the command line.
        settings: arguments of `hvdlocal train`.
        directory: first part of the names of the runs' directories; equal for two studies that share runs.
    """

    name: str
    settings: tuple[str, ...]
    directory: str


def _preset(name: str) -> Method:
    return Method(name, (f"--method.preset={name}",), name)


def _weight(c: float) -> Method:
    directory = "local-ada" if c == 1 else f"local-ada-c{c:g}"
    return Method(f"c={c:g}", ("--method.preset=local-ada", f"--method.c={c}"), directory)


def _rule(name: str, *settings: str) -> Method:
    return Method(name, ("--method.preset=local", *settings), name)


BASELINE = Method("baseline", ("--method.preset=sync",), "baseline")
"""One worker, whose accuracy the methods should reach (Sec. 6.1)."""


@dataclass(frozen=True)
class Grid:
    """A setting with its values of K and H; without values of H, the methods have rules for it."""

    setting: Setup
    workers: tuple[int, ...]
    periods: tuple[int, ...]


@dataclass(frozen=True)
class Study:
    """A table or figure of the papers, or a question beside them.

    Attributes:
        name: the name on the command line.
        title: the title of the report.
        methods: the methods that are compared.
        paper: the grid in the paper's setting; None if there is none.
        small: the grid in the small setting; None if the small setting is not meaningful.
        baseline: one worker, which is run as well; None if one of the methods is the reference.
    """

    name: str
    title: str
    methods: tuple[Method, ...]
    paper: Grid | None
    small: Grid | None = None
    baseline: Method | None = BASELINE


_NO_RULE = ("--method.period.alpha=null", "--method.period.h_base=null")
_TABLE_METHODS = tuple(_preset(name) for name in ("acc-lin", "acc-ada", "local-lin", "local-ada"))
_RULES = (
    Method("sync", ("--method.preset=sync", "--method.period.rule=constant", *_NO_RULE), "sync"),
    _rule("constant", "--method.period.rule=constant", "--method.period.period=4", *_NO_RULE),
    _rule("inverse", "--method.period.rule=power", "--method.period.exponent=1", "--method.period.alpha=0.16"),
    _rule("qsr", "--method.period.rule=qsr", "--method.period.alpha=0.08"),
    _rule("cubic", "--method.period.rule=power", "--method.period.exponent=3", "--method.period.alpha=0.0635"),
    _rule(
        "post-local",
        "--method.period.rule=post-local",
        "--method.period.switch_epochs=20",
        "--method.period.period=16",
        *_NO_RULE,
    ),
)
"""H = 1, H_base, H ∝ 1/η, 1/η², 1/η³, post-local; the coefficients let all rules reach H_base at the same η."""

_WORKERS, _PERIODS = (8, 16, 24), (2, 4, 8, 16, 32, 64)
_SMALL = Grid(SMALL, (8,), (2, 8, 32))

STUDIES = {
    study.name: study
    for study in (
        Study(
            name="table2",
            title="Table 2: accuracy and epochs, CIFAR-10",
            methods=_TABLE_METHODS,
            paper=Grid(CIFAR10, _WORKERS, _PERIODS),
            small=_SMALL,
        ),
        Study(
            name="table3",
            title="Table 3: accuracy and epochs, ImageNet-32",
            methods=_TABLE_METHODS,
            paper=Grid(IMAGENET32, _WORKERS, _PERIODS),
        ),
        Study(
            name="table4",
            title="Table 4: accuracy and epochs, ImageNet",
            methods=_TABLE_METHODS,
            paper=Grid(IMAGENET, _WORKERS, (2, 8, 32)),
        ),
        Study(
            name="fig9",
            title="Figs. 8 and 9: statistics from the round before, or fresh ones",
            methods=(_preset("local-ada"), _preset("local-ada-nostale")),
            paper=Grid(CIFAR10, _WORKERS, _PERIODS),
            small=_SMALL,
        ),
        Study(
            name="fig10",
            title="Fig. 10: the weight c of the local steps' bias (Eq. 49)",
            methods=tuple(_weight(c) for c in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
            paper=Grid(IMAGENET32, (16,), (16, 32)),
            small=Grid(SMALL, (8,), (8, 32)),
        ),
        Study(
            name="sketch",
            title="The statistics from a random projection of the gradient, or from the gradient itself",
            methods=(
                _preset("local-ada"),
                Method("exact", ("--method.preset=local-ada", "--method.statistics=exact"), "exact"),
            ),
            paper=Grid(CIFAR10, _WORKERS, _PERIODS),
            small=_SMALL,
        ),
        Study(
            name="qsr",
            title="Rules for H as the learning rate decays: accuracy, communication, sharpness",
            methods=_RULES,
            paper=None,
            small=Grid(SMALL_QSR, (8,), ()),
            baseline=None,
        ),
    )
}


@dataclass(frozen=True)
class GridPoint:
    """One run of a grid; `period` is None for the baseline and for methods with a rule."""

    method: Method
    workers: int
    period: int | None
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        period = "" if self.period is None else f"-H{self.period}"
        return f"{self.method.directory}-K{self.workers}{period}-seed{self.seed}"

    @property
    def place(self) -> tuple[str, int, int | None]:
        """Method, K and H, which identify a line of the table."""
        return self.method.name, self.workers, self.period

    @property
    def title(self) -> str:
        """Title for people."""
        period = "" if self.period is None else f" H={self.period}"
        return f"{self.method.name} K={self.workers}{period} seed={self.seed}"

    @property
    def settings(self) -> list[str]:
        """Arguments of `hvdlocal train`."""
        period = [] if self.period is None else [f"--method.period.period={self.period}"]
        return [*self.method.settings, *period, f"--seed={self.seed}"]


def grid_points(
    methods: Sequence[Method], workers: Sequence[int], periods: Sequence[int], seeds: Sequence[int]
) -> Iterator[GridPoint]:
    """Yields the runs in the order in which they are made: for each seed the baseline first, then the whole grid."""
    for seed in seeds:
        if BASELINE in methods:
            yield GridPoint(BASELINE, 1, None, seed)
        for num_workers in workers:
            for period in periods or (None,):
                for method in methods:
                    if method is not BASELINE:
                        yield GridPoint(method, num_workers, period, seed)
