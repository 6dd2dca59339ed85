"""Two finished runs in which every quantity has a value of its own: a swapped one cannot pass."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ccm.experiment.files import read_json, write_json, write_statistics, write_table
from ccm.experiment.folder import ACTIVATION_STATS, MANIFEST, MEASURES, PROMPTS, RunFolder
from ccm.experiment.scoring import write_scores
from ccm.method.statistics import ActivationStatistics
from tests.made_runs import NO_OBJECTS, make_run

NAMES = ("gpt2-small", "made")  # one whose printed values are drawn, one without any
VALUES = {
    "gpt2-small": ("mean_ablation", "mode_ablation"),
    "made": ("median_ablation", "mean_minus_sigma_ablation"),
}
CONTROLS, MATCHED = 9, 7
BEFORE = {"gpt2-small": {"CK": 131, "ND": 83, "PK": 197}, "made": {"CK": 113, "ND": 71, "PK": 167}}
# Relations with their groups, of no two of which there are as many prompts; all of the last are CK.
RELATIONS = {
    "capital-of": ("places", 0.4),
    "born-in": ("places", 0.3),
    "play-the": ("music", 0.2),
    "sings-in": ("voices", 0.1),
    "all-copied": ("copies", 0.0),
}
# Prompts that the entropy set moves, first from CK, then from ND, then from PK.
MOVES = {
    ("gpt2-small", "mean_ablation"): (9, 14, 21, 6, 33, 11),
    ("gpt2-small", "mode_ablation"): (5, 17, 13, 8, 26, 19),
    ("made", "median_ablation"): (12, 7, 16, 10, 22, 3),
    ("made", "mean_minus_sigma_ablation"): (15, 4, 24, 9, 2, 29),
}
ORDER = [*BEFORE[NAMES[0]]]
PAIRS = (("CK", "ND"), ("CK", "PK"), ("ND", "CK"), ("ND", "PK"), ("PK", "CK"), ("PK", "ND"))


def distinct_runs(factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of the two runs, made once a session; read-only."""
    paths = [factory.getbasetemp() / "distinct" / name for name in NAMES]
    for seed, path in enumerate(paths):
        if not path.exists():
            _make(path, path.name, seed)
    return paths


