"""Tell whether other threads of Python may be at work."""

from __future__ import annotations

import _thread
import sys
import threading

_count = _thread._count
_watching: tuple[threading.Thread, ...] = ()
"""Threads that watch tqdm's bars, as they were last looked for."""


def is_alone() -> bool:
    """Tell whether this is the only thread of Python, but for those that watch tqdm's bars and do nothing else."""
    global _watching
    others = _count()  # besides the main thread; this one is among them if it is another
    if others == 0 or others == sum([thread.is_alive() for thread in _watching]):
        return True
    monitor = getattr(sys.modules.get("tqdm._monitor"), "TMonitor", None)
    if monitor is None:
        return False
    _watching = tuple([thread for thread in threading.enumerate() if type(thread) is monitor])
    return others == len(_watching)
