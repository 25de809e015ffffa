"""The loaders that `benchmarks/loaders.py` measures: one small adapter each.

An adapter module has `prepare(folder, tokens_folder, workload)`, which writes the loader's own
format once, and a class `Loader`, see `loader_peers.contract`. The loader's own package is imported
there and nowhere else: this file is read by interpreters that have none of them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One loader. `divisor`: it is measured on this fraction of the corpus, being slow.

    `distribution`: what must be installed, None if nothing but Trimtab's own requirements.
    `measures`: `all`, or `rate` where resuming and ordering mean nothing.
    """

    name: str
    module: str
    distribution: str | None = None
    install: str = ""
    divisor: int = 1
    measures: str = "all"
    remark: str = ""


PEERS = (
    Peer(name="limit, int64", module="limit_int64", measures="rate"),
    Peer(name="limit, uint16", module="limit_uint16", measures="rate"),
    Peer(name="Trimtab", module="trimtab", remark="read ahead by a thread, as in a run"),
    Peer(name="Trimtab, no thread", module="trimtab_plain", remark="SampleStream.at alone"),
    Peer(
        name="Trimtab, boundaries",
        module="trimtab_documents",
        measures="rate",
        remark="data.isolates_documents",
    ),
    Peer(
        name="Trimtab, 1T tokens",
        module="trimtab_huge",
        measures="rate",
        remark="a hole of 2 TB: the kernel makes each page at its first touch, which is its rate",
    ),
    Peer(name="nanoGPT", module="nanogpt", remark="its recipe; it has no package"),
    Peer(
        name="Megatron-core",
        module="megatron_gpt",
        distribution="megatron-core",
        install="megatron-core",
        remark="sampler of megatron.training",
    ),
    Peer(name="OLMo-core", module="olmo", distribution="ai2-olmo-core", install="ai2-olmo-core"),
    Peer(
        name="mosaicml-streaming",
        module="mosaic",
        distribution="mosaicml-streaming",
        install="mosaicml-streaming",
        remark="num_canonical_nodes=64 by hand; ranks 1-7 simulated by torch's fake backend",
    ),
    Peer(name="litdata", module="litdata_tokens", distribution="litdata", install="litdata"),
    Peer(
        name="HF streaming + StatefulDataLoader",
        module="hf_stream",
        distribution="torchdata",
        install="datasets torchdata",
        remark="Parquet, 64 files, shuffle buffer of 1,000; without its pause of 5 s at each close",
    ),
    Peer(
        name="torchtitan",
        module="titan",
        distribution="torchtitan",
        install="torchtitan",
        divisor=40,
        remark="tokenises live; measured on a 40th of the corpus, its skip is multiplied by 40",
    ),
    Peer(
        name="grain",
        module="grain_rows",
        distribution="grain",
        install="grain",
        remark="a source of our own: it has no token format",
    ),
    Peer(
        name="nanotron Nanoset",
        module="nanoset",
        distribution="nanotron",
        install="git+https://github.com/huggingface/nanotron datatrove==0.5.0",
        remark="without its collator, which needs a GPU's packages",
    ),
)


def peer_of(module: str) -> Peer:
    """Return the peer whose adapter this is."""
    return next(peer for peer in PEERS if peer.module == module)
