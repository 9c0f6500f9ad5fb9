"""What is known of a model beforehand: groups that a family declares, and where nothing needs to be traced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from autoprune.structure import Group


@dataclass(frozen=True, slots=True)
class Claims:
    """Groups that are declared, to be proved like all others, and modules that are not looked into.

    `closed` maps a module to the reason of whatever in it no proved group prunes. `groups` may lie outside of them.
    """

    groups: tuple[Group, ...] = ()
    closed: Mapping[str, str] = field(default_factory=dict)

    def reason(self, module: str) -> str:
        """Why `module` is not traced: that of the innermost closed one that holds it; "" where it is open."""
        path = module
        while True:
            if path in self.closed:
                return self.closed[path]
            if not path:
                return ""
            path = path.rpartition(".")[0]

    def producers(self) -> frozenset[str]:
        """Modules whose outputs are atoms of declared groups."""
        return frozenset(s.tensor.rpartition(".")[0] for g in self.groups for s in g.slices if s.role == "produce")

    def closes_all(self, modules: Iterable[str]) -> bool:
        """Whether nothing is left to trace of `modules`."""
        return all(self.reason(name) for name in modules)


NOTHING = Claims()


def below(name: str, place: str) -> bool:
    """Whether a module is `place` or inside it; "" is the whole model."""
    return not place or name == place or name.startswith(f"{place}.")
