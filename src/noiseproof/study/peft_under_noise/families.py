"""The families that are compared, and the setting that is the capacity of each."""

from __future__ import annotations

from dataclasses import dataclass

from noiseproof.methods import CleaR


@dataclass(frozen=True)
class Family:
    """A family of adapters.

    Attributes:
        name: Value of CleaR's setting ``peft``.
        capacity: Setting that is its capacity; empty where it has none.
        word: What the capacity is called.
    """

    name: str
    capacity: str = ""
    word: str = ""

    def default_capacity(self) -> int | None:
        """Capacity where none is set."""
        return int(getattr(CleaR(), self.capacity)) if self.capacity else None


FAMILIES = {
    family.name: family
    for family in (
        Family("lora", "rank", "rank"),
        Family("adapter", "bottleneck_size", "bottleneck"),
        Family("bitfit"),
        Family("prompt", "num_virtual_tokens", "length"),
        Family("prefix", "num_virtual_tokens", "length"),
    )
}
"""Those that CleaR can route, by name."""
FULL, PROBE = "full", "head"  # full fine-tuning and the linear probe: no families of adapters
STYLES = {FULL: 0, "lora": 1, "adapter": 2, "bitfit": 3, "prompt": 4, "prefix": 5, PROBE: 6}
"""Number of the colour of each; the same, dashed, is that of CleaR on it."""
