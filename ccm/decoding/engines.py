"""The ways to decode, behind one interface: each engine is a module that has these functions."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from ccm.decoding import hooked, shared
from ccm.decoding.results import AtLast, Batch, Completions, Decided, Work
from ccm.errors import AssumptionBroken
from ccm.method.ablation import Ablation
from ccm.models.bridge import Tokens
from ccm.models.model import LoadedModel

_log = logging.getLogger(__name__)


@runtime_checkable
class Engine(Protocol):
    """What an engine offers; all give the same texts, tokens, sources and counts."""

    @property
    def TAKES(self) -> Collection[str]:
        """Options of a run that not every engine can follow, and this one can."""

    @property
    def check(self) -> Callable[[LoadedModel], None]:
        """See, before any work, that it computes the model at hand; raises `AssumptionBroken`."""

    @property
    def decode(self) -> Callable[..., Completions]:
        """Decode greedily under one neuron set (`ccm.decoding.hooked.decode`)."""

    def decode_sets(
        self,
        model: LoadedModel,
        prompts: Sequence[Tokens],
        ablations: Sequence[Ablation] = (),
        *,
        targets: Int[Tensor, "prompt target"] | None = None,
        max_new_tokens: int = ...,
        full: Sequence[bool] | None = None,
        decided: Decided = ...,
        own_top: bool = False,
        keep_residual: bool = False,
        at_last: AtLast | None = None,
        memory_budget: int | None = None,
        work: Work | None = None,
        done: Collection[int] = (),
        shard: tuple[int, int] = (1, 1),
    ) -> Iterator[Batch]:
        """Decode under the plain run and every ablation (`ccm.decoding.shared.decode_sets`)."""

    @property
    def read_last_positions(self) -> Callable[..., Iterator[Any]]:
        """Run prompts up to their last positions (`ccm.decoding.shared.read_last_positions`)."""


ENGINES: Mapping[str, Engine] = {"shared": shared, "hooked": hooked}
AUTO = "auto"


def engine_for(name: str, model: LoadedModel) -> Engine:
    """Find the engine that decodes a model; where `auto` falls back on hooks, that is said once.

    Args:
        name: Of an engine, or `auto`: the shared one where it computes the model, else the hooked.
        model: The model.

    Raises:
        AssumptionBroken: the engine does not compute the model.
    """
    if name != AUTO:
        ENGINES[name].check(model)
        return ENGINES[name]
    untried = model.trial is None or model.trial.shared is None
    try:
        shared.check(model)
    except AssumptionBroken as error:
        if untried:
            why = str(error).removesuffix(" Use --engine hooked.")
            _log.warning(f"{why} Decoding by hooks, one pass for every set.")
        hooked.check(model)
        return hooked
    return shared


def name_of(engine: Engine) -> str:
    """Look up the name of an engine."""
    return next(name for name, known in ENGINES.items() if known is engine)
