"""Checkpoints in float64, through plain transformers: what lower precisions are held to.

How far one float32 computation lies from them on this machine says how far another may, and which
choices of a token another may make otherwise.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ccm.method.ablation import PLAIN, Ablation
from ccm.models.model import LoadedModel
from ccm.models.specs import MAX_NEW_TOKENS
from tests.tolerance import FLOOR, TIMES, Tolerance, of_rounding

# The last down-projection and the final norm, whose inputs are `hook_post` and the final residual.
MODULES = {
    "gpt2": ("transformer.h.{}.mlp.c_proj", "transformer.ln_f"),
    "gpt_neox": ("gpt_neox.layers.{}.mlp.dense_4h_to_h", "gpt_neox.final_layer_norm"),
    "phi": ("model.layers.{}.mlp.fc2", "model.final_layernorm"),
    "mistral": ("model.layers.{}.mlp.down_proj", "model.norm"),
    "llama": ("model.layers.{}.mlp.down_proj", "model.norm"),
}
Tokens = Sequence[int]
PROMPTS, LENGTH = 8, 24  # that margins are taken from
EPS = torch.finfo(torch.float32).eps


@functools.cache
def plain_transformers(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    """A checkpoint as transformers runs it; read-only.

    In float64 all of it is, the norms and angles too, which transformers computes in float32 otherwise.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = functools.partial(_rms_norm, module)
            if type(module).__name__.endswith("RotaryEmbedding"):
                module.forward = functools.partial(_rotary, module)
    return model


def _rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def _rotary(module: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
    angles = position_ids[..., None].double() * module.inv_freq  # (row, position, half)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling


def down_projection(model: Any) -> torch.nn.Module:
    """The last layer's, of a plain transformers model."""
    path = MODULES[model.config.model_type][0].format(model.config.num_hidden_layers - 1)
    module: torch.nn.Module = model.get_submodule(path)
    return module


def final_norm(model: Any) -> torch.nn.Module:
    """The norm before the unembedding of a plain transformers model."""
    module: torch.nn.Module = model.get_submodule(MODULES[model.config.model_type][1])
    return module


@dataclass(frozen=True)
class Forward:
    """What one forward pass gives at every position of every prompt."""

    x: torch.Tensor  # (prompt, position, d_model): the final residual
    a: torch.Tensor  # (prompt, position, d_mlp): `hook_post` of the last layer, before ablation
    logits: torch.Tensor  # (prompt, position, d_vocab)

    @property
    def log_probs(self) -> torch.Tensor:
        """Log-probabilities, in float32 at least."""
        logits = self.logits if self.logits.dtype == torch.float64 else self.logits.float()
        return logits.log_softmax(-1)

    @property
    def entropy(self) -> torch.Tensor:
        """Entropies (prompt, position), nats."""
        return -(self.log_probs.exp() * self.log_probs).sum(-1)


def forward(
    folder: str,
    prompts: Sequence[Tokens],
    dtype: torch.dtype = torch.float64,
    ablations: Sequence[Ablation] = (),
) -> Forward:
    """Run prompts through the plain model.

    Args:
        folder: The checkpoint.
        prompts: Token ids. Shorter ones are filled up on the right, which they do not see.
        dtype: Of weights and activations.
        ablations: One for each prompt, or none.
    """
    model, seen = plain_transformers(folder, dtype), dict[str, torch.Tensor]()
    longest = max(map(len, prompts))
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])

    def ablate(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen["a"], replaced = inputs[0], inputs[0].clone()
        for row, ablation in zip(replaced, ablations, strict=False):
            row[:, list(ablation.neurons)] = torch.tensor(ablation.values, dtype=dtype)
        return (replaced,)

    def keep(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen["x"] = inputs[0]

    with _hooks((down_projection(model), ablate), (final_norm(model), keep)), torch.inference_mode():
        logits = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    return Forward(seen["x"], seen["a"], logits)


@contextmanager
def _hooks(*pairs: tuple[torch.nn.Module, Any]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- margins ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Margins:
    """How far other computations of a forward pass may lie from the exact one, or from each other."""

    x: Tolerance
    a: Tolerance
    logits: Tolerance
    log_prob: Tolerance
    entropy: Tolerance
    lead: float  # nats by which a choice may lead and be another one in another computation
    relative: float  # of final residuals: the largest |dx| / |x|


def margins_from(seen: Forward, exact: Forward, *, times: float = TIMES) -> Margins:
    """Take margins from one computation of a forward pass and the exact one."""
    one = {
        name: of_rounding(
            of, getattr(seen, name), getattr(exact, name), times=times, dtype=seen.logits.dtype
        )
        for name, of in {
            "x": "final residual",
            "a": "activation",
            "logits": "logit",
            "log_probs": "log-probability",
            "entropy": "entropy",
        }.items()
    }
    likely = exact.logits.topk(2).indices
    leads = [-of.logits.double().gather(-1, likely).diff().squeeze(-1) for of in (seen, exact)]
    size = float(exact.logits.abs().max())
    off = (seen.x.double() - exact.x).norm(dim=-1) / exact.x.norm(dim=-1)
    return Margins(
        x=one["x"],
        a=one["a"],
        logits=one["logits"],
        log_prob=one["log_probs"],
        entropy=one["entropy"],
        lead=times * float((leads[0] - leads[1]).abs().max()) + FLOOR * EPS * size,
        relative=times * float(off.max()) + FLOOR * EPS,
    )


@functools.cache
def margins_of(folder: str, dtype: torch.dtype = torch.float32, times: float = TIMES) -> Margins:
    """The margins of a checkpoint's numbers on this machine, from a few random prompts."""
    config = plain_transformers(folder, torch.float64).config
    draw = torch.Generator().manual_seed(0)
    length = min(LENGTH, config.max_position_embeddings)
    prompts = torch.randint(0, config.vocab_size, (PROMPTS, length), generator=draw).tolist()
    return margins_from(forward(folder, prompts, dtype), forward(folder, prompts), times=times)


def margins(model: LoadedModel) -> Margins:
    """The margins of a loaded model's numbers, from the checkpoint it was loaded from."""
    return margins_of(model.source)


# --- choices ----------------------------------------------------------------------------------------


def lead(model: LoadedModel, prefix: Tokens, ablation: Ablation = PLAIN) -> float:
    """By how many nats the most likely token leads after a prefix, exactly."""
    first, second = forward(model.source, [prefix], ablations=[ablation]).logits[0, -1].topk(2).values
    return float(first - second)


def clear(
    model: LoadedModel, prompts: Sequence[Tokens], ablations: Sequence[Ablation] = (PLAIN,)
) -> list[Tokens]:
    """The prompts whose every greedy choice, under every ablation, is the same on any machine.

    Of the others some choice leads by no more than rounding may move it.
    """
    rows = [(i, ablation) for i in range(len(prompts)) for ablation in ablations]
    tokens, live, near = [list(prompts[i]) for i, _ in rows], set(range(len(rows))), set[int]()
    for _ in range(MAX_NEW_TOKENS):
        ordered = sorted(live)
        if not ordered:
            break
        done = forward(
            model.source,
            [tokens[row] for row in ordered],
            ablations=[rows[row][1] for row in ordered],
        )
        for row, logits in zip(ordered, done.logits, strict=True):
            likely = logits[len(tokens[row]) - 1].topk(2)
            if likely.values[0] - likely.values[1] < margins(model).lead:
                near.add(rows[row][0])
            token = int(likely.indices[0])
            tokens[row].append(token)
            if token in model.eos:
                live.remove(row)
    return [prompt for i, prompt in enumerate(prompts) if i not in near]
