"""Test the command and the demo: a whole quick run on the real digits, its files, and an interruption."""

from __future__ import annotations

import json
import math

import pytest
import torch

for package in ("matplotlib", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(package)

from safetensors.torch import load_file  # noqa: E402

from fastguide import __main__ as cli  # noqa: E402
from fastguide.demo import checkpoints, digits, guidances, methods  # noqa: E402
from fastguide.demo import run as demo_run  # noqa: E402


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastguide"


def test_quick_demo_from_training_to_files(tmp_path, cache, capsys):
    output = tmp_path / "out"
    before = torch.get_rng_state()
    assert cli.main(["demo", "--quick", "--output", str(output)]) == 0
    assert torch.equal(torch.get_rng_state(), before)
    results = json.loads((output / "results.json").read_text())
    rows = {(r["solver"], r["family"], r["scale"]): r for r in results["methods"]}
    assert len(rows) == len(methods.all_methods()) == len(list(output.glob("grid-*.png")))
    assert (output / "overview.png").stat().st_size > 10_000
    assert (output / "trade-off.png").stat().st_size > 10_000
    assert all(0 <= r["agreement"] <= 1 and math.isfinite(r["diversity"]) for r in rows.values())
    for solver in ("ddpm", "ddim"):  # what guidance is for, in numbers
        assert rows[solver, "none", None]["agreement"] < 0.3
        assert rows[solver, "classifier-free", 0.0]["agreement"] == rows[solver, "none", None]["agreement"]
        assert rows[solver, "classifier-free", 2.0]["agreement"] > 0.9
        assert rows[solver, "classifier, epsilon form", 4.0]["agreement"] > 0.7
        assert rows[solver, "classifier-free", 8.0]["diversity"] < rows[solver, "classifier-free", 1.0]["diversity"]
    assert rows["ddpm", "classifier, mean form", 4.0]["agreement"] > 0.7
    assert (output / "guidances-digits.png").stat().st_size > 10_000
    kinds = {row["guidance"]: row for row in results["kinds_of_classifier_free_guidance"]}
    assert set(kinds) == set(guidances.KINDS)
    assert kinds["plain"]["agreement"] == rows["ddim", "classifier-free", 8.0]["agreement"]
    assert all(row["agreement"] > 0.8 for row in kinds.values())
    assert kinds["projected, in x_0"]["saturation"] < 0.5 * kinds["plain"]["saturation"]
    assert kinds["within 0.2 to 0.8"]["diversity"] > kinds["plain"]["diversity"]
    errors = results["relative_error_of_50_ddim_steps"]
    assert errors["fastguide, float32 model output"] < 1e-4
    assert errors["fastguide, bfloat16 model output"] < errors["diffusers, bfloat16 model output"]
    assert "classifier-free" in capsys.readouterr().out

    assert len(list(cache.glob("*.safetensors"))) == 2
    assert not list(cache.glob("*.partial"))
    train, _ = digits.load()
    schedule = demo_run.NoiseSchedule.linear()
    checkpoints.trained(schedule, train, quick=True, retrain=False)
    assert capsys.readouterr().out.count("loaded from") == 2


def test_an_interrupted_save_leaves_the_old_file(cache, monkeypatch):
    path = cache / "model.safetensors"
    checkpoints.save({"w": torch.ones(3)}, path)

    def interrupted(state, target):
        target.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save({"w": torch.zeros(3)}, path)
    assert load_file(path)["w"].tolist() == [1, 1, 1]
    assert [p.name for p in cache.iterdir()] == ["model.safetensors"]


def test_a_cache_file_that_cannot_be_read_is_trained_again(cache, monkeypatch, capsys):
    train, _ = digits.load()
    monkeypatch.setattr(checkpoints, "_train", lambda model, *rest: model.eval())
    schedule = demo_run.NoiseSchedule.linear()
    checkpoints.trained(schedule, train, quick=True, retrain=False)
    broken = next(cache.glob("digits-denoiser*"))
    broken.write_bytes(b"nonsense")
    checkpoints.trained(schedule, train, quick=True, retrain=False)
    assert "cannot be used" in capsys.readouterr().out
    load_file(broken)


def test_interrupting_the_demo_ends_it_with_130(tmp_path, cache, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_run.checkpoints, "trained", interrupted)
    assert cli.main(["demo", "--quick", "--output", str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_bad_arguments_are_refused(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert cli.main(["demo", "--output", str(file)]) == 1
    assert "--output: expected a folder that can be written, got" in capsys.readouterr().err
    for arguments in (["demo", "--seed", "x"], ["demo", "--backend", "magic"], []):
        with pytest.raises(SystemExit):
            cli.main(arguments)


def test_info_prints(capsys):
    assert cli.main(["info"]) == 0
    assert "backends:" in capsys.readouterr().out


def test_coverage_and_agreement_know_real_digits():
    train, held_out = digits.load()
    assert len(train.labels) + len(held_out.labels) == 1797
    assert digits.Judge(train, held_out).accuracy > 0.97
    real = digits.coverage(train.images, held_out)
    noise = digits.coverage(torch.randn(1400, 1, 8, 8), held_out)
    assert real > 0.95
    assert noise < 0.05
    assert digits.nearest_classes(train).ne(torch.arange(10)).all()
