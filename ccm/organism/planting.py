"""The two phases of the training: a copier, then the planted neurons that hold it back.

The construction of a null space of the unembedding, and of neurons that write mostly into it,
follows what entropy neurons are in trained models (Stolfo et al., arXiv 2406.16254, section 3).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

__all__ = ["Settings", "new_model", "null_directions", "one_thread", "train_copier", "train_planted"]


@dataclass(frozen=True)
class Settings:
    """Every number of the training."""

    seed: int = 11
    vocabulary: int = 600
    layers: int = 2
    d_model: int = 96
    heads: int = 4
    d_mlp: int = 384
    positions: int = 128
    rows: int = 16  # sequences per step
    length: int = 96  # tokens per sequence
    copier_steps: int = 6000
    copier_rate: float = 3e-3
    decay: float = 0.1  # on matrices only
    planted: tuple[int, ...] = (29, 97, 168, 211, 307, 352)  # neurons of the last layer
    null_dims: int = 4  # without the all-ones direction, which centring adds
    planted_steps: int = 1000
    planted_rate: float = 2e-3
    null_norm: float = 2.0  # of a planted output weight inside the null space
    leak: float = 0.15  # largest norm outside it, relative to `null_norm`
    floor: float = 0.02  # the null space's singular values at the end, relative to the next one


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so that sums keep their order, then restore the count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def new_model(settings: Settings, generator: torch.Generator) -> GPT2LMHeadModel:
    """Make a GPT-2 with weights drawn from `generator`; the final norm's gain is 1 and stays so."""
    config = GPT2Config(
        vocab_size=settings.vocabulary,
        n_positions=settings.positions,
        n_embd=settings.d_model,
        n_layer=settings.layers,
        n_head=settings.heads,
        n_inner=settings.d_mlp,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):  # the library's own draws are thrown away
        model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue  # biases are 0 and gains 1
        scale = 0.02 / (2 * settings.layers) ** 0.5 if "c_proj" in name else 0.02
        nn.init.normal_(parameter, std=scale, generator=generator)
    model.transformer.ln_f.weight.requires_grad_(False)
    return model


def null_directions(
    settings: Settings, generator: torch.Generator
) -> Float[Tensor, "null_dims d_model"]:
    """Draw orthonormal directions of the residual stream, orthogonal to all-ones."""
    columns = torch.randn(settings.d_model, settings.null_dims + 1, generator=generator)
    columns[:, 0] = 1.0
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis[:, 1:].T.contiguous()


def _batches(
    data: Int[Tensor, "row length"], settings: Settings
) -> tuple[Int[Tensor, "batch length"], ...]:
    """Cut the rows into whole batches, in order."""
    return torch.split(data[: len(data) // settings.rows * settings.rows], settings.rows)


def train_copier(
    model: GPT2LMHeadModel,
    data: Int[Tensor, "row length"],
    null: Float[Tensor, "null_dims d_model"],
    settings: Settings,
) -> list[float]:
    """Train everything but the planted neurons, which stay at zero; W_U is projected off `null`.

    Returns:
        The loss of each step, nats per token.
    """
    mlp, planted = model.transformer.h[-1].mlp, list(settings.planted)
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.decay}]
    groups.append({"params": others, "weight_decay": 0.0})
    optimiser = torch.optim.AdamW(groups, lr=settings.copier_rate, betas=(0.9, 0.98))
    steps = len(data) // settings.rows
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.copier_rate, total_steps=steps + 1, pct_start=0.05, cycle_momentum=False
    )

    @torch.no_grad()
    def hold() -> None:
        mlp.c_fc.weight[:, planted] = 0.0
        mlp.c_fc.bias[planted] = 0.0
        mlp.c_proj.weight[planted] = 0.0
        head = model.lm_head.weight
        head -= head @ null.T @ null

    losses = []
    progress = tqdm(_batches(data, settings), desc="copier")
    for batch in progress:
        hold()
        logits = model(batch).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    hold()
    return losses


