"""`hvdlocal reproduce` with a stand-in for mpirun: which runs are made, what is kept, and what the report says."""

import json
import stat
import sys

import numpy as np
import pytest

import hvdlocal
from hvdlocal.cli import main
from hvdlocal.papers.claims import CLAIMS, Point, Scale, check, judge
from hvdlocal.papers.grid_report import GridReport
from hvdlocal.papers.published import read_table
from hvdlocal.papers.runs import Outcome
from hvdlocal.papers.studies import BASELINE, STUDIES, GridPoint, grid_points

GRID = ["--workers", "2", "--periods", "2", "8"]

STAND_IN = """\
#!{python} -IS
\"\"\"In place of mpirun: leaves what the ranks would, as `plan.json` says by the name of a run; notes each start.\"\"\"
import json, os, sys
from pathlib import Path

ranks, command = sys.argv[1], sys.argv[2:]
settings = dict(word[2:].split("=") for word in command if word.startswith("--") and "=" in word)
out, here = Path(settings["output"]), Path(__file__).parent
with (here / "starts").open("a") as file:
    file.write(out.name + " " + ranks + " " + os.environ["OMP_NUM_THREADS"] + chr(10))
code, accuracy, epochs = json.loads((here / "plan.json").read_text()).get(out.name, [0, 0.7, 1.5])
out.mkdir(parents=True, exist_ok=True)
(out / "config.yaml").write_text(json.dumps({{"epochs": float(settings.get("epochs", 12)), "seed": int(settings["seed"])}}))
print("hvdlocal: said by", out.name)
if code == 0:
    evaluation = {{"accuracy": accuracy, "top5": None, "bits_per_byte": accuracy}}
    summary = {{"evaluation": evaluation, "data_epochs": epochs, "seconds": {{"elapsed": 3.0}}}}
    (out / "summary.json").write_text(json.dumps(summary))
sys.exit(code)
"""


@pytest.fixture
def reproduce(tmp_path, capsys):
    """Runs the command with the stand-in; returns (what it printed, names of the runs that were started)."""
    script = tmp_path / "stand-in"
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    images = np.zeros((20, 16, 16, 3), np.uint8)
    for split in ("train", "test"):
        hvdlocal.ShardWriter(tmp_path / "data", split, classes=list("abcdefghij")).write(images, np.arange(20) % 10)

    def run(*arguments, expect=0, plan=None):
        (tmp_path / "plan.json").write_text(json.dumps(plan or {}))
        (tmp_path / "starts").unlink(missing_ok=True)
        settings = ["--launcher", str(script), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "runs")]
        assert main(["reproduce", *arguments, *settings]) == expect
        printed = capsys.readouterr()
        starts = (tmp_path / "starts").read_text().splitlines() if (tmp_path / "starts").exists() else []
        return printed.err if expect == 2 else printed.out, starts

    run.directory = tmp_path / "runs"
    return run


def test_a_grid_is_run_once(reproduce):
    out, starts = reproduce("table2", *GRID, "--methods", "baseline", "local-ada")
    assert starts == ["baseline-K1-seed0 1 1", "local-ada-K2-H2-seed0 2 1", "local-ada-K2-H8-seed0 2 1"]
    assert "3 runs, 0 done" in out
    assert "[2/3] local-ada K=2 H=2 seed=0" in out
    out, starts = reproduce("table2", *GRID, "--methods", "baseline", "local-ada", "local-lin")
    assert starts == ["local-lin-K2-H2-seed0 2 1", "local-lin-K2-H8-seed0 2 1"]
    assert "5 runs, 3 done" in out
    for suffix in (".md", ".json"):
        assert (reproduce.directory / f"table2{suffix}").stat().st_size > 500


