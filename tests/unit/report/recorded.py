"""Writes a run's directory as `hvdlocal train` does, with numbers that are easy to check."""

import json
from pathlib import Path

import yaml

from hvdlocal.training.config import takes_local_steps

BUDGET_EPOCHS = 8.0
STEPS_PER_EPOCH = 100
BYTES_PER_AVERAGING = 1000
STEP_SECONDS = {"computing": 0.005, "averaging": 0.003, "waiting_for_data": 0.002, "evaluating": 0.0}


def write_run(
    directory: Path,
    preset="local-ada",
    *,
    workers=2,
    island_size=None,
    period=4,
    steps=800,
    finished=True,
    seed=0,
    task=None,
    hidden=None,
    **rule,
) -> Path:
    """A run at gain 1 whose step takes 10 ms, half of it computing; an evaluation each 100 steps.

    With islands, of which older runs say nothing, a fifth of the computing is a wait inside them. `hidden` is the time of a step
    for which averages are under way behind it, of which older runs say nothing either.
    """
    directory.mkdir(parents=True)
    rules = {
        "alpha": None,
        "h_base": None,
        "exponent": None,
        "switch_epochs": None,
        "max_period": None,
        "rate": "scaled",
    }
    config = {
        "data": {"path": "data/digits", "batch_size": 32},
        "model": {"name": "digits_cnn"},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "schedule": {"name": "cosine"},
        "output": str(directory),
        "epochs": BUDGET_EPOCHS,
        "method": {
            "preset": preset,
            "period": {"rule": "constant", "period": period, **rules, **rule},
            "accumulate": 1,
        },
        "seed": seed,
        "log_every_seconds": 1.0,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    ranks = {"ranks": workers} if island_size is None else {"ranks": workers * island_size, "island_size": island_size}
    (directory / "environment.json").write_text(json.dumps(ranks | ({"task": task} if task else {})))
    step_seconds = STEP_SECONDS
    if island_size is not None:
        step_seconds = STEP_SECONDS | {"computing": 0.004, "inside_islands": 0.001}
    if hidden is not None:
        step_seconds = step_seconds | {"hidden": hidden}
    local = takes_local_steps(preset)
    per_averaging = period if local else 1
    records = []
    for step in range(1, steps + 1):
        state = {
            "progress": float(step),
            "epoch": step / STEPS_PER_EPOCH,
            "data_epoch": 2 * step / STEPS_PER_EPOCH,
            "elapsed_seconds": step / 100,
            "bytes_sent": step // per_averaging * BYTES_PER_AVERAGING if workers > 1 else 0,
        }
        method = {
            "gain": 1.5,
            "lr": 0.1,
            "base_lr": 0.05,
            "period": period,
            "grad_sqr": 1.0,
            "grad_var": 2.0,
            "loss": 1 / step,
        }
        if local and step % period == 0:
            records.append(
                {"kind": "round", "step": step, "round": step // period, **state, **method, "divergence": 1e-3}
            )
        if step % 50 == 0:
            seconds = {f"{name}_seconds": step * each for name, each in step_seconds.items()}
            parallel = step * BYTES_PER_AVERAGING if workers > 1 else 0
            records.append(
                {"kind": "steps", "step": step, **state, **method, **seconds, "data_parallel_bytes": parallel}
            )
        if step % 100 == 0:
            scores = {"samples": 10, "loss": 1 / step, "accuracy": 1 - 10 / step, "top5": None}
            records.append({"kind": "evaluation", "step": step, **state, **scores})
    if finished:
        records.append(
            {
                "kind": "end",
                "step": steps,
                "steps": steps,
                "micro_batches": steps,
                "bytes_sent": records[-1]["bytes_sent"],
                "data_parallel_bytes": steps * BYTES_PER_AVERAGING if workers > 1 else 0,
                "seconds": {"elapsed": steps / 100, **{name: steps * each for name, each in step_seconds.items()}},
            }
        )
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory
