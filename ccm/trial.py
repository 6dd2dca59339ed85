"""Whether each way to run a model computes that model: tried on three short prompts.

The hooks of TransformerLens are the reference that everything else is held to, and the fast path runs
transformers' modules in an order of its own. Either may tell a model wrongly (ALiBi scaled twice, an MLP
that wants more than its input), and then its numbers are those of another model, without a word. So both
are held to transformers' own forward, by measurement and not by a list of names.

1. The truth is the forward of the model as it was loaded, before anything was wrapped around it: each
   prompt alone, no cache. Two prompts are long enough for positions to matter and begin alike; one is
   short.
2. The hooks are tried when a model is loaded, as `ccm.hooked` runs them; the fast path when the shared
   engine is asked for, as `ccm.engine` runs it: prompts of unlike lengths in one cache, what they begin
   with shared, the last token in a step of its own.
3. Two right ways differ by rounding, and how far is measured on the model at hand: every module's output
   is moved, up or down at random, by as much as a few roundings would (`ROUNDINGS`), and what that does
   to the results is what is allowed. A model that amplifies rounding is given more room, a device or a
   kernel is not asked.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccm.completions import Tokens, equal_length_batches
from ccm.errors import PremiseBroken
from ccm.forward import RowCache, run_body
from ccm.hooked import FINAL_RESIDUAL, new_cache, next_logits
from ccm.loaded import LoadedModel
from ccm.memory import out_of_memory
from ccm.prefill import prefill

LONG, SHORT = 24, 4  # tokens of the prompts
# By how many machine epsilons a module's output is moved. In float32 a product is a sum in float32: one
# of 10^4 terms, in lanes of some 16, is rounded some 600 times one after another, which as a random walk
# comes to 25 half-epsilons. In lower precision sums are float32's, and their result is rounded once.
ROUNDINGS = {torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}

# What a way of running gives at some positions, by what it is: a row for each. Rows of all prompts follow
# one another.
Readings = Mapping[str, Float[Tensor, "row size"]]
Found = Mapping[str, tuple[Int[Tensor, "some"], Float[Tensor, "some size"]]]  # of these rows only
LOG_PROBS, FINAL, ACTIVATIONS = "log-probabilities", "final residuals", "last-layer activations"


@dataclass
class Trial:
    """What a model's plain forward gave, and how far from it rounding may lead."""

    prompts: tuple[tuple[int, ...], ...]
    plain: Readings  # at every position
    allowed: Mapping[str, float]  # largest distance, by what is read
    shared_holds: bool = False  # the fast path was tried, and agrees


def ordinary_tokens(tokenizer: Any, d_vocab: int) -> np.ndarray:
    """Token ids that a text may hold: no special ones, and no row of the model beyond the tokenizer's."""
    n = min(len(tokenizer), d_vocab) if hasattr(tokenizer, "__len__") else d_vocab
    found = np.setdiff1d(np.arange(n), list(getattr(tokenizer, "all_special_ids", ())))
    return found if len(found) else np.arange(d_vocab)


def trial_prompts(tokenizer: Any, config: Any, d_vocab: int) -> tuple[tuple[int, ...], ...]:
    """Draw two long prompts that share their first half, and a short one; a BOS, if any, in front."""
    most = getattr(config, "max_position_embeddings", None) or LONG
    long = min(LONG, most) if most > 0 else LONG  # XLNet says -1
    short = min(SHORT, long)
    ids, draw = ordinary_tokens(tokenizer, d_vocab), np.random.default_rng(0)
    first, second, brief = (draw.choice(ids, n).tolist() for n in (long, long, short))
    second[: long // 2] = first[: long // 2]
    bos = getattr(tokenizer, "bos_token_id", None)
    start = [] if bos is None or bos >= d_vocab else [bos]
    return tuple(tuple([*start, *p[len(start) :]]) for p in (first, second, brief))


# --- the truth ------------------------------------------------------------------------------------------


@torch.inference_mode()
def plain_log_probs(
    plain: Any, prompts: Sequence[Tokens], device: torch.device
) -> Float[Tensor, "row d_vocab"]:
    """Log-probabilities of a transformers model as it is, at every position of prompts run alone."""
    return torch.cat([_log_probs(plain, prompt, device) for prompt in prompts])


def _log_probs(plain: Any, prompt: Tokens, device: torch.device) -> Float[Tensor, "row d_vocab"]:
    tokens = torch.tensor([list(prompt)], device=device)
    out = plain(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    log_probs: Tensor = out.logits[0].float().log_softmax(-1)
    return log_probs


def _plain_readings(model: LoadedModel, twin: Any, prompts: Sequence[Tokens]) -> Readings:
    """The same, with what the fast path reads off the modules."""
    seen: dict[str, Tensor] = {}  # by a module's last call

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0].reshape(-1, inputs[0].shape[-1]).float()

        return hook

    hooks = [
        model.norm.register_forward_pre_hook(keep(FINAL)),
        model.mlp_out.register_forward_pre_hook(keep(ACTIVATIONS)),
    ]
    rows: dict[str, list[Tensor]] = {LOG_PROBS: [], FINAL: [], ACTIVATIONS: []}
    try:
        for prompt in prompts:
            seen[LOG_PROBS] = _log_probs(twin, prompt, model.device)
            for name, values in seen.items():
                rows[name].append(values)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(values) for name, values in rows.items()}