def _make(path: Path, name: str, seed: int) -> None:
    random = np.random.default_rng(100 + seed)
    source = random.permutation([s for s, n in BEFORE[name].items() for _ in range(n)]).astype(object)
    folder = make_run(
        path,
        model=name,
        prompts=len(source),
        controls=CONTROLS,
        matched=MATCHED,
        values=VALUES[name],
        seed=20 + seed,
        d_mlp=40 + 3 * seed,
        d_model=12 + seed,
        k=3 + seed,
    )
    relations = list(RELATIONS)
    of = random.choice(relations, len(source), p=[share for _, share in RELATIONS.values()])
    of[np.flatnonzero(source == "CK")[: 8 + seed]] = relations[-1]
    # A name of letters that LaTeX, Markdown and HTML each have their own way with.
    texts = np.asarray([f" A_{i} <{i}> & {i} % |.\nA" for i in range(len(source))], dtype=object)
    plain = _cell(
        pd.read_parquet(path / "plain.parquet"), source, texts, 2 + random.random(len(source))
    )
    write_table(path / "plain.parquet", plain)
    sets = read_json(path / MANIFEST)["sets"]
    rest = [i for i in range(40 + 3 * seed) if i not in sets["entropy"]]
    size = len(sets["entropy"])
    sets |= {s: random.permutation(rest)[:size].tolist() for s in sets if s != "entropy"}
    for v, value in enumerate(VALUES[name]):
        strengths = iter(
            random.permutation(np.linspace(0.2, 1.1 + 0.25 * (v + 2 * seed), CONTROLS + MATCHED))
        )
        for number, kind in enumerate(sets):
            moves = MOVES[name, value]
            if kind != "entropy":
                likely = next(strengths) / 2
                moves = tuple(int(random.binomial(2 * n, likely)) for n in moves)
            after = _moved(random, source, moves)
            # Each set and each transition lowers entropy by another amount, nats.
            pair = np.asarray(
                [3 * ORDER.index(a) + ORDER.index(b) for a, b in zip(source, after, strict=True)]
            )
            mean = (0.5 + 0.6 * v if kind == "entropy" else 0.01 * number) + (0.1 + 0.03 * v) * pair
            shift = random.normal(mean, 0.2)
            cell = pd.read_parquet(path / value / f"{kind}.parquet")
            answers = np.asarray([f" {kind} {value} {t.strip()}" for t in texts], dtype=object)
            cell = _cell(cell, after, answers, plain["entropy"].to_numpy() - shift)
            write_table(path / value / f"{kind}.parquet", cell)
    prompts = pd.read_parquet(path / PROMPTS).assign(
        rel_lemma=of, relation_group_id=[RELATIONS[r][0] for r in of]
    )
    write_table(path / PROMPTS, prompts)
    measures = pd.read_parquet(path / MEASURES)
    chosen = measures["entropy_neuron"]
    measures.loc[chosen, "rho"] = 0.8 + 0.03 * np.arange(chosen.sum())
    write_table(path / MEASURES, measures)
    _statistics(path, random, len(measures))
    groups = {r: group for r, (group, _) in RELATIONS.items()} | {"is-subclass": "hierarchy"}
    facts = {"facts": 523 + seed, "recalled": 389 + seed, "relation_groups": groups}
    facts["objects_with_splitter"] = NO_OBJECTS
    more = {
        "timings_s": {"load": 3.25, "decode": 47.5 + seed, "score": 1.125},
        "work": {"prompts": 411, "forward_tokens": 5123, "nodes": 1789, "peak_bytes": 0},
    }
    folder = RunFolder(path, _identity(path, seed))
    folder.note(sets=sets, facts=facts, **more)
    write_scores(folder, released=False)


def _cell(
    cell: pd.DataFrame, source: np.ndarray, texts: np.ndarray, entropy: np.ndarray
) -> pd.DataFrame:
    return cell.assign(source=source, text=texts, entropy=entropy)


def _moved(random: np.random.Generator, source: np.ndarray, moves: tuple[int, ...]) -> np.ndarray:
    """Move so many prompts of each pair of `PAIRS`."""
    after, free = source.copy(), random.permutation(len(source))
    for (start, end), n in zip(PAIRS, moves, strict=True):
        at = [i for i in free if source[i] == start and after[i] == start][:n]
        after[at] = end
    return after


def _statistics(path: Path, random: np.random.Generator, d_mlp: int) -> None:
    """Statistics of which no two are alike, clipped to the least or the greatest or not at all."""
    mean = random.normal(0.1, 0.05, d_mlp)
    statistics = ActivationStatistics(
        mean=mean,
        std=random.lognormal(-1, 0.3, d_mlp),
        median=mean - 0.02 - 0.01 * random.random(d_mlp),
        mode=mean - 0.05 - 0.01 * random.random(d_mlp),
        min=mean - random.uniform(0.3, 2, d_mlp),
        max=mean + random.uniform(0.3, 2, d_mlp),
    )
    write_statistics(path / ACTIVATION_STATS, statistics, positions=1000)


def _identity(path: Path, seed: int) -> dict[str, object]:
    """Note in the manifest what a real run notes, and return its identity."""
    manifest = read_json(path / MANIFEST)
    manifest["identity"] |= {
        "weights_sha256": f"{seed}123abc",
        "facts": f"facts_{seed}",
        "matched_controls": MATCHED,
        "seed": 123 + seed,
        "device": "cpu",
        "device_name": f"machine_{seed}",
        "dtype": "float32",
        "engine": "shared",
        "template": "plain",
        "versions": {"python": "3.1.4", "torch": "2.7.1"},
    }
    manifest["engine"] = "shared"
    manifest["asked"] |= {"seed": 123 + seed, "matched_controls": MATCHED}
    write_json(path / MANIFEST, manifest)
    return dict(manifest["identity"])
