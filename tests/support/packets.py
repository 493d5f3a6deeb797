"""Deals tests out to the processes of a run: files of one group to one process, and the others in packets.

pytest-xdist 3.8 itself finds no groups with pytest 9.2, where it cannot rename tests; and a message takes as long as a
small test.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from xdist.scheduler import LoadGroupScheduling

SIZE = 16


@functools.cache
def group_of(file: Path) -> str | None:
    """Return the first group that a file of tests names; all of its tests are in it."""
    named = re.search(r'\bxdist_group\("([^"]+)"\)', file.read_text()) if file.is_file() else None
    return named and named[1]


class PacketScheduling(LoadGroupScheduling):
    """Sends the tests of a group together, and those of none in packets, in their order."""

    def __init__(self, config, log):
        super().__init__(config, log)
        self._packets = {}

    def _split_scope(self, nodeid):
        group = group_of(self.config.rootpath / nodeid.partition("::")[0])
        return group or self._packets.setdefault(nodeid, f"packet {len(self._packets) // SIZE}")
