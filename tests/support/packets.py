"""Deals tests out to the processes of a run in packets, because each message takes as long as a small test."""

from __future__ import annotations

from xdist.scheduler import LoadGroupScheduling

SIZE = 16


class PacketScheduling(LoadGroupScheduling):
    """Sends tests of no group in packets, in their order; xdist itself would make a group of each."""

    def __init__(self, config, log):
        super().__init__(config, log)
        self._packets = {}

    def _split_scope(self, nodeid):
        group = super()._split_scope(nodeid)
        if group != nodeid:
            return group
        return self._packets.setdefault(nodeid, f"packet {len(self._packets) // SIZE}")
