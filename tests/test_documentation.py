"""The documentation, held to the code: its examples run, README's commands are CI's, and every public name is in it."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import fastguide
from fastguide.step.backends import native

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))


def run_examples(page: Path, names: dict[str, object]) -> dict[str, object]:
    """Execute a page's ``python`` blocks and check its ``pycon`` blocks, in order and in one namespace."""
    text = page.read_text()
    for block in re.finditer(r"^```(python|pycon)\n(.*?)^```$", text, re.S | re.M):
        line = text.count("\n", 0, block.start(2))
        if block[1] == "python":
            exec(compile("\n" * line + block[2], page, "exec"), names)
        else:
            session = doctest.DocTestParser().get_doctest(block[2], names, page.name, str(page), line)
            assert doctest.DocTestRunner().run(session, clear_globs=False).failed == 0, f"{page}:{line + 1}"
            names = session.globs
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_the_documentation_run(page):
    if page.stem == "diffusers":
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    run_examples(page, {})


def test_readme_examples_run():
    """With a pipeline, a model and its conditions, which a reader has."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        8, 3, 3, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    schedule = fastguide.NoiseSchedule.scaled_linear()
    a, a_prev = (schedule.alphas_cumprod[t].float() for t in (980, 960))
    x, uncond, cond = torch.randn(3, 4, 4, 8, 8)
    prompts, negative = torch.ones(4, 1, 1, 1), torch.zeros(4, 1, 1, 1)
    names = {"pipe": diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()), "a": a, "a_prev": a_prev, "x": x}
    names |= {"uncond": uncond, "cond": cond, "prompt_embeds": prompts, "negative_embeds": negative}
    names["model"] = lambda x, t, condition: (0.1 * x * condition).to(x.dtype)
    result = run_examples(README, names)

    assert isinstance(result["pipe"].scheduler, fastguide.diffusers.DDIMScheduler)
    assert result["x_0"].shape == (4, 4, 64, 64)
    assert result["x_0"].isfinite().all()
    step = fastguide.guided_step(result["table"], 0, x, [uncond, cond], fastguide.ClassifierFree(7.5))
    torch.testing.assert_close(result["x"], step, rtol=1e-4, atol=1e-4)


def test_readme_commands_are_the_ones_that_ci_runs():
    demo, tests = re.findall(r"```sh\n(.*?)\n```", README.read_text(), re.S)
    assert demo.endswith("fastguide demo")
    assert tests.endswith("python -m pytest -n auto --dist loadgroup")
    assert "\n" not in demo
    assert "\n" not in tests
    assert f"\n{tests}\n" in (ROOT / ".ci/run").read_text()


def test_readme_comes_to_the_point():
    text = README.read_text()
    assert len(text.splitlines()) <= 100
    assert len(text.partition("```python")[0].split()) <= 100


def test_readme_links_to_files_that_exist():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README.read_text())
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_environment_variables_are_documented():
    packages = [ROOT / "fastguide", ROOT / "benchmarks"]
    read = {native.CAPABILITY_VARIABLE}
    for path in [ROOT / "setup.py", *(path for package in packages for path in package.rglob("*.py"))]:
        read |= set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', path.read_text()))
    table = (ROOT / "docs/installing.md").read_text()
    passed_on = {"PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTHONPATH"}  # to processes of ours
    assert all(f"| `{name}` |" in table for name in read - passed_on), read


@pytest.mark.parametrize("package", ["fastguide", "fastguide.diffusers"])
def test_every_public_name_is_in_the_reference(package):
    if package == "fastguide.diffusers":
        pytest.importorskip("diffusers")
    documented = re.findall(
        r"^\.\. (?:auto\w+|data):: (?:[\w.]+\.)?(\w+)$", (ROOT / "docs/reference.md").read_text(), re.M
    )
    assert set(importlib.import_module(package).__all__) - {"guiders"} <= set(documented)
