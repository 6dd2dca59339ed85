"""Lists whose length depends on the data, without a wait for the device at each.

On a CPU a mask's places are found and that is all. On a GPU their number is known only once everything
before it is done, and asking for it makes the host wait. So a list is given a length beforehand, and
what of it is left over is filled with the place behind the last; the true lengths are read together, in
one synchronisation, after everything that depends on them has been queued. Where a list was too short,
all of it is done again with more room; a list gets twice the most that its like ever had.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass
class BoundedLists:
    """The lists of one step at a time, by name."""

    exact: bool  # lists are as long as they must be; otherwise as long as they are guessed to be
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
        """Places where a mask holds, ascending; on a GPU filled up with `len(mask)`.

        Args:
            name: Unlike that of any other list of the step, like that of its kin in other steps.
            mask: The mask.
            least: Room to begin with. None: as much as there are places. 0: none, and none after a
                step that needed none, for what happens now and then.
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
        # What finds no room, and what is not looked for, goes to a spare entry behind the list.
        entry = torch.where(mask & (rank < size), rank, size)
        found = torch.full((size + 1,), len(mask), device=mask.device).scatter_(0, entry, place)
        self._given[name], self._true[name] = size, mask.sum()
        return found[:size]

    def distinct(
        self, name: str, keys: Int[Tensor, "key"], n_keys: int
    ) -> tuple[Int[Tensor, "found"], Int[Tensor, "key"]]:
        """Distinct keys, ascending, and each key's place among them.

        Args:
            name: As for `places`.
            keys: From 0 to `n_keys` - 1. On a GPU, where a list may hold fillers, `n_keys` itself is no
                key, and its place means nothing.
            n_keys: How many there could be.

        Returns:
            On a GPU the distinct keys are filled up with some key.
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
        """True length of a list of this step, perhaps still on its way."""
        return self._count[name] if self.exact else self._true[name]

    def holds(self) -> bool:
        """Read the true lengths, which is a GPU's one synchronisation, and say whether they fit."""
        if self.exact:
            return True
        lengths = torch.stack(list(self._true.values())).tolist()
        self._count = dict(zip(self._true, lengths, strict=True))
        self._short = {name for name, given in self._given.items() if self._count[name] > given}
        for name, least in self._least.items():
            wanted = 2 * self._count[name]
            # While any list is short, the step is made again: none of them may lose its room.
            kept = self._guess.get(name, 0) if least > 0 or self._short else 0
            self._guess[name] = max(wanted, kept)
        return not self._short

    def was_short(self, word: str) -> bool:
        """Whether a list with this word in its name was too short when last read."""
        return any(word in name for name in self._short)

    def count(self, name: str) -> int:
        """True length of a list of this step, or 0 where there was none, once `holds` was asked."""
        return self._count.get(name, 0)

    def total(self, word: str) -> int:
        """True length of all lists with this word in their names."""
        return sum(count for name, count in self._count.items() if word in name)


def distinct(
    keys: Int[Tensor, "key"], n_keys: int
) -> tuple[Int[Tensor, "distinct"], Int[Tensor, "key"]]:
    """Distinct keys below `n_keys`, ascending, and each key's place among them."""
    if n_keys > 32 * len(keys):
        return torch.unique(keys, return_inverse=True)  # type: ignore[no-any-return]
    # Counting beats sorting where the table is no larger than the keys are many.
    there = torch.zeros(n_keys, dtype=torch.bool, device=keys.device)
    there[keys] = True
    place = there.cumsum(0) - 1
    return torch.nonzero(there)[:, 0], place[keys]
