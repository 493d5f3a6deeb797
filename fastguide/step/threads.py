"""Tell whether other threads of Python may be at work."""

from __future__ import annotations

import _thread
import sys
import threading

_count = _thread._count


def is_alone() -> bool:
    """Tell whether this is the only thread of Python, but for those that watch tqdm's bars and do nothing else."""
    others = _count()  # besides the main thread, of which this is one if it is not that
    return others == 0 or others == _watching()


def _watching() -> int:
    monitor = getattr(sys.modules.get("tqdm._monitor"), "TMonitor", None)
    return 0 if monitor is None else sum(type(thread) is monitor for thread in threading.enumerate())