@contextmanager
def _moved(plain: Any, by: float) -> Iterator[None]:
    """Within it, every innermost module's output is moved by a part of itself, up or down at random."""
    draw = torch.Generator().manual_seed(0)

    def move(module: Any, inputs: Any, output: Any) -> Any:
        if not (isinstance(output, Tensor) and output.is_floating_point()):
            return output
        signs = torch.randint(0, 2, output.shape, generator=draw) * 2.0 - 1.0
        return output * (1 + by * signs).to(output)

    hooks = [m.register_forward_hook(move) for m in plain.modules() if not list(m.children())]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- the two ways to run ----------------------------------------------------------------------------------


def check_hooks(
    model: LoadedModel, twin: Any, prompts: Sequence[Tokens], truth: Float[Tensor, "row d_vocab"]
) -> Trial:
    """Hold the hooks, and the modules that the fast path runs, to what transformers computes.

    Args:
        model: The model.
        twin: The transformers model, head and all, that `model.body` belongs to.
        prompts: The trial's.
        truth: `plain_log_probs` of them, from before the bridge was made.

    Returns:
        What the fast path is held to later.

    Raises:
        PremiseBroken: they cannot run it, or give other numbers than rounding explains.
    """
    name = model.spec.name
    if not torch.isfinite(truth).all():
        what_next = "Check its weights" if model.dtype == torch.float32 else "Use --dtype float32"
        raise PremiseBroken(f"{name}: refused, its logits are not finite. {what_next}.")
    with torch.inference_mode():
        plain = _plain_readings(model, twin, prompts)
        with _moved(twin, ROUNDINGS[model.dtype] * torch.finfo(model.dtype).eps):
            moved = _plain_readings(model, twin, prompts)
        trial = Trial(
            prompts=tuple(map(tuple, prompts)),
            plain={**plain, LOG_PROBS: truth},
            allowed={what: _distance(what, moved[what], plain[what]) for what in plain},
        )
        half = len(prompts[0]) // 2
        begin = torch.arange(half, device=truth.device)
        if _wrong(trial, {LOG_PROBS: (begin, truth[len(prompts[0]) :][:half])}):
            raise PremiseBroken(
                f"{name}: refused, what it says after a word depends on the words that follow: it is no "
                "decoder."
            )
        try:
            found = _by_hooks(model, prompts)
        except Exception as error:  # the libraries raise what they like
            if out_of_memory(error):
                raise
            ways = "" if model.dtype == torch.float32 else " Use --dtype float32."
            raise PremiseBroken(
                f"{name}: refused, the hooks of TransformerLens cannot run it ({reason_of(error)}).{ways}"
            ) from error
    # The twin, too: making the bridge may have changed the weights that both share.
    every = torch.arange(len(truth), device=truth.device)
    wrong = _wrong(trial, {LOG_PROBS: (every, plain[LOG_PROBS])}) or _wrong(trial, found)
    if wrong:
        raise PremiseBroken(
            f"{name}: refused, decoded with the hooks of TransformerLens it gives other numbers than by "
            f"transformers' own forward ({wrong}), so nothing could be held to them. Give a checkpoint "
            "of another architecture, or install other releases of the two."
        )
    return trial


def check_engine(model: LoadedModel, engine: str) -> None:
    """See that an engine can run a model, before any work; see `check_shared`."""
    if engine == "shared":
        check_shared(model)


def check_shared(model: LoadedModel) -> None:
    """Hold the fast path to what transformers computes; once for a model.

    Raises:
        PremiseBroken: it cannot run the model, or gives other numbers than rounding explains.
    """
    trial = model.trial
    if trial is None or trial.shared_holds:
        return
    try:
        with torch.inference_mode():
            why = next(filter(None, (_wrong(trial, found) for found in _by_body(model, trial))), "")
    except Exception as error:  # modules that want more than their input raise what they like
        if out_of_memory(error):
            raise
        why = reason_of(error)
    if why:
        raise PremiseBroken(
            f"{model.spec.name}: the shared engine cannot run it ({why}). Use --engine hooked."
        )
    trial.shared_holds = True


