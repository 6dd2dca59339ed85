"""Neuron measures, selection of entropy neurons, and controls (Method 5): pure tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccm.errors import BadInput

VOCAB_COLUMNS = 8192  # columns of the unembedding that are processed at once
NEAREST = 20  # neurons that an entropy neuron's matched controls are drawn from; see matched_controls


@dataclass(frozen=True)
class FinalNorm:
    """The norm between the final residual stream and the unembedding, in float32.

    LayerNorm: (x - mean(x)) / sqrt(var(x) + eps) * gain + bias; RMSNorm: no mean, no bias.
    """

    centred: bool  # True for LayerNorm
    eps: float
    gain: Float[Tensor, "d_model"]
    bias: Float[Tensor, "d_model"]  # zeros for RMSNorm

    def scale(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows 1"]:
        """Return the divisor s(x) (TransformerLens calls it `hook_scale`)."""
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def __call__(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Normalise residual vectors."""
        scale = self.scale(x)
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x / scale * self.gain + self.bias


@dataclass(frozen=True)
class NeuronMeasures:
    """Measures of every last-layer neuron, and the spectrum of the unembedding (Method 5)."""

    logit_var: Float[np.ndarray, "d_mlp"]
    norm: Float[np.ndarray, "d_mlp"]
    rho: Float[np.ndarray, "d_mlp"]
    singular_values: Float[np.ndarray, "d_model"]  # of the processed W_U, descending
    # V0; None if the measures were read back from a run.
    null_space: Float[np.ndarray, "d_model dims"] | None = None

    def table(self) -> pd.DataFrame:
        """Return a row per neuron: `neuron_idx`, `logitvar`, `norm`, `rho`."""
        return pd.DataFrame(
            {
                "neuron_idx": np.arange(len(self.norm)),
                "logitvar": self.logit_var,
                "norm": self.norm,
                "rho": self.rho,
            }
        )


def processed_W_U(
    W_U: Float[Tensor, "d_model d_vocab"], norm: FinalNorm
) -> Float[Tensor, "d_model d_vocab"]:
    """Fold the final norm's gain into W_U and centre it (Method 2), in float32.

    LayerNorm removes the mean of its input, so W_U's mean over d_model has no effect and is removed
    too; with RMSNorm it stays. A constant added to a logit row has no effect under either norm, so
    W_U's mean over the vocabulary is always removed.
    """
    W_U = W_U.float() * norm.gain[:, None]
    # In place from here on: a second copy may be gigabytes.
    if norm.centred:
        W_U -= W_U.mean(0, keepdim=True)
    W_U -= W_U.mean(1, keepdim=True)
    return W_U


def processed_W_out(
    W_out: Float[Tensor, "d_mlp d_model"], norm: FinalNorm
) -> Float[Tensor, "d_mlp d_model"]:
    """Centre output weights over d_model where the final norm does so (LayerNorm), in float32."""
    W_out = W_out.float()
    return W_out - W_out.mean(1, keepdim=True) if norm.centred else W_out


def spectrum(
    W_U: Float[Tensor, "d_model d_vocab"],
) -> tuple[Float[Tensor, "d_model"], Float[Tensor, "d_model d_model"]]:
    """Compute singular values (descending) and left singular vectors (columns) of a processed W_U.

    They come from the float64 Gram matrix W_U W_U^T, summed over chunks of the vocabulary: one pass,
    and memory for d_model^2 numbers. The Gram matrix squares the condition number, which float64
    allows: a singular value of 1e-4 of the largest still has eight digits.
    """
    gram = torch.zeros((W_U.shape[0], W_U.shape[0]), dtype=torch.float64, device=W_U.device)
    for chunk in torch.split(W_U, VOCAB_COLUMNS, dim=1):
        chunk = chunk.double()
        gram += chunk @ chunk.T
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp_min(0).sqrt().flip(0), vectors.flip(1)


def logit_var(
    W_U: Float[Tensor, "d_model d_vocab"], W_out: Float[Tensor, "d_mlp d_model"]
) -> Float[Tensor, "d_mlp"]:
    """Compute LogitVar(i), the unbiased variance over tokens t of cos(w_U^t, w_out^i) (Method 5).

    Both matrices are processed; a neuron without output weight has LogitVar 0. Chan's update adds one
    chunk of the vocabulary after another in float64, so no d_mlp x d_vocab matrix is ever held.
    """
    directions = torch.nn.functional.normalize(W_out.double(), dim=1).to(W_out.dtype)
    mean = torch.zeros(len(W_out), dtype=torch.float64, device=W_out.device)
    m2, count = torch.zeros_like(mean), 0
    for chunk in torch.split(W_U, VOCAB_COLUMNS, dim=1):
        cosines = (directions @ torch.nn.functional.normalize(chunk, dim=0)).double()
        n, chunk_mean = chunk.shape[1], cosines.mean(1)
        delta, total = chunk_mean - mean, count + n
        m2 += (cosines - chunk_mean[:, None]).pow(2).sum(1) + delta.pow(2) * (count * n / total)
        mean += delta * (n / total)
        count = total
    return m2 / (count - 1)


