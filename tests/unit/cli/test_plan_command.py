"""`hvdlocal plan` as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hvdlocal
from hvdlocal.cli import main
from hvdlocal.figures.units import bytes_text

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
IMAGENET = ["--workers", "16", "--samples", "1281167"]


@pytest.fixture
def config(tmp_path):
    """A configuration, with its data."""
    images = np.random.default_rng(0).integers(0, 255, (96, 8, 8, 1), dtype=np.uint8)
    hvdlocal.ShardWriter(tmp_path / "data", "train", classes=["a", "b", "c"]).write(images, np.arange(96) % 3)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"data: {{path: {tmp_path}/data, batch_size: 8}}\nmodel: {{name: digits_cnn}}\noutput: {tmp_path}/out\nepochs: 12\n"
    )
    return path


@pytest.fixture
def plan(config, capsys):
    """Runs `hvdlocal plan` and returns what it printed."""

    def run(*arguments, expect=0):
        assert (
            main(["plan", *([] if arguments and arguments[0].endswith(".yaml") else [str(config)]), *arguments])
            == expect
        )
        printed = capsys.readouterr()
        return printed.err if expect else printed.out

    return run


@pytest.mark.parametrize(
    ("experiment", "settings", "share", "rounds", "steps", "last"),
    [
        ("qsr_vit_b16", [], 10.4, 9_711, 93_600, [1_612, 2_769, 8_142]),
        ("qsr_vit_b16", ["--method.period.h_base", "8"], 6.9, 6_461, 93_600, None),
        ("qsr_resnet152", [], 39.7, 24_792, 62_400, None),
        ("qsr_resnet152", ["--method.period.h_base", "4", "--method.period.alpha", "0.25"], 20.1, 12_539, 62_400, None),
    ],
)
def test_published_communication_shares(plan, experiment, settings, share, rounds, steps, last):
    """Gu et al., ICLR 2024: QSR's communication relative to data parallelism."""
    arguments = [str(EXPERIMENTS / f"{experiment}.yaml"), *settings, *IMAGENET, "--classes", "1000"]
    assert f"{share} % of data parallelism's" in plan(*arguments)
    [found] = json.loads(plan(*arguments, "--json"))["plans"]
    assert (found["steps"], found["rounds"]) == (steps, rounds)
    assert round(100 * found["collective_share"], 1) == share
    assert round(100 * found["byte_share"], 1) == share
    if last:
        assert [stretch["period"] for stretch in found["stretches"][-3:]] == last
        assert found["longest"]["data_epochs"] == pytest.approx(26.1, abs=0.01)


def test_shares_side_by_side(plan):
    table = plan(str(EXPERIMENTS / "qsr_vit_b16.yaml"), *IMAGENET, "--no-bytes", "--compare", "h_base=8", "preset=sync")
    shares = {line.split("  ")[0]: line.split()[-2] for line in table.splitlines() if line.endswith(" %")}
    assert shares == {"local qsr alpha=0.0175 h_base=4": "10.4", "h_base=8": "6.9", "preset=sync": "100.0"}


def test_a_comma_separates_settings_too(plan):
    settings = ["--workers", "2", "--no-bytes", "--json", "--compare"]
    spaced, *others = (
        json.loads(plan(*settings, text))["plans"][1] | {"label": ""}
        for text in (
            "rule=constant period=6 optimizer.betas=[0.8,0.9]",
            "rule=constant,period=6,optimizer.betas=[0.8,0.9]",
            "rule=constant, period=6, optimizer.betas=[0.8,0.9]",
        )
    )
    assert others == [spaced, spaced]
    assert spaced["longest"]["steps"] == 6


def test_a_mapping_is_one_setting(plan):
    """As the plan itself prints it, and in the quotes of a shell."""
    others = ["momentum={exp_avg: 3, exp_avg_sq: 6} period=6", "period=6, momentum='{exp_avg: 3, exp_avg_sq: 6}'"]
    own = ["--optimizer.name=adamw", "--method.period.period=6", "--method.momentum={exp_avg: 3, exp_avg_sq: 6}"]
    settings = ["--workers", "2", "--classes", "3", "--json", *own[:1]]
    found = json.loads(plan(*settings, "--compare", *others))["plans"]
    alone = json.loads(plan(*settings, *own[1:]))["plans"][0]["bytes"]
    assert [one["bytes"] for one in found[1:]] == [alone, alone] != [found[0]["bytes"]] * 2