def _by_hooks(model: LoadedModel, prompts: Sequence[Tokens]) -> Found:
    """As `ccm.hooked` runs them: prompts of equal length together, the last token in a step."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(x: Tensor, hook: Any) -> None:
            seen[name] = x.detach().reshape(-1, x.shape[-1]).float()

        return hook

    hooks = [(FINAL_RESIDUAL, keep(FINAL)), (model.hook_post, keep(ACTIVATIONS))]
    starts = np.cumsum([0, *map(len, prompts)])
    rows: dict[str, list[Tensor]] = {LOG_PROBS: [], FINAL: [], ACTIVATIONS: []}
    found: dict[str, list[Tensor]] = {name: [] for name in rows}
    for indices in equal_length_batches(prompts, len(prompts)):
        tokens = torch.tensor([list(prompts[i]) for i in indices], device=model.device)
        first = torch.tensor([int(starts[i]) for i in indices], device=model.device)
        cache, n = new_cache(model), tokens.shape[1]
        for start, stop in ((0, n - 1), (n - 1, n)):
            with model.bridge.hooks(fwd_hooks=hooks):
                logits = next_logits(model, tokens[:, start:stop], cache)
            at = first[:, None] + torch.arange(start, stop, device=model.device)
            rows[LOG_PROBS].append(at[:, -1])
            found[LOG_PROBS].append(logits.log_softmax(-1))
            for name, values in seen.items():
                rows[name].append(at.reshape(-1))
                found[name].append(values)
    return {name: (torch.cat(rows[name]), torch.cat(found[name])) for name in rows}


def _by_body(model: LoadedModel, trial: Trial) -> Iterator[Found]:
    """As `ccm.engine` runs them: all lengths in one cache, with shared prefixes or watching all."""
    lengths = [len(p) - 1 for p in trial.prompts]
    half = lengths[0] // 2
    for last_only, shared in ((True, [half, half, 0]), (False, [0, 0, 0])):
        # Sorted by what comes after the prefix.
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i] - shared[i], i))
        begins = [trial.prompts[i][:-1] for i in order]
        begun, cache = (RowCache(model.spec.n_layers) for _ in range(2))
        end, all_rows = max(lengths), slice(0, len(order))
        cache.reserve(len(order), end + 1)
        forward = partial(run_body, model, last_only=last_only)
        at_once = len(order) * end
        read = prefill(begins, [shared[i] for i in order], begun, cache, forward, model.device, at_once)
        starts = np.cumsum([0, *map(len, trial.prompts)])
        rows = torch.tensor([int(starts[i]) + lengths[i] - 1 for i in order], device=model.device)
        yield _read(model, rows, *read)
        tokens = torch.tensor([[trial.prompts[i][-1]] for i in order], device=model.device)
        positions = torch.tensor([lengths[i] for i in order], device=model.device)
        x, a = forward(tokens, cache.window(all_rows, 0, end), positions)
        yield _read(model, rows + 1, x[:, -1], a[:, -1])
    tokens = torch.tensor([list(trial.prompts[0])], device=model.device)
    x, a = run_body(model, tokens)
    yield _read(model, torch.arange(len(trial.prompts[0]), device=model.device), x[0], a[0])


def _read(model: LoadedModel, rows: Tensor, x: Tensor, a: Tensor) -> Found:
    logits = model.final_norm(x.float()) @ model.W_U.float() + model.b_U
    return {
        LOG_PROBS: (rows, logits.log_softmax(-1)),
        FINAL: (rows, x.float()),
        ACTIVATIONS: (rows, a.float()),
    }


# --- how far apart ------------------------------------------------------------------------------------------


def _distance(what: str, found: Tensor, wanted: Tensor) -> float:
    """Largest difference: of log-probabilities in nats, of vectors as a part of their length."""
    if what == LOG_PROBS:
        return float((found - wanted).abs().max())
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-30)).max())


def _wrong(trial: Trial, found: Found) -> str:
    """Say what is further from the plain forward than rounding explains, if anything is."""
    for what, (rows, values) in found.items():
        wanted = trial.plain[what]
        if values.shape != (len(rows), wanted.shape[1]):
            return f"{what} come as {tuple(values.shape)}, not {(len(rows), wanted.shape[1])}"
        distance = _distance(what, values.to(wanted.device), wanted[rows.to(wanted.device)])
        if not math.isfinite(distance):
            return f"{what} are no numbers"
        if distance > trial.allowed[what]:
            unit = "nats" if what == LOG_PROBS else "of their length"
            return f"{what} differ by {distance:.2g} {unit}, and rounding explains {trial.allowed[what]:.0e}"
    return ""


def reason_of(error: Exception) -> str:
    """What a library's error says, by its first sentence: some go on to list all there is."""
    words = " ".join(str(error).split()).partition(". ")[0]
    return f"{type(error).__name__}: {words}"[:160].rstrip(" :.")
