"""The studies: their sums against plain ones, and the claims on short runs."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headrace.launch.studies.asynchronous import main as asynchronous
from headrace.launch.studies.digits import network, train_digits
from headrace.launch.studies.jitter import SLOWDOWN, spells
from headrace.launch.studies.large_batch import main as large_batch
from headrace.launch.studies.recall import Recall, train_recall
from headrace.launch.studies.recall import main as recall
from headrace.launch.studies.representations import agreement, cka, smoothness
from headrace.launch.studies.representations import main as representations
from headrace.launch.studies.synthetic import CLAIMS, ROWS, check, table
from headrace.launch.studies.synthetic import main as synthetic
from headrace.pipeline.rules import Synthetic


def test_cka_is_blind_to_rotation_and_scale_and_to_nothing_else() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 6)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    assert cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    assert cka(x, torch.randn(500, 6)) < 0.1
    # Of the kernels' inner products, written out.
    y = torch.randn(500, 3) + x[:, :3]
    centre = torch.eye(500) - 1 / 500
    k, m = (centre @ t @ t.T @ centre for t in (x, y))
    wanted = (k * m).sum() / (k.norm() * m.norm())
    assert cka(x, y) == pytest.approx(wanted.item(), rel=1e-4)


def test_smoothness_and_agreement() -> None:
    torch.manual_seed(0)
    noise = torch.randn(200, 8, 8)
    ramp = torch.arange(8.0).expand(1, 8, 8)
    assert abs(smoothness(noise)) < 0.1
    assert smoothness(ramp) > 0.6
    checks = torch.tensor([[1.0, -1.0] * 4, [-1.0, 1.0] * 4] * 4).view(1, 8, 8)
    assert smoothness(checks) == -1
    assert agreement(noise, noise) == pytest.approx(1)
    assert agreement(noise, -2 * noise) == pytest.approx(-1)


def test_recall_targets_are_what_was_seen_delay_steps_before() -> None:
    data = Recall(delay=3, window=5, seed=0)
    windows = [data.next() for _ in range(4)]
    seen = torch.cat([x.argmax(-1) for x, _ in windows], dim=1)
    target = torch.cat([y for _, y in windows], dim=1)
    assert torch.equal(target[:, 3:], seen[:, :-3])


def test_the_example_prints_both(capsys: pytest.CaptureFixture[str]) -> None:
    recall(["--segments", "20"])
    out = capsys.readouterr().out
    assert re.fullmatch(r"truncated back-propagation +0\.\d{3}\nwith .* 0\.\d{3} +\(.*\)\n", out)
    with pytest.raises(SystemExit):
        recall(["--delay", "0"])


def test_spells_are_the_same_again_and_slow_for_a_while() -> None:
    assert spells(1) == spells(1) != spells(2)
    assert set(spells(1)) == {1.0, SLOWDOWN}
    pace = spells(1)
    assert all(len(set(pace[k : k + 8])) == 1 for k in range(0, len(pace), 8))


def test_a_claim_can_fail() -> None:
    means = {(row.task, row.way): 0.9 for row in ROWS}
    verdicts = dict(check(means))
    assert len(verdicts) == len(CLAIMS) == 5
    assert [holds for holds in verdicts.values()] == [True, False, False, True, False]


def test_the_table() -> None:
    assert table({("a", "b"): [0.5, 0.7], ("a", "c"): [1.0]}).splitlines()[2:] == [
        "| a | b | 0.600 ± 0.141 |",
        "| a | c | 1.000 |",
    ]


def test_only_the_top_is_trained_where_the_rest_is_cut_off() -> None:
    torch.manual_seed(0)
    model = network(2)
    before = {name: value.clone() for name, value in model.named_parameters()}
    train_digits(2, 10, 0, None, only_top=True, model=model)
    moved = {n for n, v in model.named_parameters() if not torch.equal(v, before[n])}
    assert moved == {"7.weight", "7.bias"}


def test_studies_are_the_same_again() -> None:
    runs = [train_digits(2, 30, 1, lambda: Synthetic(conditional=True, classes=10)) for _ in "ab"]
    assert runs[0] == runs[1]
    assert train_recall(4, 4, 30, 1) == train_recall(4, 4, 30, 1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_claims_hold_on_a_short_study(capsys: pytest.CaptureFixture[str]) -> None:
    """The acceptance table of synthetic gradients with one seed, digits a third as long."""
    synthetic(["--seeds", "1", "--quick"])
    out = capsys.readouterr().out
    assert len(re.findall(r"^holds ", out, re.M)) == 5, out
    assert "DOES NOT HOLD" not in out


def test_the_picture_of_representations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    representations(["--out", str(tmp_path), "--iterations", "60"])
    out = capsys.readouterr().out
    assert len(re.findall(r"^(cDNI|DNI|untrained) +(0\.\d\d +){3}0\.\d\d$", out, re.M)) == 3
    assert (tmp_path / "representations.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("study", "given", "said"),
    [
        (large_batch, ["--out", "file"], "--out file: it cannot be made: file is a file; give"),
        (representations, ["--out", "file/x"], "--out file/x: it cannot be made: file is a file"),
        (asynchronous, ["--picture", "file/x.png"], "folder is file: it cannot be made: file is"),
        (asynchronous, ["--picture", "x.what"], "--picture x.what: give a file, as staleness.png"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is_trained(
    study: Callable[[list[str]], None],
    given: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SystemExit) as ended:
        study(given)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_jitter_needs_three_stages() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headrace.launch.studies.jitter"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == (
        "headrace: the stage in the middle needs one on either side: start 3 or more with "
        "torchrun\n"
    )