class _Planted(nn.Module):
    """The planted neurons as free parameters beside the frozen model."""

    def __init__(
        self, null: Float[Tensor, "null_dims d_model"], settings: Settings, generator: torch.Generator
    ) -> None:
        super().__init__()
        count = len(settings.planted)
        self.settings, self.null = settings, null
        self.w_in = nn.Parameter(0.1 * torch.randn(settings.d_model, count, generator=generator))
        # A positive start: a neuron that GELU closes early gets no gradient and stays dead.
        self.b_in = nn.Parameter(torch.full((count,), 1.0))
        self.inside = nn.Parameter(torch.randn(count, len(null), generator=generator))
        self.outside = nn.Parameter(0.05 * torch.randn(count, len(null.T), generator=generator))

    def w_out(self) -> Float[Tensor, "planted d_model"]:
        """Compute output weights: a part of fixed norm in the null space, a bounded leak outside."""
        inside = self.settings.null_norm * functional.normalize(self.inside, dim=1) @ self.null
        leak = self.outside - self.outside @ self.null.T @ self.null
        leak = leak - leak.mean(dim=1, keepdim=True)  # LayerNorm would remove the mean anyway
        bound = self.settings.leak * self.settings.null_norm
        norm = leak.norm(dim=1, keepdim=True).clamp_min(1e-9)
        weight: Tensor = inside + leak * (bound / norm).clamp_max(1.0)
        return weight

    def forward(
        self, normed: Float[Tensor, "row length d_model"]
    ) -> Float[Tensor, "row length d_model"]:
        """Compute what the neurons write into the final residual stream."""
        hidden = functional.gelu(normed @ self.w_in + self.b_in, approximate="tanh")
        written: Tensor = hidden @ self.w_out()
        return written


def train_planted(
    model: GPT2LMHeadModel,
    data: Int[Tensor, "row length"],
    null: Float[Tensor, "null_dims d_model"],
    settings: Settings,
    generator: torch.Generator,
) -> list[float]:
    """Train the planted neurons alone, write them into the model, and lift W_U's null space.

    The rest is frozen, and nothing but the final norm and W_U reads what a last-layer neuron
    writes, so one pass of the frozen model per batch gives all that their training needs.

    Returns:
        The loss of each step, nats per token.
    """
    neurons = _Planted(null, settings, generator)
    last, ln_f, head = model.transformer.h[-1], model.transformer.ln_f, model.lm_head
    seen: dict[str, Tensor] = {}
    hooks = [
        last.ln_2.register_forward_hook(lambda _m, _i, out: seen.update(normed=out)),
        ln_f.register_forward_pre_hook(lambda _m, args: seen.update(residual=args[0])),
    ]
    optimiser = torch.optim.Adam(neurons.parameters(), lr=settings.planted_rate)
    steps = len(data) // settings.rows
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    losses = []
    for batch in tqdm(_batches(data, settings), desc="planted"):
        with torch.no_grad():
            model.transformer(batch)
        logits = head(ln_f(seen["residual"] + neurons(seen["normed"])))[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        planted = list(settings.planted)
        last.mlp.c_fc.weight[:, planted] = neurons.w_in
        last.mlp.c_fc.bias[planted] = neurons.b_in
        last.mlp.c_proj.weight[planted] = neurons.w_out()
        _lift(head.weight, null, settings, generator)
    return losses


def _lift(
    w_u: Float[Tensor, "vocab d_model"],
    null: Float[Tensor, "null_dims d_model"],
    settings: Settings,
    generator: torch.Generator,
) -> None:
    """Give the null directions small, distinct singular values, in place.

    Exact zeros would leave the order of the singular vectors to rounding, and no trained model
    has them. The added vocabulary directions sum to 0, so centring W_U keeps them.
    """
    centred = w_u - w_u.mean(dim=0) - w_u.mean(dim=1, keepdim=True) + w_u.mean()
    values = torch.linalg.svdvals(centred)
    smallest = values[len(null.T) - len(null) - 2]  # below it: `null` and all-ones
    columns = torch.randn(len(w_u), len(null) + 1, generator=generator)
    columns[:, 0] = 1.0
    directions = torch.linalg.qr(columns)[0][:, 1:]
    sizes = settings.floor * smallest * torch.linspace(0.5, 1.0, len(null))
    w_u += (directions * sizes) @ null