def test_data_here_need_no_more_to_be_said(plan):
    text = plan("--workers", "2", "--step-seconds", "90", "--checkpoint-seconds", "20", "--mtbf-hours", "10")
    assert "2 ranks × 8 of 96 samples" in text
    assert "144 steps (3:36 h of computing) in 18 rounds" in text
    assert "24.0 of data for 12.0 scale-invariant ones: mean gain 1" in text
    assert "for up to 8 steps (12:00 min of computing): 1.33 epochs of data\n" in text
    assert "18: 12.5 % of data parallelism's" in text
    assert "every 20:00 min (13 steps)" in text
    assert "assumed a gain of 1" in text


def test_what_overlap_hides_side_by_side(plan):
    """18 rounds of 8 steps: 11 end in an evaluation (after 16, 24, 40, 48 … steps), and one ends the run."""
    settings = ["--workers", "2", "--no-bytes", "--step-seconds", "1", "--averaging-seconds", "3"]
    compared = [*settings, "--compare", "overlap=2", "overlap=3", "preset=sync"]
    found = json.loads(plan(*compared, "--json"))["plans"]
    assert [one["exposed_seconds"] for one in found] == [54, 12 * 3 + 6 * 1, 12 * 3, 144 // 2 * 3]
    assert [one["hidden_seconds"] for one in found] == [0, 12, 18, 0]
    assert {one["free_from_overlap"] for one in found} == {3}
    assert "  54.0 s" in plan(*compared).splitlines()[3]
    text = plan(*settings, "--method.overlap", "2")
    assert "3.0 s a round, of which 2.3 s is exposed: 42.0 s in the run, and 12.0 s goes on behind steps\n" in text
    assert "averaging is free from τ = 3 on (method.overlap)\n" in text


def test_the_gain_follows_from_the_ratio(plan):
    """Eq. 49's check value for K = 8, H = 8, σ²/G = 10."""
    [found] = json.loads(plan("--workers", "8", "--grad-var-over-sqr", "10", "--no-bytes", "--json"))["plans"]
    assert found["stretches"][0]["gain"] == pytest.approx(1.300620, rel=0.05)  # the first round's is 1
    assert found["mean_gain"] == found["stretches"][0]["gain"] or len(found["stretches"]) > 1
    [more] = json.loads(plan("--workers", "8", "--gain", "2", "--no-bytes", "--json"))["plans"]
    assert more["data_epochs"] < found["data_epochs"]


def test_a_new_rule_does_not_inherit_the_settings_of_the_old(plan):
    settings = ["--method.preset", "local", "--method.period.rule", "qsr", "--method.period.alpha", "0.2"]
    table = plan(
        *["--workers", "2", "--no-bytes", *settings, "--method.period.h_base", "2"],
        *[
            "--compare",
            "rule=constant period=6",
            "h_base=3",
            "method.period.rule=post-local method.period.switch_epochs=4",
        ],
    )
    assert [line.split("  ")[0] for line in table.splitlines() if line.endswith(" %")] == [
        "local qsr alpha=0.2 h_base=2",
        "rule=constant period=6",
        "h_base=3",
        "method.period.rule=post-local method.period.switch_epochs=4",
    ]


def test_figure(plan, tmp_path):
    for name in ("h.png", "h.pdf"):
        plan("--workers", "2", "--no-bytes", "--figure", str(tmp_path / "new" / name), "--compare", "preset=sync")
    assert (tmp_path / "new" / "h.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "new" / "h.pdf").read_bytes().startswith(b"%PDF")


def test_islands_are_the_workers(plan):
    """8 ranks as 2 × 4: K = 2 and a step of four micro-batches, whose gain is Eq. 49's."""
    settings = ["--no-bytes", "--json", "--grad-var-over-sqr", "10", "--method.period.period", "8", "--epochs", "400"]
    [found] = json.loads(plan(*settings, "--ranks", "8", "--method.island", "4"))["plans"]
    assert (found["ranks"], found["workers"], found["island_size"]) == (8, 2, 4)
    gain = hvdlocal.gain_ratio(1.0, 10.0, num_workers=2, period=8, accumulate=4)
    assert found["stretches"][0]["gain"] == pytest.approx(gain, rel=0.01)  # the first round's is 1
    assert found["data_epochs"] == pytest.approx(found["steps"] * 8 * 8 / 96)
    for same in (["--workers", "2", "--method.island", "4"], ["--ranks", "8", "--method.island", "node"]):
        [other] = json.loads(plan(*settings, *same, "--ranks-per-node", "4"))["plans"]
        assert other | {"label": ""} == found | {"label": ""}


def test_outer_optimizers_and_overlap_side_by_side(plan):
    """Data parallelism has neither, presets with an outer optimizer keep their own, and without overlap nothing is mixed."""
    mean = [
        "--method.preset",
        "local",
        "--method.outer.name",
        "slowmo",
        "--method.overlap",
        "2",
        "--method.mixing",
        "0.5",
    ]
    others = ["preset=sync", "preset=diloco", "outer.name=nesterov overlap=4", "preset=acc-lin", "overlap=0"]
    found = json.loads(plan("--no-bytes", "--workers", "4", *mean, "--json", "--compare", *others))["plans"]
    assert found[0]["label"].endswith(" outer.name=slowmo overlap=2 mixing=0.5")
    assert [one["label"] for one in found[1:]] == others
    assert found[0]["rounds"] == found[2]["rounds"] == found[3]["rounds"]


def test_sizes_of_islands_side_by_side(plan):
    """On as many ranks; data parallelism has none."""
    others = ["island=1", "island=4", "preset=sync"]
    settings = ["--no-bytes", "--ranks", "8", "--ranks-per-node", "2", "--method.island", "node", "--compare", *others]
    found = json.loads(plan(*settings, "--json"))["plans"]
    assert [(one["ranks"], one["workers"]) for one in found] == [(8, 4), (8, 8), (8, 2), (8, 8)]
    assert plan(*settings).startswith("8 ranks × 8 of 96 samples")
    settings = ["--ranks", "8", "--method.island", "4", "--compare", "island=1"]
    inside = json.loads(plan(*settings, "--json"))["plans"][0]["island_bytes"]
    head, islands, none = plan(*settings).splitlines()[2:5]
    assert head.endswith("of data parallel  in islands")
    assert islands.endswith(f"  {bytes_text(inside)}")
    assert none.endswith("  0.0 kB")
    alone = plan("--no-bytes", "--ranks", "8", "--method.island", "4")
    assert "  workers       2 islands of 4 ranks\n" in alone


MISTAKES = [
    (["--ranks", "0"], "num_workers is 0"),
    (["--ranks", "6", "--method.island", "4"], "islands of 4 ranks need a multiple of 4 ranks, not 6"),
    (["--ranks", "8", "--method.island", "node"], "hvdlocal plan takes it as --ranks-per-node"),
    (["--ranks", "8", "--method.island", "3", "--ranks-per-node", "4"], "an island would hold a part of one"),
    (["--ranks", "8", "--ranks-per-node", "0"], "--ranks-per-node 0"),
    (["--ranks", "8", "--method.island", "4", "--method.preset", "sync"], "so it has no islands"),
    (["--ranks", "8", "--method.island_period", "4"], "without islands"),
    (["--ranks", "8", "--method.island", "4", "--method.island_period", "4"], "no gain is derived"),
    (["--workers", "0"], "num_workers is 0"),
    (["--workers", "4", "--compare", "island=2"], "--workers 4 compares jobs of 4 and 8 ranks: give --ranks N instead"),
    (["--workers", "2", "--data.path", "/nowhere"], "say how many training samples there will be: --samples N"),
    (["--workers", "2", "--epoch", "3"], "did you mean 'epochs'?"),
    (["--workers", "2", "--method.period.rule", "adacomm"], "AdaComm depends on the training loss"),
    (["--workers", "2", "--compare", "rule=qsr"], "rule=qsr needs method.period.alpha"),
    (["--workers", "2", "--compare", "constant"], "settings are written name=value"),
    (["--workers", "2", "--compare", "method.presett=sync"], "did you mean 'method.preset'?"),
    (["--workers", "2", "--method.preset", "sync", "--gain", "2"], "assume nothing"),
    (["--workers", "2", "--samples", "0"], "0 training samples"),
    (["--workers", "2", "--method.overlap", "2", "--averaging-seconds", "3"], "give --step-seconds"),
    (["--workers", "2", "--model.name", "resnet50"], "3 channels, not 1"),
    (["--workers", "2", "--figure", "plan.txt"], "not supported"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(plan, arguments, message):
    assert message in plan(*arguments, expect=2)


def test_without_a_configuration(capsys):
    assert main(["plan", "--workers", "2"]) == 2
    assert "no configuration: hvdlocal plan CONFIG.yaml" in capsys.readouterr().err


def test_no_torch_is_loaded_unless_bytes_are_counted(config):
    """So that the answer comes at once; and `hvdlocal.cli.main` can act before torch takes seconds to load."""
    program = (
        "import sys; from hvdlocal.cli import main; assert 'torch' not in sys.modules;"
        f"main(['plan', {str(config)!r}, '--workers', '2', '--no-bytes']); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, stdout=subprocess.DEVNULL)
