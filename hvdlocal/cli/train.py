"""`hvdlocal train CONFIG.yaml [--section.key value …]`: trains a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hvdlocal.cli.configuration import parse
from hvdlocal.exit_codes import ExitCode
from hvdlocal.figures.units import bytes_text, metric_text
from hvdlocal.training import interruption

if TYPE_CHECKING:
    from hvdlocal.training import Summary, TrainConfig
    from hvdlocal.training.tasks import Task


def run(arguments: Sequence[str]) -> int:
    """Trains on all ranks; rank 0 prints the summary.

    Returns:
        FINISHED, or INTERRUPTED if the run was asked to stop.
    """
    config = parse(arguments)
    from hvdlocal.training import AlreadyFinished, Interrupted, Trainer  # loads torch
    from hvdlocal.training.joining import join

    communicator = join(config)
    try:
        trainer = Trainer(config, communicator)
        summary = trainer.run()
    except (AlreadyFinished, Interrupted) as reason:
        interruption.announce_end(communicator, str(reason))
        return ExitCode.INTERRUPTED if isinstance(reason, Interrupted) else ExitCode.FINISHED
    interruption.announce_end(communicator, render(summary, config, trainer.session.task, communicator.job_size))
    return ExitCode.FINISHED


def render(summary: Summary, config: TrainConfig, task: Task, ranks: int) -> str:
    """Formats the summary as text."""
    from hvdlocal.training.evaluation import described

    evaluation, seconds = summary.evaluation, summary.seconds
    if config.method.is_local:
        taken = f"{summary.steps} local steps in {summary.rounds} rounds"
    else:
        taken = f"{summary.steps} steps ({summary.micro_batches} micro-batches per rank)"
    best = ""
    if summary.best_value is not None:
        best = f"; best {summary.best_metric} {metric_text(summary.best_value, summary.best_metric in task.percent)}"
    islands = f" in islands of {summary.facts.island_size}" if summary.facts.island_size > 1 else ""
    lost = f", of which {len(summary.ranks_lost)} died" if summary.ranks_lost else ""
    lines = [
        "",
        f"{config.method.preset} on {ranks} rank{'s' if ranks > 1 else ''}{islands}{lost}",
        f"  test            {described(evaluation, task)}  ({evaluation.samples} samples{best})",
        f"  training        {taken}; {summary.data_epochs:.1f} epochs of data for "
        f"{summary.scale_invariant_epochs:.1f} scale-invariant epochs (mean gain {summary.progress / summary.steps:.2f})",
    ]
    if ranks > 1:
        saved = max(summary.communication_saved, 0)
        lines.append(
            f"  communication   {summary.collectives} collectives, {summary.bytes_sent / 1e6:.1f} MB per rank; data parallelism "
            f"at the same steps: {summary.data_parallel_bytes / 1e6:.1f} MB (saved {100 * saved:.1f} %)"
        )
    if islands:
        lines.append(f"  inside islands  {summary.island_bytes_sent / 1e6:.1f} MB per rank")
    parts = [name for name in seconds if name not in ("elapsed", "hidden")]
    spent = ", ".join(f"{name.replace('_', ' ')} {seconds[name]:.1f}" for name in parts)
    hidden = f"; averages hidden behind steps {seconds['hidden']:.1f}" if config.method.overlap else ""
    lines.append(f"  time            {seconds['elapsed']:.1f} s: {spent}{hidden}")
    memory = ", ".join(
        f"{bytes_text(value)} {where}"
        for where, name in (("per rank", "peak_memory_bytes"), ("on the GPU", "peak_gpu_memory_bytes"))
        if (value := summary.memory[name]) is not None
    )
    lines.append(f"  speed           {summary.samples_per_second:,.0f} samples/s on all ranks; at most {memory}")
    lines.append(
        f"  files           {config.output}/ (config.yaml, environment.json, metrics.jsonl, summary.json, model.pt, best.pt)"
    )
    return "\n".join(lines)
