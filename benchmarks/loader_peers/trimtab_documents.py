"""Trimtab with data.isolates_documents: each batch says where documents begin in its rows."""

from __future__ import annotations

from loader_peers import trimtab

prepare = trimtab.prepare


class Loader(trimtab.Loader):
    """All else as in a run."""

    isolates_documents = True
