"""The report on rules for H: what counts as a difference, and the sharpness of a finished run."""

import math

import numpy as np
import pytest
import torch

import hvdlocal
from hvdlocal.cli.configuration import parse
from hvdlocal.models import build_model
from hvdlocal.papers import run_sharpness
from hvdlocal.papers.rule_report import TITLES, RuleReport, resolved
from hvdlocal.papers.runs import Outcome
from hvdlocal.papers.studies import STUDIES, GridPoint

STUDY = STUDIES["qsr"]


def shift(method, seed):
    """So that not all differences are the same."""
    return seed + (0.1 * (seed % 2) if method == "qsr" else 0)


def report(accuracies, largest=None):
    outcomes, sharpnesses = {}, {}
    for method in STUDY.methods:
        for seed, accuracy in enumerate(accuracies.get(method.name, [])):
            cell = GridPoint(method, 8, None, seed)
            if accuracy is None:
                outcomes[cell] = Outcome(10.0, None, None, diverged=True)
                continue
            outcomes[cell] = Outcome(accuracy, 40.0, 1.0, communication=0.16)
            sharpnesses[cell] = run_sharpness.RunSharpness(
                0.5, (largest or {}).get(method.name, 10.0) + shift(method.name, seed), 100.0, 1.0, 2500
            )
    return RuleReport(STUDY, STUDY.small.setting, 40, outcomes, sharpnesses, 18)


def test_a_difference_counts_when_students_t_resolves_it():
    """The quantile of 97.5 % is 12.71 for two seeds, and 4.30 for three."""
    assert resolved([1.0]) is None
    assert resolved([1.0, 1.1]) == 1, "a mean of 21 standard errors"
    assert resolved([-1.0, -1.2]) == 0, "of 11"
    assert resolved([1.0, 2.0, 3.0]) == 0, "of 3.46"
    assert resolved([-1.0, -1.5, -2.0]) == -1, "of 5.2"
    assert resolved([1.0, 1.0]) == 0, "the same twice is no evidence"


def test_claims_are_judged_seed_by_seed():
    """The seeds differ by more than the rules do, but QSR is ahead in each."""
    found = report(
        {
            "sync": [60.0, 65.0, 70.0],
            "qsr": [60.5, 65.4, 70.6],
            "constant": [61.0, 65.9, 71.2],
            "cubic": [60.4, 65.6, 70.5],
        },
        {"sync": 10.0, "qsr": 8.0},
    )
    here = {claim["claim"]: found.answer(claim) for claim in found.claims()}
    assert here == {
        "QSR generalises better than data parallelism": "yes",
        "QSR generalises better than its smallest H throughout": "no",
        "QSR generalises better than H ∝ 1/η": "not known",
        "QSR generalises better than H ∝ 1/η³": "not resolved",
        "QSR generalises better than post-local": "not known",
        "QSR ends in a flatter minimum than data parallelism": "yes",
    }
    text = found.markdown()
    assert "| QSR generalises better than data parallelism | yes | +0.50 | 0.06 | 3 |" in text
    assert "| H ∝ 1/η² (QSR) | 65.50 ± 5.05 | 16.0% ± 0.0% | 0.500 ± 0.000 | 9.03 ± 1 | 100 ± 0 |" in text
    assert "12 of 18 runs are done" in text


def test_runs_that_diverge_are_told(tmp_path):
    found = report({"sync": [60.0, 61.0], "qsr": [None, 62.0], "cubic": [None, None]})
    text = found.markdown()
    assert "| H ∝ 1/η² (QSR) | 36.00 ± 36.77 (1 diverged) | 16.0% | 0.500 | 11.1 | 100 |" in text
    assert "| H ∝ 1/η³ | 10.00 ± 0.00 (2 diverged) |  |  |  |  |" in text
    assert found.line(GridPoint(STUDY.methods[4], 8, None, 0)) == "10.00 ± 0.00 %: diverged"
    assert len(found.write(tmp_path / "qsr")) >= 2, "a figure without the points that there are not"


def test_without_runs_there_is_nothing_to_say(tmp_path):
    assert [path.name for path in report({}).write(tmp_path / "qsr")] == ["qsr.json"]


def test_one_seed_resolves_nothing():
    assert all(claim["here"] is None for claim in report({"sync": [60.0], "qsr": [70.0]}).claims())


def test_every_rule_has_a_title_and_all_leave_h_base_at_the_same_rate():
    assert [method.name for method in STUDY.methods] == list(TITLES)
    for method in STUDY.methods:
        config = parse([str(STUDY.small.setting.path), *method.settings, "--output=x"]).method.period
        if config.rule in ("power", "qsr"):
            exponent = config.exponent or 2
            assert config.alpha / 4 ** (1 / exponent) == pytest.approx(0.04, rel=2e-3), "4 = (α/η)^p at η = 0.04"


def test_the_sharpness_of_a_run(tmp_path):
    """Of a network that gives all classes the same: ln 10, whatever the images."""
    pytest.importorskip("scipy")
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    for split in ("train", "test"):
        hvdlocal.ShardWriter(tmp_path / "data", split, classes=list("abcdefghij")).write(images, np.arange(40) % 10)
    run = tmp_path / "run"
    run.mkdir()
    config = parse([str(STUDY.small.setting.path), f"--data.path={tmp_path}/data", f"--output={run}"])
    model = build_model("small_cnn", 10, (8, 8, 3))
    torch.nn.init.zeros_(model[-1].weight)
    torch.nn.init.zeros_(model[-1].bias)
    torch.save(model.state_dict(), run / "model.pt")
    assert run_sharpness.stored(run) is None
    found = run_sharpness.measure(run, config)
    assert found.loss == pytest.approx(math.log(10))
    assert found.images == 40
    assert found.largest > 0
    assert run_sharpness.stored(run) == found