def test_runs_with_other_settings_are_not_mixed(reproduce):
    reproduce("table2", *GRID, "--methods", "baseline")
    error, starts = reproduce("table2", *GRID, "--methods", "baseline", "--epochs=3", expect=2)
    assert "holds an earlier run with epochs=12.0, not 3.0" in error
    assert starts == []
    _, starts = reproduce("table2", *GRID, "--methods", "baseline", "--epochs=3", "--overwrite=true")
    assert len(starts) == 1
    assert reproduce("table2", *GRID, "--methods", "baseline", "--epochs=3")[1] == []


def test_a_diverged_run_is_a_result(reproduce):
    plan = {"baseline-K1-seed0": [0, 0.7, 12.0], "acc-lin-K2-H8-seed0": [3, 0, 0]}
    arguments = ["table2", *GRID, "--methods", "baseline", "acc-lin"]
    out, _ = reproduce(*arguments, plan=plan)
    assert "10.00 %, diverged: collapses" in out
    assert "| 8 | acc-lin | 10.00 (1 diverged) |" in (reproduce.directory / "table2.md").read_text()
    assert reproduce(*arguments)[1] == []


def test_a_failed_run_is_reported_and_tried_again(reproduce):
    plan = {"local-ada-K2-H2-seed0": [2, 0, 0]}
    arguments = ["table2", *GRID, "--methods", "local-ada"]
    out, starts = reproduce(*arguments, plan=plan, expect=1)
    assert "failed with exit code 2: hvdlocal: said by local-ada-K2-H2-seed0" in out
    assert len(starts) == 2
    assert reproduce(*arguments)[1] == ["local-ada-K2-H2-seed0 2 1"]


def test_two_runs_that_fail_for_the_same_reason_end_the_grid(reproduce):
    """Such as an mpirun that does not start at all."""
    plan = {f"local-ada-K2-H{period}-seed0": [2, 0, 0] for period in (2, 4, 8, 16)}
    arguments = ["table2", "--workers", "2", "--periods", "2", "4", "8", "16", "--methods", "local-ada"]
    out, starts = reproduce(*arguments, plan=plan, expect=1)
    assert len(starts) == 2
    assert "the same as in the run before: the others are not tried" in out


def test_runs_that_fail_for_the_same_reason_but_not_in_succession_do_not(reproduce):
    plan = {f"local-ada-K2-H{period}-seed0": [2, 0, 0] for period in (2, 8)}
    arguments = ["table2", "--workers", "2", "--periods", "2", "4", "8", "16", "--methods", "local-ada"]
    assert len(reproduce(*arguments, plan=plan, expect=1)[1]) == 4


def test_an_interrupted_run_ends_the_grid(reproduce):
    arguments = ["table2", *GRID, "--methods", "local-ada"]
    out, starts = reproduce(*arguments, plan={"local-ada-K2-H2-seed0": [85, 0, 0]}, expect=85)
    assert "interrupted: hvdlocal: said by" in out
    assert len(starts) == 1
    assert len(reproduce(*arguments)[1]) == 2


def test_several_seeds_have_a_spread(reproduce):
    plan = {f"baseline-K1-seed{seed}": [0, accuracy, 12.0] for seed, accuracy in enumerate((0.70, 0.72, 0.74))}
    reproduce("table2", *GRID, "--methods", "baseline", "--seeds", "0", "1", "2", plan=plan)
    assert "|  | baseline | 72.00 ± 2.00 |" in (reproduce.directory / "table2.md").read_text()
    record = json.loads((reproduce.directory / "table2.json").read_text())
    assert record["target_percent"] == pytest.approx(72)
    assert record["rows"][0]["accuracies"] == pytest.approx([70, 72, 74])


def test_a_report_of_what_is_done(reproduce):
    reproduce("table2", *GRID, "--methods", "baseline", "local-ada")
    (reproduce.directory / "table2.md").unlink()
    out, starts = reproduce("table2", *GRID, "--report")
    assert starts == []
    assert "9 runs, 3 done" in out
    text = (reproduce.directory / "table2.md").read_text()
    assert "3 of 9 runs are done" in text
    assert text.count("| local-ada |") == 2


