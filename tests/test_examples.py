"""The examples do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def result_of(name):
    with torch.random.fork_rng():
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def test_a_reward_s_gradient_raises_it():
    before, after = result_of("fine_tune_by_reward")
    assert before < -1.0
    assert after > -0.6


def test_a_policy_gradient_raises_a_reward_without_one():
    before, after = result_of("flow_grpo")
    assert 0.2 < before < 0.45
    assert after > 0.9


def test_every_example_is_run_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"fine_tune_by_reward", "flow_grpo"}
