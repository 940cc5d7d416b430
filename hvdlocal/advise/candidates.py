"""Steps that end in a collective, and collectives alone, which `measure` times in alternation. All of them are collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from hvdlocal.advise.arrivals import GradientArrivals
from hvdlocal.advise.benchmark import Benchmark
from hvdlocal.advise.cost_model import least_overlap
from hvdlocal.advise.measurements import IslandTimes, OverlapTimes, SampleSummary, StepTimes, SyncStepTimes
from hvdlocal.advise.overlap_trial import OverlapTrial
from hvdlocal.advise.ranks import slowest_mean, slowest_rank
from hvdlocal.averaging.buckets import BUCKET_BYTES, BucketLayout
from hvdlocal.averaging.guards import renormalised_weights
from hvdlocal.averaging.islands import Islands
from hvdlocal.averaging.synchronous import NUM_SCALARS
from hvdlocal.plan.overlap import BucketArrival
from hvdlocal.training.config import MethodConfig, OuterConfig, Preset
from hvdlocal.training.step import TrainingStep

LONGEST_OVERLAP = 32
"""The most steps that are measured beside an average; a longer one is partly waited for."""


class Candidate:
    """Steps on gradients that are there already, with a replica of its own.

    Args:
        bench: the shared parts.
        method: whose steps all end in a collective.

    Attributes:
        bytes: that a rank contributes to the collectives of a step; 0 before the first trial.
    """

    def __init__(self, bench: Benchmark, method: MethodConfig) -> None:
        self.bytes = 0
        self._bench = bench
        self._optimizer = bench.optimizer(method, overlapped=False)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0  # the same work, but the model does not change
        self._gradients = [(p, torch.randn_like(p).mul_(1e-3)) for p in bench.parameters(self._optimizer)]
        self._samples: list[tuple[float, float]] = []
        self._collect: list[float] = []

    def trial(self) -> None:
        """Times one step; with accumulation, a step of two micro-batches."""
        optimizer, communicator = self._optimizer, self._bench.session.communicator
        for _ in range(optimizer.accumulate - 1):
            self._collect.append(self._step())
        self._bench.begin_together()
        averaging, sent = optimizer.seconds_averaging, communicator.traffic.bytes
        step = self._step()
        self._samples.append((step, optimizer.seconds_averaging - averaging))
        self.bytes = communicator.traffic.bytes - sent

    def take(self) -> SyncStepTimes:
        """Returns the measurements since the last call."""
        communicator = self._bench.session.communicator
        step, collective = map(SampleSummary.of, slowest_rank(communicator, self._samples))
        collect = slowest_mean(communicator, self._collect)
        self._samples, self._collect = [], []
        return SyncStepTimes(self.bytes, step, collective, collect)

    def _step(self) -> float:
        for p, gradient in self._gradients:
            p.grad = gradient
        return self._bench.seconds(self._optimizer.step)


class OverlappedCandidate:
    """Steps of data parallelism whose sums overlap with a real backward pass, with a replica of its own.

    A step has two micro-batches, of which the first is collected without a sum: its backward pass is the one without overlap.

    Args:
        bench: the shared parts.
        preset: the method, acc-lin or acc-ada.
    """

    def __init__(self, bench: Benchmark, preset: Preset) -> None:
        self.bytes = 0
        self._bench = bench
        self._optimizer = bench.optimizer(bench.method(preset, 2))
        self._step = TrainingStep(bench.session, self._optimizer, lambda progress: 0.0)
        self._arrivals = GradientArrivals(bench.parameters(self._optimizer))
        self._samples: list[tuple[float, float]] = []
        self._collect: list[float] = []

    def trial(self) -> None:
        """Times a step of two micro-batches."""
        bench, step, traffic = self._bench, self._step, self._bench.session.communicator.traffic
        loss = self._forward()
        alone = bench.seconds(lambda: self._arrivals.watch(lambda: step.backward(loss)))
        self._collect.append(bench.seconds(step.update))
        loss = self._forward()
        sent = traffic.bytes

        def both() -> None:
            step.backward(loss)
            step.update()

        self._samples.append((alone, bench.seconds(both)))
        self.bytes = traffic.bytes - sent

    def take(self) -> SyncStepTimes:
        """Returns the measurements since the last call."""
        communicator = self._bench.session.communicator
        alone, both = slowest_rank(communicator, self._samples)
        collect = slowest_mean(communicator, self._collect)
        self._samples, self._collect = [], []
        beyond = [together - backward for backward, together in zip(alone, both, strict=True)]
        return SyncStepTimes(self.bytes, SampleSummary.of(beyond), SampleSummary.of([]), collect)

    def buckets(self) -> list[BucketArrival]:
        """Returns the buckets of this rank's gradients."""
        layout = BucketLayout(self._bench.parameters(self._optimizer), NUM_SCALARS, BUCKET_BYTES)
        return self._arrivals.of(layout.buckets)

    def _forward(self) -> torch.Tensor:
        loss, _ = self._step.loss(next(self._bench.batches))
        self._bench.synchronize_device()
        self._bench.begin_together()
        return loss


