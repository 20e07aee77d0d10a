"""Peers: the same job done by other libraries, the way their users would do it.

A peer trains with its own library: no loop, loss or selection of ours. What it is given (rows,
noise, encoding, fresh head, seeds) comes from `Prepared`, so it is exactly what our methods are
given. What it leaves behind is measured and recorded as a run of ours is, so one report reads both.

    job -> Prepared -> peer.fit(work) -> record.json, history.csv, samples.parquet, suspects.csv

Which settings are whose: docs/peers.md.
"""

from __future__ import annotations

from noiseproof.peers.cleanlab import CleanlabProbe, CleanlabPrune
from noiseproof.peers.contract import Fitted, Peer, Work
from noiseproof.peers.running import PEERS, find_peer, run_peer
from noiseproof.peers.trainer import Trainer, TrainerLabelSmoothing, TrainerLoRA

__all__ = [
    "PEERS",
    "CleanlabProbe",
    "CleanlabPrune",
    "Fitted",
    "Peer",
    "Trainer",
    "TrainerLabelSmoothing",
    "TrainerLoRA",
    "Work",
    "find_peer",
    "run_peer",
]
