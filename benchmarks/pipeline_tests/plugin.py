"""A plugin of pytest that accelerates the pipelines of diffusers' tests, and records outcomes and calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .calls import Calls, Record

MODES = ("plain", "accelerated", "compared")
"""Pipelines as they are; accelerated; accelerated, each call after a plain one from the same state."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the plugin's options."""
    parser.addoption("--pipelines", choices=MODES, default="plain", help="what is done to pipelines")
    parser.addoption("--record", metavar="FILE", required=True, help="a file of JSON, one outcome or call a line")


def pytest_configure(config: pytest.Config) -> None:
    """Watch the calls of pipelines."""
    config.pluginmanager.register(_Recorder(config.getoption("--record"), config.getoption("--pipelines")))


class _Recorder:
    """Writes each line at once, as the process may be stopped at its time limit; the file is open until its end."""

    def __init__(self, file: str, mode: str) -> None:
        self._file = open(file, "a", encoding="utf-8")  # noqa: SIM115
        self._test = ""
        if mode != "plain":
            Calls(mode == "compared", self._write).watch()

    def _write(self, record: Record) -> None:
        self._file.write(json.dumps({"test": self._test, **record}) + "\n")
        self._file.flush()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Know the test that runs, whose calls come now."""
        self._test = nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Write the outcome of a test: that of its call, or of what came before or after and failed."""
        if report.when == "call" or report.outcome != "passed":
            self._write({"outcome": report.outcome, "message": _message(report), "seconds": round(report.duration, 2)})

    def pytest_collectreport(self, report: Any) -> None:
        """Write that a file was not collected."""
        if report.outcome == "failed":
            self._test = report.nodeid
            self._write({"outcome": "failed", "message": _message(report), "seconds": 0.0})


def _message(report: Any) -> str:
    if report.outcome == "passed":
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message)[:500] if crash is not None else str(report.longrepr)[-500:]
