"""Train the organism: `python -m ccm.organism.train --out DIR`."""

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from ccm.organism.card import figures_text, model_card
from ccm.organism.corpus import COPYING, DOUBTING, Behaviour, Sampler
from ccm.organism.evaluate import Figures, evaluate
from ccm.organism.planting import (
    Settings,
    new_model,
    null_directions,
    one_thread,
    train_copier,
    train_planted,
)
from ccm.organism.world import World, facts_table, make_world, relations_table

__all__ = ["Trained", "main", "save", "train"]

END = "<|endoftext|>"
TOKENIZER_DOCUMENTS = 20_000


@dataclass(frozen=True)
class Trained:
    """A finished training: the model, its tokenizer, its null space and its losses."""

    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerFast
    null: Tensor  # (null_dims, d_model)
    copier_losses: list[float]  # nats per token, one per step
    planted_losses: list[float]


def train_tokenizer(world: World, settings: Settings) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the text; id 0 is the end token, which also begins a prompt."""
    sampler = Sampler(world, COPYING, random.Random(f"{settings.seed} tokenizer"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        # Shorter than any object: the frequent names would become one token each otherwise.
        max_token_length=5,
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(sampler, TOKENIZER_DOCUMENTS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        model_max_length=settings.positions,
        clean_up_tokenization_spaces=False,
    )


def rows_of_text(
    world: World,
    behaviour: Behaviour,
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    settings: Settings,
) -> Int[Tensor, "row length"]:
    """Draw rows of documents, each after an end token; a row begins with a document, as prompts do."""
    sampler = Sampler(world, behaviour, random.Random(f"{settings.seed} {behaviour.name}"))

    def documents() -> Iterator[list[int]]:
        while True:
            for ids in tokenizer(list(islice(sampler, 2048)))["input_ids"]:
                yield [0, *ids]

    source, rows = documents(), []
    for _ in range(count):
        row: list[int] = []
        while len(row) < settings.length:
            row += next(source)
        rows.append(row[: settings.length])
    return torch.tensor(rows)


def train(world: World, settings: Settings) -> Trained:
    """Train tokenizer and model in the two phases; the same settings give the same weights."""
    with one_thread():
        tokenizer = train_tokenizer(world, settings)
        generator = torch.Generator().manual_seed(settings.seed)
        null = null_directions(settings, generator)
        model = new_model(settings, generator)
        count = settings.rows * settings.copier_steps
        data = rows_of_text(world, COPYING, tokenizer, count, settings)
        copier = train_copier(model, data, null, settings)
        count = settings.rows * settings.planted_steps
        data = rows_of_text(world, DOUBTING, tokenizer, count, settings)
        planted = train_planted(model, data, null, settings, generator)
    return Trained(model.eval(), tokenizer, null, copier, planted)


def save(trained: Trained, world: World, folder: Path) -> None:
    """Write the model in Hugging Face layout, with its tables of facts and relations."""
    trained.model.save_pretrained(folder)
    trained.tokenizer.save_pretrained(folder)
    facts_table(world).to_csv(folder / "facts.csv", index=False)
    relations_table(world).to_csv(folder / "relations.csv", index=False)


def write_card(folder: Path, world: World, settings: Settings, command: str) -> Figures:
    """Measure a saved folder and write its model card, which names the command that made it."""
    with one_thread():
        figures = evaluate(folder, world, settings.planted, settings.null_dims + 1)
    with safe_open(folder / "model.safetensors", framework="numpy") as weights:
        parameters = sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    card = model_card(settings, figures, command, parameters)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, measure, write the model card and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m ccm.organism.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("organism"), help="folder to write")
    parser.add_argument("--force", action="store_true", help="write into a folder with files in it")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, help="multiplies the steps of both phases"
    )
    options = parser.parse_args(arguments)
    folder: Path = options.out
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not options.force:
        parser.error(f"{folder} is not an empty folder; --force writes into it all the same")
    full = Settings()
    settings = replace(
        full,
        seed=options.seed,
        copier_steps=max(1, round(full.copier_steps * options.steps_scale)),
        planted_steps=max(1, round(full.planted_steps * options.steps_scale)),
    )
    world = make_world()
    started = time.monotonic()
    trained = train(world, settings)
    seconds = time.monotonic() - started
    folder.mkdir(parents=True, exist_ok=True)
    save(trained, world, folder)
    command = f"python -m ccm.organism.train --seed {settings.seed} --steps-scale "
    command += f"{options.steps_scale:g} --out {folder.name}"
    print(figures_text(write_card(folder, world, settings, command)))
    print(f"\ntrained in {seconds:.0f} s on one thread; wrote {folder}", file=sys.stderr)


if __name__ == "__main__":
    main()
