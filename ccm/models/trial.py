"""Trial of each way to run a model, on three short prompts: does it compute that model?

The hooks of TransformerLens are the reference for everything else, and the shared engine calls
transformers' modules with fewer arguments than usual. Either may get a model wrong (another scale of
ALiBi, positions that a cache has lost) and then silently gives the numbers of another model. So both
are compared with transformers' own forward pass, by measurement and not by a list of names.

1. The truth is the forward pass of the model as it was loaded, before anything was wrapped around it:
   each prompt alone, no cache. Two prompts have the same first half and are long enough for positions
   to matter; one is short.
2. The hooks are tried when a model is loaded, as `ccm.decoding.hooked` runs them. The shared engine is
   tried when it is first needed, as `ccm.decoding.engine` runs the model: prompts of different lengths
   in one cache, their common prefix shared, the last token in a step of its own.
3. Two correct ways differ by rounding. The tolerance is measured on the model at hand: every module's
   output is moved, up or down at random, by a few roundings (`ROUNDINGS`), and the change of the
   results is the tolerance. So a model that amplifies rounding gets a larger one, and none is a number
   that some processor happened to give. Lower precision gets a larger one and hides more.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccm.errors import AssumptionBroken, reason_of
from ccm.models.bridge import FINAL_RESIDUAL, Tokens, equal_length_batches, new_cache, next_logits
from ccm.models.memory import out_of_memory
from ccm.models.model import LoadedModel

LONG, SHORT = 24, 4  # tokens of the prompts
# By how many machine epsilons a module's output is moved. A float32 product is summed in float32: 10^4
# terms in 16 lanes are some 600 roundings in a row, which as a random walk are 25 half-epsilons. In
# lower precision, sums are in float32 and their result is rounded: two ways differ by one epsilon.
ROUNDINGS = {torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}
LOG_PROBS, FINAL, ACTIVATIONS = "log-probabilities", "final residuals", "last-layer activations"

# Results of running the prompts, by name: a row for each position, one prompt after another.
Readings = Mapping[str, Float[Tensor, "row size"]]
Found = Mapping[str, tuple[Int[Tensor, "some"], Float[Tensor, "some size"]]]  # at some of the rows


@dataclass
class Trial:
    """The results of transformers' own forward pass, and how far rounding may move them."""

    prompts: tuple[tuple[int, ...], ...]
    plain: Readings  # at every position
    allowed: Mapping[str, float]  # largest distance, by name of the result
    shared: str | None = None  # why the shared engine cannot run the model; "": it can; None: untried

    def first_row(self, prompt: int) -> int:
        """Return the row of a prompt's first position."""
        return sum(map(len, self.prompts[:prompt]))


def ordinary_tokens(tokenizer: Any, d_vocab: int) -> Int[np.ndarray, "token"]:
    """List the tokens that a text may hold: neither special ones nor ones that only the model has."""
    n = min(len(tokenizer), d_vocab) if hasattr(tokenizer, "__len__") else d_vocab
    found = np.setdiff1d(np.arange(n), list(getattr(tokenizer, "all_special_ids", ())))
    return found if len(found) else np.arange(d_vocab)


