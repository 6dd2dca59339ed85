"""Same prompts and replacement values: same tokens, whatever kernels, threads and memory budget."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

N_PROMPTS, N_CONTROLS = 16, 12
# Run in a process of its own, because kernels are chosen when torch is imported. What it decodes
# depends on no machine: texts and neurons are fixed, and values are fractions of few bits.
DECODE = f"""
import hashlib, random, sys
import torch
from ccm.decoding import tolerance as measuring
from ccm.decoding.results import Work, merge
from ccm.decoding.shared import decode_sets
from ccm.method.ablation import Ablation
from ccm.models.load import load
from ccm.models.specs import MODELS

threads, budget = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
model, draw = load(MODELS["organism"]), random.Random(0)
# Tokens in pairs that differ in the last bits of their weights: near ties at every step.
head = model.W_U.T
head[1::2] = head[::2]
signs = torch.randint(-1, 2, head[1::2].shape, generator=torch.Generator().manual_seed(0))
head[1::2] *= 1 + signs * 1.2e-7
model.trial = None  # of another model now
names = [model.tokenizer.decode([i]) for i in range(100, model.spec.d_vocab)]
prompts = [
    model.encode(" ".join(name.strip() for name in draw.choices(names, k=draw.randint(3, 9))) + " is")
    for _ in range({N_PROMPTS})
]
drawn = [tuple(sorted(draw.sample(range(384), 6))) for _ in range({N_CONTROLS})]
sets = [Ablation("any", neurons, tuple(draw.randint(-9, 40) / 8 for _ in neurons)) for neurons in drawn]
work = Work()
shards = decode_sets(model, prompts, sets, memory_budget=budget, own_top=True, work=work)
done = merge(list(shards))
told = [[done.leaves[i] for i in row] for row in done.leaf.tolist()], done.top_tokens.tolist()
digest = hashlib.sha256(repr(told).encode()).hexdigest()
print(digest, work.refereed, len(set(done.leaf.ravel().tolist())))
"""


def decoded(kernels: str | None, threads: int, budget: int) -> tuple[str, int, int]:
    """Digest of all tokens; how many near ties were settled; how many continuations there are."""
    env = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    env |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_WAIT_POLICY": "passive"}
    env |= {} if kernels is None else {"ATEN_CPU_CAPABILITY": kernels}
    command = [sys.executable, "-c", DECODE, str(threads), str(budget)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    digest, refereed, leaves = done.stdout.split()
    return digest, int(refereed), int(leaves)


@pytest.fixture(scope="module")
def usual() -> tuple[str, int, int]:
    """This machine's own kernels, all in one batch."""
    found = decoded(None, 1, 1 << 30)
    assert found[1] > 10 * N_PROMPTS, "hardly a near tie: nothing is tested"
    assert found[2] > 2 * N_PROMPTS, "the sets hardly change a continuation"
    return found


@pytest.mark.parametrize(
    ("kernels", "threads", "budget"),
    [("default", 2, 1 << 30), ("avx2", 1, 3_000_000), (None, 2, 1_000_000)],
    ids=["plainest kernels, two threads", "avx2, small batches", "two threads, smallest batches"],
)
def test_tokens_do_not_depend_on_the_machine(
    usual: tuple[str, int, int], kernels: str | None, threads: int, budget: int
) -> None:
    digest, _, leaves = decoded(kernels, threads, budget)
    assert leaves >= usual[2], "a continuation is kept once a batch"
    assert digest == usual[0]
