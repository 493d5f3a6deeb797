"""Know the functions in which a thread of Python does nothing but wait, so that it does not draw from a generator.

A thread executes one of them if that is its innermost frame: what they call is of C, and waits for a lock or for data.
Only a pool's thread may also call what the pool was given to begin with, which may be of C too: where there is such, it
is not known to wait.
"""

from __future__ import annotations

import concurrent.futures.thread
import multiprocessing.connection
import selectors
import sys
import threading
from types import CodeType

_FUNCTIONS = (
    (threading.Condition, "wait"),  # of events, barriers and queues too; threads that watch tqdm's bars are in it
    (threading.Thread, "join"),
    (threading.Thread, "_wait_for_tstate_lock"),  # up to Python 3.12
    (concurrent.futures.thread, "_worker"),  # between two tasks
    (multiprocessing.connection.Connection, "_recv"),
    (selectors.SelectSelector, "select"),
    (getattr(selectors, "PollSelector", None), "select"),
    (getattr(selectors, "EpollSelector", None), "select"),  # of event loops
    (getattr(selectors, "KqueueSelector", None), "select"),
)
_LATER = (
    ("ipykernel.heartbeat", "Heartbeat", "run"),
    ("torch._inductor.compile_worker.subproc_pool", None, "_recv_msg"),  # of processes that compile
)
"""Module, class and name of functions that wait, of modules that may be imported or not."""


def _wait(owner: object, name: str) -> list[tuple[CodeType, str | None]]:
    code = getattr(getattr(owner, name, None), "__code__", None)
    if code is None:
        return []
    return [(code, "initializer" if "initializer" in code.co_varnames else None)]


WAITS = [wait for owner, name in _FUNCTIONS for wait in _wait(owner, name)]
"""Their code, and the name of what has to be ``None``. The library reads this list at each draw."""


def know_waits() -> None:
    """Look for functions of modules that have been imported since."""
    for module, owner, name in _LATER:
        found = sys.modules.get(module)
        for wait in _wait(found if owner is None else getattr(found, owner, None), name):
            if wait not in WAITS:
                WAITS.append(wait)
