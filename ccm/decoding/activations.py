"""Streamed per-neuron statistics of the last layer's activations (Method 6).

Two passes over the same data: the first finds range and moments, the second fills a histogram between
each neuron's own minimum and maximum. Activations of the first pass are kept as far as they fit; the
other prompts are run again. Memory is bounded by that and by `d_mlp` x `MEDIAN_BINS` counts, whatever
the number of prompts. No pad is ever counted, because batches hold none.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from ccm.decoding import hooked
from ccm.decoding.results import Completions, Observer
from ccm.errors import CcmError
from ccm.method.neurons import to_float64
from ccm.method.statistics import ActivationStatistics
from ccm.models.bridge import Tokens
from ccm.models.model import LoadedModel
from ccm.models.specs import MAX_NEW_TOKENS

AT_ONCE = 1 << 24  # activations handled at once; their float64 and bin copies take 8 bytes each
KEEP = 1 << 30  # most bytes of activations to keep
MODE_BINS = 256  # the mode is the centre of the fullest of these
FINE = 16  # fine bins per mode bin, for the median
MEDIAN_BINS = MODE_BINS * FINE  # the median is exact to 1/4096 of the neuron's range


class Moments:
    """First pass: count, mean, sum of squared deviations, minimum and maximum, in float64."""

    def __init__(self, d_mlp: int, device: torch.device | str = "cpu") -> None:
        """Start with no rows."""
        self.count = 0
        self.mean = torch.zeros(d_mlp, dtype=torch.float64, device=device)
        self.m2 = torch.zeros_like(self.mean)
        self.min = torch.full_like(self.mean, torch.inf)
        self.max = torch.full_like(self.mean, -torch.inf)

    def update(self, rows: Float[Tensor, "rows d_mlp"]) -> None:
        """Add rows, by Chan's update of mean and squared deviations, stable for any chunking."""
        if not len(rows):
            return
        rows = rows.double()
        mean, n = rows.mean(0), len(rows)
        delta = mean - self.mean
        total = self.count + n
        self.m2 += (rows - mean).pow(2).sum(0) + delta.pow(2) * (self.count * n / total)
        self.mean += delta * (n / total)
        self.min = torch.minimum(self.min, rows.amin(0))
        self.max = torch.maximum(self.max, rows.amax(0))
        self.count = total


