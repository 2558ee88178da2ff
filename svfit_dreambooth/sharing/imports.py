"""What became of a file of another kind that was turned into an adapter."""

from dataclasses import dataclass, field

from svfit_dreambooth.adapter.file import Adapter


@dataclass
class Import:
    """The adapter, and what it could not take over."""

    adapter: Adapter
    unfit: dict[str, str] = field(default_factory=dict)  # tensor -> why it has no place in an adapter
    lost: float = 0.0  # relative part of the change of the layers taken over that lies off the adapter's directions
    lost_by_component: dict[str, float] = field(default_factory=dict)  # the same of each
    left_out: float = 0.0  # relative part of the whole change that the tensors without a place hold, where it is known

    def lines(self) -> list[str]:
        """In plain words."""
        lines = [f"{len(self.adapter.shifts)} layers taken over, {self.lost:.2%} of their change is lost"]
        if len(self.lost_by_component) > 1:
            lines.append("lost of each: " + shares(self.lost_by_component))
        share = f", {self.left_out:.1%} of the whole change" if self.left_out else ""
        return lines + ([f"not taken over: {kinds(self.unfit)}{share}"] if self.unfit else [])


def shares(parts: dict[str, float]) -> str:
    """Parts in percent, by name."""
    return ", ".join(f"{name} {part:.2%}" for name, part in parts.items())


def kinds(unfit: dict[str, str]) -> str:
    """How many tensors of each kind have no place."""
    counts: dict[str, int] = {}
    for kind in unfit.values():
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