def trial_prompts(tokenizer: Any, config: Any, d_vocab: int) -> tuple[tuple[int, ...], ...]:
    """Draw two long prompts with the same first half, and a short one; each begins with BOS, if any."""
    most = getattr(config, "max_position_embeddings", None) or LONG
    long = min(LONG, most) if most > 0 else LONG  # XLNet says -1
    ids, draw = ordinary_tokens(tokenizer, d_vocab), np.random.default_rng(0)
    first, second, brief = (draw.choice(ids, n).tolist() for n in (long, long, min(SHORT, long)))
    second[: long // 2] = first[: long // 2]
    bos = getattr(tokenizer, "bos_token_id", None)
    start = [] if bos is None or bos >= d_vocab else [bos]
    return tuple((*start, *prompt[len(start) :]) for prompt in (first, second, brief))


# --- the truth --------------------------------------------------------------------------------------


@torch.inference_mode()
def plain_log_probs(
    plain: Any, prompts: Sequence[Tokens], device: torch.device
) -> Float[Tensor, "row d_vocab"]:
    """Compute log-probabilities (nats) at every position of prompts that are run one by one.

    Args:
        plain: The transformers model, with nothing wrapped around it.
        prompts: Token ids.
        device: Where the model is.
    """
    return torch.cat([_log_probs(plain, prompt, device) for prompt in prompts])


def _log_probs(plain: Any, prompt: Tokens, device: torch.device) -> Float[Tensor, "row d_vocab"]:
    tokens = torch.tensor([list(prompt)], device=device)
    out = plain(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    log_probs: Tensor = out.logits[0].float().log_softmax(-1)
    return log_probs


def _plain_readings(model: LoadedModel, twin: Any, prompts: Sequence[Tokens]) -> Readings:
    """Run the prompts as `plain_log_probs` does, and read the modules that the shared engine reads."""
    seen: dict[str, Tensor] = {}  # at a module's last call

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
            x = next(iter([*inputs, *named.values()]))
            seen[name] = x.reshape(-1, x.shape[-1]).float()

        return hook

    rows: dict[str, list[Tensor]] = {LOG_PROBS: [], FINAL: [], ACTIVATIONS: []}
    with (
        model.norm.register_forward_pre_hook(keep(FINAL), with_kwargs=True),
        model.mlp_out.register_forward_pre_hook(keep(ACTIVATIONS), with_kwargs=True),
    ):
        for prompt in prompts:
            seen[LOG_PROBS] = _log_probs(twin, prompt, model.device)
            if seen.keys() != rows.keys():
                raise AssumptionBroken(
                    f"{model.spec.name}: refused, transformers runs without the last MLP or the final "
                    "norm that TransformerLens names."
                )
            for name, values in seen.items():
                rows[name].append(values)
    return {name: torch.cat(values) for name, values in rows.items()}


@contextmanager
def _moved(plain: Any, by: float) -> Iterator[None]:
    """Move every innermost module's output, within the block, by a fraction of itself, up or down."""
    draw = torch.Generator().manual_seed(0)

    def move(module: Any, inputs: Any, output: Any) -> Any:
        if not (isinstance(output, Tensor) and output.is_floating_point()):
            return output
        signs = torch.randint(0, 2, output.shape, generator=draw) * 2.0 - 1.0
        return output * (1 + by * signs).to(output)

    with ExitStack() as hooks:
        for module in plain.modules():
            if not list(module.children()):
                hooks.enter_context(module.register_forward_hook(move))
        yield


# --- the hooks --------------------------------------------------------------------------------------


@torch.inference_mode()
def check_hooks(
    model: LoadedModel, twin: Any, prompts: Sequence[Tokens], truth: Float[Tensor, "row d_vocab"]
) -> Trial:
    """Check that hooks, and the modules that the shared engine runs, compute what transformers does.

    Args:
        model: The model.
        twin: The transformers model, including its head, that `model.body` belongs to.
        prompts: The trial's prompts.
        truth: Their `plain_log_probs`, from before the bridge was made.

    Returns:
        The results that the shared engine is compared with later.

    Raises:
        AssumptionBroken: the hooks cannot run the model, or their numbers differ by more than rounding.
    """
    refused = f"{model.spec.name}: refused,"
    if not torch.isfinite(truth).all():
        way_out = "Check its weights" if model.dtype == torch.float32 else "Use --dtype float32"
        raise AssumptionBroken(f"{refused} its logits are not finite. {way_out}.")
    plain = _plain_readings(model, twin, prompts)
    with _moved(twin, ROUNDINGS[model.dtype] * torch.finfo(model.dtype).eps):
        moved = _plain_readings(model, twin, prompts)
    trial = Trial(
        prompts=tuple(map(tuple, prompts)),
        plain={**plain, LOG_PROBS: truth},
        allowed={what: _distance(what, moved[what], plain[what]) for what in plain},
    )
    alike = torch.arange(len(prompts[0]) // 2, device=truth.device)
    if wrong(trial, {LOG_PROBS: (alike, truth[alike + trial.first_row(1)])}):
        raise AssumptionBroken(
            f"{refused} it is no decoder: what it says depends on the words to come."
        )
    try:
        found = _by_hooks(model, trial)
    except Exception as error:  # the libraries may raise anything
        if out_of_memory(error):
            raise
        way_out = "" if model.dtype == torch.float32 else " Use --dtype float32."
        raise AssumptionBroken(
            f"{refused} the hooks of TransformerLens cannot run it ({reason_of(error)}).{way_out}"
        ) from error
    # The twin is checked, too: making the bridge may have changed the weights that both share.
    every = torch.arange(len(truth), device=truth.device)
    different = wrong(trial, {LOG_PROBS: (every, plain[LOG_PROBS])}) or wrong(trial, found)
    if different:
        raise AssumptionBroken(
            f"{refused} decoded with the hooks of TransformerLens it gives other numbers than "
            f"transformers' own forward ({different}), so nothing could be held to them. Give a "
            "checkpoint of another architecture, or install other releases of the two."
        )
    return trial


def _by_hooks(model: LoadedModel, trial: Trial) -> Found:
    """Run the prompts as `decoding.hooked` does: equal lengths together, the last token as a step."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(x: Tensor, hook: Any) -> None:
            seen[name] = x.reshape(-1, x.shape[-1]).float()

        return hook

    hooks = [(FINAL_RESIDUAL, keep(FINAL)), (model.hook_post, keep(ACTIVATIONS))]
    rows: dict[str, list[Tensor]] = {LOG_PROBS: [], FINAL: [], ACTIVATIONS: []}
    found: dict[str, list[Tensor]] = {name: [] for name in rows}
    for indices in equal_length_batches(trial.prompts, len(trial.prompts)):
        tokens = torch.tensor([trial.prompts[i] for i in indices], device=model.device)
        first = torch.tensor([[trial.first_row(i)] for i in indices], device=model.device)
        cache, n = new_cache(model), tokens.shape[1]
        for start, stop in ((0, n - 1), (n - 1, n)):
            with model.bridge.hooks(fwd_hooks=hooks):
                logits = next_logits(model, tokens[:, start:stop], cache)
            at = first + torch.arange(start, stop, device=model.device)  # (prompt, position)
            rows[LOG_PROBS].append(at[:, -1])
            found[LOG_PROBS].append(logits.log_softmax(-1))
            for name, values in seen.items():
                rows[name].append(at.reshape(-1))
                found[name].append(values)
    return {name: (torch.cat(rows[name]), torch.cat(found[name])) for name in rows}


# --- how far apart ----------------------------------------------------------------------------------


def _distance(what: str, found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference: log-probabilities in nats, vectors relative to their length."""
    if what == LOG_PROBS:
        return float((found - wanted).abs().max())
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-30)).max())


def wrong(trial: Trial, found: Found) -> str:
    """Say what differs from transformers' own pass by more than rounding; empty if nothing does."""
    for what, (rows, values) in found.items():
        wanted, most = trial.plain[what], trial.allowed[what]
        shape = (len(rows), wanted.shape[1])
        if values.shape != shape:
            return f"{what} come as {tuple(values.shape)}, not {shape}"
        distance = _distance(what, values.to(wanted.device), wanted[rows.to(wanted.device)])
        if not math.isfinite(distance):
            return f"{what} are no numbers"
        if distance > most:
            unit = "nats" if what == LOG_PROBS else "of their length"
            return f"{what} differ by {distance:.2g} {unit}, and rounding explains {most:.0e}"
    return ""
