"""`hvdlocal plan` against the runs that it foretells."""

import json

from support.launch import HVDLOCAL, launch
from support.records import records

QSR = ["--method.period.rule", "qsr", "--method.period.alpha", "0.02", "--method.period.h_base", "2"]
FEW = ["--schedule.warmup_epochs", "0.5", "--schedule.final_lr", "1e-4"]


def planned(*arguments):
    result = launch(*HVDLOCAL, "plan", *arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)["plans"][0]


def test_rounds_are_those_of_a_run(config, tmp_path):
    settings = [str(config), *QSR, *FEW, "--method.preset", "local"]
    plan = planned(*settings, "--workers", "1")
    result = launch(*HVDLOCAL, "train", *settings)
    assert result.code == 0, result.err
    rounds = [(record["step"], record["period"]) for record in records(tmp_path / "out", "round")]
    assert rounds == [
        (stretch["step"] + (i + 1) * stretch["period"], stretch["period"])
        for stretch in plan["stretches"]
        for i in range(stretch["rounds"])
    ]
    assert len({period for _, period in rounds}) > 3, "H changes in this run"
