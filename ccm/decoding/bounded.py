"""Lists of data-dependent length, without a device synchronisation for each.

On a CPU the places where a mask holds are simply found. On a GPU their number is known only once all
queued work is done, and asking for it makes the host wait. So a list is given a length beforehand, and
unused entries hold a filler, one past the last place; the true lengths are read together, in one
synchronisation, after everything that depends on them has been queued. If a list was too short, the
step is done again with more room: twice what a list of that name needed.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass
class BoundedLists:
    """The lists of the current step, by name."""

    exact: bool  # whether lists have their true lengths; otherwise guessed ones
    _given: dict[str, int] = field(default_factory=dict)
    _least: dict[str, int] = field(default_factory=dict)
    _true: dict[str, Tensor] = field(default_factory=dict)
    _count: dict[str, int] = field(default_factory=dict)
    _guess: dict[str, int] = field(default_factory=dict)
    _short: set[str] = field(default_factory=set)

    def start(self) -> None:
        """Begin a step."""
        for names in (self._given, self._least, self._true, self._count):
            names.clear()
        self._short = set()

    def places(
        self, name: str, mask: Bool[Tensor, "place"], least: int | None = None
    ) -> Int[Tensor, "found"]:
        """Find the places where a mask holds, ascending; on a GPU the fillers are `len(mask)`.

        Args:
            name: Unique within the step, and the same for the corresponding list of other steps.
            mask: The mask.
            least: Initial room. None: as much as there are places. 0: none, nor after a step that
                needed none, for lists that are mostly empty.
        """
        if self.exact:
            found = torch.nonzero(mask)[:, 0]
            self._count[name] = len(found)
            return found
        size = len(mask)
        if least is not None:
            size = min(size, max(least, self._guess.get(name, 0)))
            self._least[name] = least
        rank, place = mask.cumsum(0) - 1, torch.arange(len(mask), device=mask.device)
        # Places without room, and those where the mask is False, go to a spare entry behind the list.
        entry = torch.where(mask & (rank < size), rank, size)
        found = torch.full((size + 1,), len(mask), device=mask.device).scatter_(0, entry, place)
        self._given[name], self._true[name] = size, mask.sum()
        return found[:size]

    def distinct(
        self, name: str, keys: Int[Tensor, "key"], n_keys: int
    ) -> tuple[Int[Tensor, "found"], Int[Tensor, "key"]]:
        """Find the distinct keys, ascending, and each key's place among them.

        Args:
            name: As for `places`.
            keys: From 0 to `n_keys` - 1. On a GPU `n_keys` itself is a filler, whose place means
                nothing.
            n_keys: Number of possible keys.

        Returns:
            The distinct keys, on a GPU with arbitrary keys as fillers, and the places.
        """
        if not self.exact:
            ordered, order = keys.sort()
            new = ordered < n_keys
            new[1:] &= ordered[1:] != ordered[:-1]
            place = torch.empty_like(keys)
            place[order] = (new.cumsum(0) - 1).clamp_min(0)
            found = self.places(name, new)
            return torch.cat([ordered, ordered[:1]])[found].clamp_max(n_keys - 1), place
        found, place = distinct(keys, n_keys)
        self._count[name] = len(found)
        return found, place

    def so_far(self, name: str) -> int | Tensor:
        """Return the true length of a list of this step; on a GPU as a tensor that is not yet read."""
        return self._count[name] if self.exact else self._true[name]

    def holds(self) -> bool:
        """Read the true lengths (a GPU's one synchronisation); return whether every list has room."""
        if self.exact:
            return True
        lengths = torch.stack(list(self._true.values())).tolist()
        self._count = dict(zip(self._true, lengths, strict=True))
        self._short = {name for name, given in self._given.items() if self._count[name] > given}
        for name, least in self._least.items():
            wanted = 2 * self._count[name]
            # If any list is short, the step is done again, so none may lose its room.
            kept = self._guess.get(name, 0) if least > 0 or self._short else 0
            self._guess[name] = max(wanted, kept)
        return not self._short

    def was_short(self, word: str) -> bool:
        """Return whether a list with this word in its name was too short when last read."""
        return any(word in name for name in self._short)

    def count(self, name: str) -> int:
        """Return the true length of a list of this step, 0 if there was none; call `holds` first."""
        return self._count.get(name, 0)

    def total(self, word: str) -> int:
        """Return the total true length of all lists with this word in their names."""
        return sum(count for name, count in self._count.items() if word in name)


def distinct(
    keys: Int[Tensor, "key"], n_keys: int
) -> tuple[Int[Tensor, "distinct"], Int[Tensor, "key"]]:
    """Find the distinct keys below `n_keys`, ascending, and each key's place among them."""
    if n_keys > 32 * len(keys):
        return torch.unique(keys, return_inverse=True)  # type: ignore[no-any-return]
    # Counting beats sorting unless the table is far longer than the list of keys.
    there = torch.zeros(n_keys, dtype=torch.bool, device=keys.device)
    there[keys] = True
    place = there.cumsum(0) - 1
    return torch.nonzero(there)[:, 0], place[keys]
