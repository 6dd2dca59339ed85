"""The decoding engines behind one interface: each engine is a module with these functions."""

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
    """Interface of an engine; all engines give the same texts, tokens, sources and counts."""

    @property
    def TAKES(self) -> Collection[str]:
        """Run options that this engine supports and some other engine does not."""

    @property
    def check(self) -> Callable[[LoadedModel], None]:
        """Check, before any work, that the engine computes the model; raises `AssumptionBroken`."""

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
    """Choose the engine that decodes a model; a fallback of `auto` to hooks is logged once.

    Args:
        name: Name of an engine, or `auto`: the shared one if it computes the model, else the hooked.
        model: The model.

    Raises:
        AssumptionBroken: the engine cannot compute the model.
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
