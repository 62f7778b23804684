"""Nested circuits measured in the sparse model: alone, in random supersets, against an adversary, deleted; and what backs them up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NestedCircuit:
    """One of the nested circuits, and what was measured of it; sizes count leaves, never groups.

    asked is the normalised faithfulness that the search was held to, None for the whole distribution; faithfulness what is
    reached, two-sided, miss the distance from the model's d in nats, kl that of the next-token distribution. supersets_* are the
    mean and lowest faithfulness, and the rms of the miss as a share of the span, of random supersets; adversary is the lowest
    that 20 sign steps on one mask of outside nodes find. left is the share of the span that remains when the circuit is deleted,
    error_share that which flows through its errors. within tells whether all that the search asks is met.
    """

    asked: float | None
    nodes: int
    errors: int
    faithfulness: float
    miss: float
    kl: float
    supersets_mean: float
    supersets_rms: float
    supersets_worst: float
    adversary: float | None
    left: float
    error_share: float
    within: bool


@dataclass(frozen=True)
class Backup:
    """What keeps up the answer where a circuit is deleted: how many other nodes have to go as well, and the strongest of them.

    left is the share of the span that remains without the circuit.
    """

    left: float
    nodes: int
    strongest: tuple[str, ...]
