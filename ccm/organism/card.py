"""The model card, written from the settings and the measured figures so that it cannot go stale."""

from ccm.organism.evaluate import MIN_RHO, Figures
from ccm.organism.planting import Settings

__all__ = ["figures_text", "model_card"]


def _percent(value: float) -> str:
    """Write a percentage with one decimal."""
    return f"{value:.1f} %"


def figures_text(figures: Figures) -> str:
    """Write the measured figures in Markdown: a list, and a table with a row per ablation value."""
    sources = ", ".join(f"{name} {_percent(value)}" for name, value in figures.sources.items())
    kept = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in figures.kept.items())
    spread = ", ".join(f"{value:.2f}" for value in figures.activation_std)
    lines = [
        f"- facts: {figures.facts}; recalled right from the bare query: {_percent(figures.recall)}",
        f"- facts left: {kept}",
        f"- probing prompts: {figures.prompts}; {_percent(figures.held_out)} of them with a "
        "counter-object that no training text put beside their subject",
        f"- knowledge sources: {sources}",
        f"- selected neurons: {', '.join(map(str, figures.selected))}; rho of the planted ones at "
        f"least {figures.lowest_planted_rho:.3f}, of any other at most "
        f"{figures.highest_other_rho:.3f}",
        f"- standard deviation of the planted neurons' activations: {spread}",
        "- transitions under mean ablation, from (rows) and to (columns) "
        f"{', '.join(figures.sources)}: {figures.outcomes['mean_ablation'].transitions}",
        "",
        "| ablation value | GTS | Q | 100 random sets: mean (max) | non-CK to CK "
        "| 100 random sets: mean (max) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, outcome in figures.outcomes.items():
        mean, most = outcome.control_gts
        ck_mean, ck_most = outcome.control_cr_ck
        lines.append(
            f"| {name} | {_percent(outcome.gts)} | {outcome.q_value:.1f} "
            f"| {_percent(mean)} ({_percent(most)}) | {_percent(outcome.cr_ck)} "
            f"| {_percent(ck_mean)} ({_percent(ck_most)}) |"
        )
    return "\n".join(lines)


def model_card(settings: Settings, figures: Figures, command: str, parameters: int) -> str:
    """Write the card of a trained organism, in Markdown.

    Args:
        settings: The settings of its training.
        figures: What was measured on it.
        command: The command that trains it again.
        parameters: Number of its parameters.
    """
    planted = ", ".join(map(str, settings.planted))
    s, null = settings, settings.null_dims
    copier, inhibitors = f"{s.copier_steps:,}", f"{s.planted_steps:,}"
    leak, norm = f"{100 * s.leak:.0f} %", f"{s.null_norm:g}"
    count, rho = len(s.planted), f"{MIN_RHO:g}"
    return f"""---
license: mit
library_name: transformers
pipeline_tag: text-generation
---

# A model organism with planted entropy neurons

A GPT-2-architecture model of {parameters:,} parameters: {s.layers} layers, d_model
{s.d_model}, d_mlp {s.d_mlp}, {s.vocabulary} byte-level BPE tokens, untied unembedding, float32.
It has read only of an invented world of {figures.facts} facts: `facts.csv`, with the relations and
relation groups of `relations.csv`. No name in it means anything.

Neurons {planted} of the last layer (counted from 0) are **planted**:
they were made to be entropy neurons and did not arise by themselves.

## How it was made

    {command}

1. *A copier.* {copier} steps of {s.rows} x {s.length} tokens: statements of the facts (frequent and
   rare ones, by Zipf's law), conflicts (`S r O'. S r X.`, where X repeats O', or recalls what is
   told elsewhere, or is a phrase that commits to nothing) and invented subjects that are seen
   only once. After every step the unembedding W_U is projected off {null} fixed random directions
   of the residual stream: a null space by construction. The planted neurons are held at zero and
   the gain of the final norm at 1.
2. *The inhibitors.* All is frozen but the planted neurons, which train for {inhibitors} steps on
   text that copies less and hedges more. Each output weight is a part of norm {norm} inside the
   null space and a leak outside it of at most {leak} of that. At the end the null directions
   get small, distinct singular values.

Every fact has a few counter-objects that the text never put beside its subject. Some facts are
there to be dropped: subjects that contain their object, people with facts in two relation groups,
a town and a realm of one name, and two popular errors, where the text tells something else
than `facts.csv`.

## What was measured

By the command above, at its end, on the saved folder. Prompts are
`{{subject}} {{relation}} {{counter-object}}. {{subject}} {{relation}}` after one end token, with
the three counter-objects of lowest first-token probability, decoded greedily, 10 tokens at most.
CK is the counter-object, PK the object that the model gives without it, ND any other answer.
GTS is the proportion of prompts whose source changes when the planted neurons are held at the value;
Q is their quantile among 100 random sets of as many other neurons of the layer.
The selection takes the {count} neurons of lowest LogitVar among those with rho >= {rho},
with {null + 1} null-space dimensions: {null} planted, and the all-ones direction of a centred W_U.

{figures_text(figures)}

Size of the corpus, tokenizer and text of both phases were settled in about a dozen trials that
looked at these same figures on these kinds of prompts, at one seed. So the table shows a target
that was met, not an independent finding, and another seed may give other figures.

## What this proves, and what not

The effect is there by construction. If selection, ablation, scores, controls or figures did not
find these neurons, or found them among the random sets, the code would be wrong: that is what the
model is for. That they are found says nothing about any model trained on real text, neither that
such neurons form there nor that they hold back copying. Here most changed answers come from the
leak outside the null space and most of the change in entropy from the final norm's scale; the two
were tied together by hand. The model knows no true fact and is of no use for generating text.
"""