class Histograms:
    """Second pass: a fixed histogram per neuron between its own minimum and maximum."""

    def __init__(self, moments: Moments) -> None:
        """Start with empty bins over the ranges that the first pass found."""
        self.min = moments.min
        self.width = (moments.max - moments.min) / MEDIAN_BINS
        d_mlp = len(self.min)
        self.counts = torch.zeros((d_mlp, MEDIAN_BINS), dtype=torch.int32, device=self.min.device)

    def update(self, rows: Float[Tensor, "rows d_mlp"]) -> None:
        """Count rows; the maximum belongs to the last bin."""
        # A neuron that never moves has width 0: all its rows go to bin 0.
        width = torch.where(self.width > 0, self.width, 1.0)
        bins = ((rows.double() - self.min) / width).long().clamp_(0, MEDIAN_BINS - 1)
        self.counts.scatter_add_(1, bins.T, torch.ones_like(bins.T, dtype=torch.int32))

    def mode(self) -> Float[Tensor, "d_mlp"]:
        """Return the centre of the fullest of `MODE_BINS` bins, the lowest of equally full ones."""
        fullest = self.counts.view(-1, MODE_BINS, FINE).sum(-1).argmax(-1)
        return self.min + (fullest + 0.5) * (self.width * FINE)

    def median(self) -> Float[Tensor, "d_mlp"]:
        """Return the mean of the two middle order statistics, each placed within its fine bin."""
        cumulative = self.counts.long().cumsum(-1)
        n = int(cumulative[0, -1])
        middle = [self._order_statistic(cumulative, rank) for rank in ((n - 1) // 2, n // 2)]
        return (middle[0] + middle[1]) / 2

    def _order_statistic(self, cumulative: Tensor, rank: int) -> Tensor:
        """Place the value of 0-based `rank`, taking a bin's values as evenly spread."""
        ranks = torch.full_like(cumulative[:, :1], rank)
        bins = torch.searchsorted(cumulative, ranks, right=True)
        inside = self.counts.gather(1, bins)
        before = cumulative.gather(1, bins) - inside
        offset = bins + (rank - before + 0.5) / inside
        return self.min + offset[:, 0] * self.width


def finish(moments: Moments, histograms: Histograms) -> ActivationStatistics:
    """Turn both passes into statistics.

    Raises:
        CcmError: an activation is not finite; the message names its neuron.
    """
    bad = torch.nonzero(~torch.isfinite(moments.m2))
    if len(bad):
        raise CcmError(f"neuron {int(bad[0])}: its activations are not finite. Use --dtype float32.")
    return ActivationStatistics(
        mean=to_float64(moments.mean),
        std=to_float64((moments.m2 / moments.count).sqrt()),
        median=to_float64(histograms.median()),
        mode=to_float64(histograms.mode()),
        min=to_float64(moments.min),
        max=to_float64(moments.max),
    )


def collect(
    model: LoadedModel,
    prompts: Sequence[Tokens],
    decode: Callable[..., Completions] = hooked.decode,
    keep: int = KEEP,
    *,
    text_only: bool = False,
) -> tuple[ActivationStatistics, int]:
    """Run the plain model over the prompts and their continuations, over some of them twice.

    Args:
        model: The model.
        prompts: Token ids, BOS included.
        decode: The `decode` of an engine.
        keep: Most bytes of activations to keep; prompts beyond it are run again.
        text_only: Leave out BOS, at which a neuron has the same activation, often an extreme one, in
            every prompt.

    Returns:
        The statistics and the number of positions they cover: every prompt position (but BOS, if
        `text_only`) and every token that was fed back (the last generated one never is).
    """
    moments = Moments(model.spec.d_mlp, model.device)
    first = _in_chunks(moments.update)
    kept = list[Float[Tensor, "rows d_mlp"]]()

    def first_and_keep(rows: Float[Tensor, "rows d_mlp"]) -> None:
        first(rows)
        kept.append(rows)

    upto = np.cumsum([0, *(4 * model.spec.d_mlp * _positions(prompt) for prompt in prompts)])
    fits = int(np.searchsorted(upto, keep, side="right")) - 1
    run = partial(decode, model, text_only=text_only)
    _show(run, (prompts[:fits], first_and_keep), (prompts[fits:], first))
    histograms = Histograms(moments)
    second = _in_chunks(histograms.update)
    for rows in kept:
        second(rows)
    _show(run, (prompts[fits:], second))
    return finish(moments, histograms), moments.count


def _positions(prompt: Tokens) -> int:
    """Return the most positions of a prompt; one that ends early feeds fewer tokens back."""
    return len(prompt) + MAX_NEW_TOKENS - 1


def _show(run: Callable[..., object], *parts: tuple[Sequence[Tokens], Observer]) -> None:
    """Run each part's prompts with its observer, and show how many positions were seen."""
    total = sum(_positions(prompt) for prompts, _ in parts for prompt in prompts)
    with tqdm(total=total, desc="activation_stats", unit="position", disable=not total) as bar:

        def observe(update: Observer, rows: Float[Tensor, "rows d_mlp"]) -> None:
            update(rows)
            bar.update(len(rows))

        for prompts, update in parts:
            if prompts:
                run(prompts, observe=partial(observe, update))
        bar.total = bar.n


def _in_chunks(update: Observer) -> Observer:
    """Bound what an update copies, whatever the size of a batch."""

    def observe(rows: Float[Tensor, "rows d_mlp"]) -> None:
        for chunk in torch.split(rows, max(1, AT_ONCE // rows.shape[1])):
            update(chunk)

    return observe


def float16_sigma(statistics: ActivationStatistics, count: int) -> ActivationStatistics:
    """Return the statistics with sigma as a float16 accumulation leaves it (defect 3).

    The sum of squared deviations overflows float16 above 65,504 and sigma becomes inf, which makes
    "mu +- 3 sigma" the minimum or maximum; below that sigma is merely rounded. Only the `released`
    protocol uses it.
    """
    squares = statistics.std**2 * count
    with np.errstate(over="ignore"):
        sigma = np.sqrt(squares.astype(np.float16).astype(np.float64) / count)
    return ActivationStatistics(**{**vars(statistics), "std": sigma})
