"""Effects on first-token entropy, measured by a decode of one token."""

from collections.abc import Sequence

from ccm.decoding.engines import ENGINES, Engine
from ccm.decoding.next_token import at_once
from ccm.experiment.effects import Effects, EffectsReader, join_effects
from ccm.method.ablation import Ablation
from ccm.models.bridge import Tokens
from ccm.models.model import LoadedModel


def measure_effects(
    model: LoadedModel,
    prompts: Sequence[Tokens],
    own: Sequence[Ablation],
    others: Sequence[Ablation],
    *,
    engine: Engine = ENGINES["shared"],
) -> Effects:
    """Split the effects of `own` at every prompt, and of `others` at the sampled ones."""
    places, n_sets = range(1, 1 + len(own)), 1 + len(own) + len(others)
    reader = EffectsReader(at_once(model), len(prompts), places, n_sets)
    sets = [*own, *others]
    batches = list(engine.decode_sets(model, prompts, sets, at_last=reader, max_new_tokens=1))
    return join_effects(batches, places)