def measure(
    W_U: Float[Tensor, "d_model d_vocab"],
    W_out: Float[Tensor, "d_mlp d_model"],
    norm: FinalNorm,
    null_space_dims: int,
) -> NeuronMeasures:
    """Measure every neuron of a layer from the checkpoint's own weights (Method 5).

    Args:
        W_U: Unembedding as stored.
        W_out: Output weights of the layer's MLP as stored.
        norm: The final norm.
        null_space_dims: How many of the lowest singular directions of W_U make up V0.

    Raises:
        BadInput: `null_space_dims` outside 1..d_model.
    """
    if not 1 <= null_space_dims <= W_U.shape[0]:
        raise BadInput(
            f"null-space dimensions {null_space_dims}: out of range. Allowed: 1 to {W_U.shape[0]} "
            "(d_model)."
        )
    W_U, W_out = processed_W_U(W_U, norm), processed_W_out(W_out, norm)
    values, vectors = spectrum(W_U)
    V0 = vectors[:, -null_space_dims:]  # (d_model, dims)
    return NeuronMeasures(
        logit_var=to_float64(logit_var(W_U, W_out)),
        norm=to_float64(W_out.double().norm(dim=1)),
        rho=to_float64(_rho(W_out, V0)),
        singular_values=to_float64(values),
        null_space=to_float64(V0),
    )


def rho(
    W_out: Float[Tensor, "d_mlp d_model"],
    norm: FinalNorm,
    null_space: Float[np.ndarray, "d_model dims"],
) -> Float[np.ndarray, "d_mlp"]:
    """Compute rho(i) = |V0^T w_out^i| / |w_out^i|, how much of an output weight lies in V0 (Method 5).

    Args:
        W_out: Output weights of any layer's MLP as stored; a neuron without any has rho NaN.
        norm: The final norm.
        null_space: V0, the null space that `measure` found, in orthonormal columns.
    """
    V0 = torch.from_numpy(null_space).to(W_out.device)
    return to_float64(_rho(processed_W_out(W_out, norm), V0))


def _rho(
    W_out: Float[Tensor, "d_mlp d_model"], V0: Float[Tensor, "d_model dims"]
) -> Float[Tensor, "d_mlp"]:
    W_out = W_out.double()
    found: Tensor = (W_out @ V0).norm(dim=1) / W_out.norm(dim=1)
    return found


def to_float64(x: Tensor) -> np.ndarray:
    """Turn a tensor of any device into a NumPy array."""
    return np.asarray(x.cpu().numpy(), dtype=np.float64)


def select(measures: NeuronMeasures, k: int, min_rho: float) -> tuple[int, ...]:
    """Choose entropy neurons: of those whose rho is at least `min_rho`, the k of lowest LogitVar.

    Args:
        measures: Measures of the last layer. A neuron without output weight has no rho (NaN) and is
            never chosen.
        k: How many to choose.
        min_rho: The lowest rho allowed, 0 to 1.

    Returns:
        Neuron numbers, lowest LogitVar first; ties to the lower number.

    Raises:
        BadInput: k outside 1..d_mlp, or fewer than k neurons reach `min_rho`.
    """
    d_mlp = len(measures.rho)
    if not 1 <= k <= d_mlp:
        raise BadInput(f"k={k} entropy neurons: out of range. Allowed: 1 to {d_mlp} (d_mlp).")
    eligible = np.flatnonzero(measures.rho >= min_rho)
    if len(eligible) < k:
        raise BadInput(
            f"k={k} entropy neurons: only {len(eligible)} of {d_mlp} reach rho >= {min_rho}. Lower "
            "--min-rho or -k."
        )
    order = np.argsort(measures.logit_var[eligible], kind="stable")
    return tuple(int(i) for i in eligible[order[:k]])


def controls(
    n: int, d_mlp: int, entropy_neurons: Sequence[int], seed: int, *, overlap: bool = False
) -> list[tuple[int, ...]]:
    """Draw distinct random neuron sets of the entropy set's size (Method 7).

    Args:
        n: How many sets.
        d_mlp: Neurons of the layer.
        entropy_neurons: The set to match in size.
        seed: For `np.random.RandomState`; 123 gives the released stream.
        overlap: Draw from all neurons and forbid only the entropy set itself, as the released code
            does (defect 6). Otherwise from the non-entropy neurons.

    Raises:
        BadInput: more sets asked for than distinct ones exist.
    """
    entropy = frozenset(entropy_neurons)
    pool = np.arange(d_mlp) if overlap else np.setdiff1d(np.arange(d_mlp), list(entropy))
    k = len(entropy)
    exist = comb(len(pool), k) - (1 if overlap else 0)
    if n > exist:
        raise BadInput(
            f"{n} controls: only {exist} distinct sets of {k} of {len(pool)} neurons exist. Lower "
            "--controls."
        )
    random = np.random.RandomState(seed)
    sets: dict[frozenset[int], tuple[int, ...]] = {}
    while len(sets) < n:
        drawn = tuple(int(i) for i in random.choice(pool, size=k, replace=False))
        if not (overlap and frozenset(drawn) == entropy):
            sets.setdefault(frozenset(drawn), drawn)
    return list(sets.values())