def test_the_commands_can_be_seen_beforehand(reproduce):
    out, starts = reproduce("table3", "--scale", "paper", "--dry-run")
    lines = out.splitlines()
    assert (len(lines), starts) == (1 + 3 * 6 * 4, [])
    assert "imagenet32_wrn_28_2.yaml" in lines[0]
    assert "--method.preset=local-ada --method.period.period=64 --seed=0" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qsr", "--scale", "paper"], "has only the small setting"),
        (["qsr", "--periods", "2", "8"], "no --periods, and one number of --workers"),
        (["qsr", "--workers", "4", "8"], "no --periods, and one number of --workers"),
        (["qsr", "--method.period.alpha=1"], "qsr decides the method: leave out --method.period.alpha=1"),
        (
            ["qsr", "--epochs", "10"],
            "post-local switches after 20 epochs, and the run has 10: leave it out with --methods",
        ),
        (["table5"], "choose one of table2, table3"),
        (["outer", "--workers", "8"], "leave out --scale, --workers and --periods"),
        (["outer", "--methods", "local-17"], "outer has sync, local-16"),
        (["outer", "--method.overlap=3"], "outer decides this setting: leave out --method.overlap=3"),
        (["outer", "--optimizer.lr=1"], "leave out --optimizer.lr=1"),
        (["outer", "--data.train_split", "nowhere"], "tinyshakespeare.txt --block 64 --output"),
        (["table3"], "table3 --scale paper"),
        (["table2", "--methods", "sync"], "table2 has baseline, acc-lin"),
        (["table2", "--epoch", "1"], "did you mean 'epochs'"),
        (["table2", "--epochs", "-1"], "epochs=-1.0: must be positive"),
        (["table2", "--seed", "3"], "use --seeds"),
        (["table2", "--workers", "0"], "--workers 0: at least 1"),
        (["table2", "--data.train_split", "nowhere"], "--pool 2 --limit 20000 --output"),
    ],
)
def test_mistakes(reproduce, arguments, message):
    error, starts = reproduce(*arguments, expect=2)
    assert message in error
    assert starts == []


# -- methods at their own learning rates -------------------------------------------------------------------------------

ONE = ["outer", "--methods", "one", "--seeds", "5", "6", "--epochs=12"]


def at(bits, seed=5):
    return {f"one-lr{rate:g}-K1-seed{seed}": [0, found, 1.3] for rate, found in bits.items()}


def test_a_learning_rate_is_tuned_before_the_other_seeds_run(reproduce):
    plan = at({0.002: 3.0, 0.004: 2.5, 0.008: 2.0, 0.016: 2.2}) | at({0.008: 2.4}, seed=6)
    out, starts = reproduce(*ONE, plan=plan)
    names = [f"one-lr{rate:g}-K1-seed5" for rate in (0.002, 0.004, 0.008, 0.016)] + ["one-lr0.008-K1-seed6"]
    assert [line.split()[0] for line in starts] == names
    assert "2.2000 bits per byte" in out
    text = (reproduce.directory / "outer.md").read_text()
    assert "| 1 | one worker | 0.008 | 2.200 ± 0.283 |" in text
    assert "5 of 5 runs are done" in text
    assert reproduce(*ONE)[1] == []
    out, starts = reproduce(*ONE, "--dry-run")
    assert len(out.splitlines()) == 5
    assert starts == []


def test_a_learning_rate_at_which_a_run_diverges_is_not_the_best(reproduce):
    plan = at({0.002: 2.1, 0.004: 2.0}) | {"one-lr0.008-K1-seed5": [3, 0, 0]}
    reproduce(*ONE, plan=plan)
    assert "| 1 | one worker | 2.100 | **2.000** | diverged |" in (reproduce.directory / "outer.md").read_text()


