"""Steps that end in a collective, and collectives alone, which `measure` times in alternation. All of them are collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from hvdlocal.advise.arrivals import GradientArrivals
from hvdlocal.advise.benchmark import Benchmark
from hvdlocal.advise.measurements import IslandTimes, SampleSummary, SyncStepTimes
from hvdlocal.averaging.buckets import BUCKET_BYTES, BucketLayout
from hvdlocal.averaging.islands import Islands
from hvdlocal.averaging.synchronous import NUM_SCALARS
from hvdlocal.communicator import Communicator
from hvdlocal.plan.overlap import BucketArrival
from hvdlocal.training.config import Preset
from hvdlocal.training.step import TrainingStep


class Candidate:
    """Steps on gradients that are there already, with a replica of its own.

    Args:
        bench: the shared parts.
        preset: the method.
        statistics: the statistics of local-ada.

    Attributes:
        bytes: that a rank contributes to the collectives of a step; 0 before the first trial.
    """

    def __init__(self, bench: Benchmark, preset: Preset, statistics: str = "sketch") -> None:
        self.bytes = 0
        self._bench = bench
        self._optimizer = bench.optimizer(preset, 2 if preset.startswith("acc") else 1, statistics, overlap=False)
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
        self._optimizer = bench.optimizer(preset, 2, "sketch", overlap=True)
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
        self._communicator = bench.session.communicator
        method = bench.session.config.method
        self._steps: dict[str, Candidate | OverlappedCandidate] = {
            # One per distinct payload: sync has acc-lin's, local has local-lin's.
            "acc-lin": Candidate(bench, "acc-lin"),
            "acc-ada": Candidate(bench, "acc-ada"),
            "acc-lin overlapped": OverlappedCandidate(bench, "acc-lin"),
            "acc-ada overlapped": OverlappedCandidate(bench, "acc-ada"),
            "local-lin": Candidate(bench, "local-lin"),
            "local-ada sketch": Candidate(bench, "local-ada"),
            "local-ada exact": Candidate(bench, "local-ada", "exact"),
        }
        if method.preset == "local-ada-nostale":
            self._steps["local-ada-nostale"] = Candidate(bench, "local-ada-nostale", method.statistics)
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

    def take(self) -> tuple[dict[str, SyncStepTimes], dict[int, IslandTimes]]:
        """Returns the measurements since the last call: of the steps by name, and of the islands by their number of ranks."""
        steps = {name: candidate.take() for name, candidate in self._steps.items()}
        return steps, {island: candidate.take() for island, candidate in self._islands.items()}

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


def slowest_rank(communicator: Communicator, samples: Sequence[tuple[float, ...]]) -> list[list[float]]:
    """Returns, for each of the times in a sample, the longest of all ranks in every trial; a collective."""
    everyone = communicator.gather(samples, "hvdlocal.samples")
    slowest = [tuple(map(max, zip(*ranks, strict=True))) for ranks in zip(*everyone, strict=True)]
    return [list(times) for times in zip(*slowest, strict=True)]


def slowest_mean(communicator: Communicator, samples: Sequence[float]) -> SampleSummary:
    """Returns the summary of the rank with the longest mean; a collective."""
    return max(communicator.gather(SampleSummary.of(samples), "hvdlocal.collect"), key=lambda one: one.mean)
