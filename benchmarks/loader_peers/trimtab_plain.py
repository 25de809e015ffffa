"""Trimtab's stream alone: no thread, a fresh buffer a batch, tokens not held against anything."""

from __future__ import annotations

from loader_peers import trimtab

prepare = trimtab.prepare


class Loader(trimtab.Loader):
    """`SampleStream.at`, as the attribution of spikes calls it."""

    reads_ahead = False