def test_a_run_that_fails_ends_its_stage(reproduce):
    plan = at({0.002: 2.1, 0.004: 2.0}) | {"one-lr0.008-K1-seed5": [2, 0, 0]}
    _, starts = reproduce(*ONE, plan=plan, expect=1)
    assert len(starts) == 3
    _, starts = reproduce(*ONE, "--report")
    assert starts == []
    assert "2 of 3 runs are done" in (reproduce.directory / "outer.md").read_text()


# -- the rules -------------------------------------------------------------------------------------------------------


def test_fig10_shares_its_runs_with_the_tables():
    directories = [method.directory for method in STUDIES["fig10"].methods]
    assert directories[-1] == "local-ada"
    assert len(set(directories)) == 6
    assert GridPoint(STUDIES["fig10"].methods[3], 8, 32, 1).name == "local-ada-c0.6-K8-H32-seed1"


def test_the_baseline_comes_first_and_once_a_seed():
    found = list(grid_points([BASELINE, *STUDIES["table2"].methods], [8, 16], [2], [0, 1]))
    assert [cell.method.name for cell in found[:3]] == ["baseline", "acc-lin", "acc-ada"]
    assert len(found) == 2 * (1 + 2 * 4)
    assert len({cell.name for cell in found}) == len(found)


@pytest.mark.parametrize("study", ["table2", "table3", "table4"])
def test_the_paper_bears_out_its_own_claims(study):
    """By the rules applied to it, with the exceptions that its Table 4 does have."""
    setting = STUDIES[study].paper.setting
    table = read_table(setting.table)
    scale = Scale(table.target_percent, setting.chance_percent)
    exceptions = set()
    for workers in table.workers:
        results = {
            (method, period): Point(cell.accuracy_percent, cell.epochs)
            for (method, k, period), cell in table.cells.items()
            if k == workers
        }
        for number, claim in enumerate(CLAIMS[study]):
            if not check(claim, results, table.periods, scale):
                exceptions.add((workers, number))
    assert exceptions == ({(8, 0), (24, 2)} if study == "table4" else set())


def test_one_period_says_nothing_about_growing_ones():
    results = {(method.name, 8): Point(70.0, 1.0) for method in STUDIES["table2"].methods}
    assert [check(claim, results, [8], Scale(70.0, 10.0)) for claim in CLAIMS["table2"]] == [None, None, True, None]


@pytest.mark.parametrize(
    ("here", "published", "same_setting", "agrees", "text"),
    [
        (70.0, 95.07, False, True, "holds, as published"),
        (68.0, 95.07, False, False, "degrades, published: holds **differs**"),
        (12.0, 13.19, False, True, "collapses, as published"),
        (12.0, 40.0, True, True, "collapses, as published"),
        (94.0, 95.0, True, True, "holds, -1.00 points"),
        (92.0, 95.0, True, False, "holds, -3.00 points **differs**"),
        (69.0, None, False, None, "holds"),
    ],
)
def test_verdicts(here, published, same_setting, agrees, text):
    scale = Scale(93.0 if same_setting else 70.0, 10.0)
    verdict = judge(here, scale, published, Scale(93.0, 10.0), same_setting=same_setting)
    assert (verdict.agrees, verdict.text) == (agrees, text)


def test_a_report_of_the_published_numbers_agrees_with_them(tmp_path):
    study = STUDIES["table2"]
    table = read_table("cifar10")
    outcomes = {
        cell: Outcome(found.accuracy_percent, found.epochs, 1.0)
        for cell in grid_points(study.methods, table.workers, table.periods, [0])
        for found in [table.cells[cell.place]]
    }
    report = GridReport(study, study.paper.setting, 200, outcomes, len(outcomes))
    assert all(report.verdict(row).agrees for row in report.rows)
    assert all(claim["here"] and claim["published"] for claim in report.claims())
    assert "**" not in report.markdown()
    pytest.importorskip("matplotlib")
    assert report.write(tmp_path / "table2")[-1].read_bytes().startswith(b"<?xml")