class IslandCandidate:
    """The collectives of islands of n ranks, on tensors without a model.

    Args:
        bench: the shared parts.
        island: n, from 1 to all ranks.
        gradient: a tensor of the gradient's length.
        message: a tensor of the length of what a round's average sends.
    """

    def __init__(self, bench: Benchmark, island: int, gradient: torch.Tensor, message: torch.Tensor) -> None:
        self._bench = bench
        whole, job = bench.session.communicator, bench.divided(island)
        number = torch.zeros(1, dtype=torch.float32, device=gradient.device)
        self._work: dict[str, Callable[[], None]] = {}
        if island > 1:
            inside = job.island or whole
            self._work["latency"] = lambda: inside.sum_(number, f"hvdlocal.latency.{island}")
            self._work["gradient"] = lambda: inside.sum_(gradient, f"hvdlocal.gradient.{island}")
        if island == 1:
            self._work["average"] = lambda: whole.sum_(message, "hvdlocal.message")
        elif job.island and job.peers and job.peers.size > 1:
            islands = Islands(job.island, job.peers, diverge=False)
            cut = message[: len(message) // island * island]

            def average() -> None:
                islands.inside.sum_(cut[len(gradient) :], "hvdlocal.own")  # what every rank has of its own: statistics
                islands.start_sum_(cut, f"hvdlocal.message.{island}")()

            self._work["average"] = average
        self._samples: dict[str, list[float]] = {part: [] for part in self._work}

    def trial(self) -> None:
        """Times each collective once."""
        for part, work in self._work.items():
            self._bench.begin_together()
            self._samples[part].append(self._bench.seconds(work))

    def take(self) -> IslandTimes:
        """Returns the measurements since the last call."""
        communicator = self._bench.session.communicator
        found = dict.fromkeys(("latency", "gradient", "average"), SampleSummary.of([]))
        for part, samples in self._samples.items():
            (slowest,) = slowest_rank(communicator, [(seconds,) for seconds in samples])
            found[part] = SampleSummary.of(slowest)
            samples.clear()
        return IslandTimes(**found)


class Candidates:
    """All steps and collectives that `measure` times beside training.

    Args:
        bench: the shared parts; of two ranks or more.
    """

    def __init__(self, bench: Benchmark) -> None:
        self._bench = bench
        self._communicator = bench.session.communicator
        method = bench.session.config.method
        self._steps: dict[str, Candidate | OverlappedCandidate] = {
            # One per distinct payload: sync has acc-lin's, local has local-lin's.
            "acc-lin": Candidate(bench, bench.method("acc-lin", 2)),
            "acc-ada": Candidate(bench, bench.method("acc-ada", 2)),
            "acc-lin overlapped": OverlappedCandidate(bench, "acc-lin"),
            "acc-ada overlapped": OverlappedCandidate(bench, "acc-ada"),
            "local-lin": Candidate(bench, bench.method("local-lin", 1)),
            "local-ada sketch": Candidate(bench, bench.method("local-ada", 1, "sketch")),
            "local-ada exact": Candidate(bench, bench.method("local-ada", 1, "exact")),
        }
        if not renormalised_weights(bench.session.model, bench.session.model.parameters()):  # else there is no common φ
            outer = bench.method("local-lin", 1, outer=OuterConfig("nesterov"))
            self._steps["local-lin outer"] = Candidate(bench, outer)
        if method.preset == "local-ada-nostale":
            self._steps["local-ada-nostale"] = Candidate(bench, bench.method("local-ada-nostale", 1))
        self._overlap: OverlapTrial | None = None
        averaging = self._steps[f"local-ada {method.statistics}"]
        averaging.trial()  # counts the bytes
        gradient, message = (
            torch.zeros(numel, dtype=torch.float32, device=bench.session.device)
            for numel in (bench.session.parameters, averaging.bytes // 4)
        )
        self._islands = {
            island: IslandCandidate(bench, island, gradient, message) for island in island_sizes(bench.nodes)
        }

    def trial(self) -> None:
        """Runs a trial of each."""
        for candidate in (*self._steps.values(), *self._islands.values()):
            candidate.trial()
        if self._overlap:
            self._overlap.trial()

    def take(self) -> tuple[dict[str, SyncStepTimes], dict[int, IslandTimes], OverlapTimes | None]:
        """Returns the measurements since the last call.

        Returns:
            The steps by name, the islands by their number of ranks, and after `with_overlap` the steps beside an average.
        """
        steps = {name: candidate.take() for name, candidate in self._steps.items()}
        islands = {island: candidate.take() for island, candidate in self._islands.items()}
        return steps, islands, self._overlap.take() if self._overlap else None

    def with_overlap(self, pace: StepTimes) -> None:
        """Adds steps beside an average, as many as it takes, and drops the measurements until now.

        Args:
            pace: this rank's times of local steps.
        """
        accumulate = self._bench.session.config.method.accumulate
        steps, _, _ = self.take()
        step = accumulate * pace.micro_batch.mean + pace.update.mean
        wish = least_overlap(steps["local-lin"].collective.mean, step)
        agreed = self._communicator.gather(wish, "hvdlocal.overlap")[0]
        self._overlap = OverlapTrial(self._bench, min(agreed, LONGEST_OVERLAP))

    def buckets(self) -> tuple[BucketArrival, ...]:
        """Returns the parts in which the gradient is summed, each ready when it is on the slowest rank."""
        overlapped = self._steps["acc-lin overlapped"]
        assert isinstance(overlapped, OverlappedCandidate)
        everyone = self._communicator.gather(overlapped.buckets(), "hvdlocal.buckets")
        return tuple(max(ranks, key=lambda bucket: bucket.ready) for ranks in zip(*everyone, strict=True))


def island_sizes(nodes: Sequence[str]) -> list[int]:
    """Returns the numbers of ranks that can form islands inside of the nodes, from 1, and that of all ranks.

    Args:
        nodes: the name of every rank's node.
    """
    counts = Counter(nodes).values()
    inside = [n for n in range(1, min(counts) + 1) if n < len(nodes) and all(count % n == 0 for count in counts)]
    return [*inside, len(nodes)]