def match_plane(
    norm: Float[np.ndarray, "d_mlp"], sigma: Float[np.ndarray, "d_mlp"], entropy_neurons: Sequence[int]
) -> tuple[Float[np.ndarray, "d_mlp 2"], Int[np.ndarray, "other"]]:
    """Place neurons by (log norm, log sigma), in standard deviations of all others (Method 13).

    Args:
        norm: Norm of each neuron's processed output weight, weight units.
        sigma: Standard deviation of its activation.
        entropy_neurons: Neurons left out of the others.

    Returns:
        Places of all neurons, which may be infinite or NaN; and the numbers of the others whose place
        is finite, the only ones that the standard deviations are taken over.
    """
    with np.errstate(divide="ignore"):
        logs = np.log(np.stack([norm, sigma], axis=1))  # (d_mlp, 2)
    usable = np.isfinite(logs).all(1)
    usable[list(entropy_neurons)] = False
    spread = logs[usable].std(0) if usable.any() else np.ones(2)
    return logs / np.where(spread > 0, spread, 1.0), np.flatnonzero(usable)


def matched_controls(
    n: int,
    norm: Float[np.ndarray, "d_mlp"],
    sigma: Float[np.ndarray, "d_mlp"],
    entropy_neurons: Sequence[int],
    seed: int,
    *,
    nearest: int = NEAREST,
) -> list[tuple[int, ...]]:
    """Draw distinct neuron sets that match the entropy set in weight norm and spread (Method 13).

    Every entropy neuron is replaced by one of its nearest other neurons in (log norm, log sigma), both
    standardised over the neurons that may be drawn.

    1. The nearest twenty, because two sets then share one neuron in twenty by chance, so that a hundred
       sets say nearly as much as a hundred independent ones; and because twenty are still near: 0.7 %
       of a layer of 3,072. Fewer would match better but repeat themselves. If twenty do not make 2 n
       distinct sets (k = 1, or k near 20), as many are used as do.
    2. A neuron without output weight, or with a constant activation, changes nothing when it is
       ablated, so it is never drawn. An entropy neuron of that kind has no finite logarithm: it is
       placed at the least of the others, and one of infinite sigma (defect 3) at the largest.

    Args:
        n: How many sets.
        norm: Norm of each neuron's processed output weight, weight units.
        sigma: Standard deviation of its activation.
        entropy_neurons: The set to match; order and duplicates do not matter.
        seed: For `np.random.RandomState`, whose stream is frozen.
        nearest: How many of the nearest neurons to draw from, at least.

    Returns:
        Sets of the entropy set's size; position i stands for the i-th entropy neuron, ascending.

    Raises:
        BadInput: more sets asked for than distinct ones exist, or an entropy neuron whose norm or
            sigma is NaN.
    """
    if n == 0:
        return []
    own = sorted(set(entropy_neurons))
    k = len(own)
    places, pool = match_plane(norm, sigma, own)
    for i in own:
        if np.isnan(places[i]).any():
            raise BadInput(
                f"neuron {i}: norm {norm[i]}, sigma {sigma[i]}, so nothing matches it. Use --stats own "
                "or --matched-controls 0."
            )
    exist = comb(len(pool), k)
    if n > exist:
        raise BadInput(
            f"{n} matched controls: only {exist} distinct sets of {k} of {len(pool)} neurons with an "
            "output weight and an activation that varies exist. Lower --matched-controls."
        )
    others = places[pool]
    wanted = np.clip(places[own], others.min(0), others.max(0))
    offsets = wanted[:, None] - others  # (entropy, pool, 2)
    # At least k each, so that none is left without a neuron; ties to the lower number.
    m = min(len(pool), max(nearest, k))
    while m < len(pool) and comb(m, k) < 2 * n:
        m += 1
    near = pool[np.argsort((offsets**2).sum(-1), axis=1, kind="stable")[:, :m]]  # (entropy, m)
    random = np.random.RandomState(seed)
    sets: dict[frozenset[int], tuple[int, ...]] = {}
    while len(sets) < n:
        drawn: list[int] = []
        for candidates in near:
            drawn.append(int(random.choice(np.setdiff1d(candidates, drawn))))
        sets.setdefault(frozenset(drawn), tuple(drawn))
    return list(sets.values())
