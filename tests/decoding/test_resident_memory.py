"""A decode stays near its budget by resident size, in a process of its own, whatever its sets do."""

import multiprocessing
import random
from dataclasses import replace
from typing import Any

import psutil
import torch

from ccm.decoding.results import Work
from ccm.decoding.shared import decode_sets
from ccm.experiment.rehearsal.profiler import Profiler
from ccm.models.load import load
from ccm.models.specs import spec_for
from tests.decoding.test_shared import random_sets
from tests.toys import ToyConfig, toy_folder

# A step's rows and what a process keeps of what it freed come on top.
ALLOWED = 1.3


def peak_of_decode(d_vocab: int, n_prompts: int, n_sets: int, budget: int, answer: Any) -> None:
    """In a fresh process: the peak above what the loaded model takes, and the work."""
    torch.set_num_threads(1)  # beside the other workers of a test session
    config = replace(ToyConfig("llama"), d_vocab=d_vocab, d_mlp=1024)
    model = load(spec_for(str(toy_folder(config))))
    prompts = [[random.Random(i).randrange(320) for _ in range(12)] for i in range(n_prompts)]
    list(decode_sets(model, prompts[:1]))  # libraries take their own workspace once
    sets = random_sets(config.d_mlp, [6] * n_sets, 5.0)
    before, work, profiler = psutil.Process().memory_info().rss, Work(), Profiler(model.device)
    with profiler("decode"):
        list(decode_sets(model, prompts, sets, memory_budget=budget, work=work))
    answer.put((profiler.stages["decode"].peak_bytes - before, work.as_dict()))


def test_sets_that_diverge_over_a_large_vocabulary_stay_near_the_budget() -> None:
    """Most sets go their own way at every step, each with rows of a quarter of a million tokens."""
    context, n_prompts, n_sets, budget = multiprocessing.get_context("spawn"), 6, 30, 400_000_000
    answer = context.SimpleQueue()
    given = (256_000, n_prompts, n_sets, budget, answer)
    process = context.Process(target=peak_of_decode, args=given)
    process.start()
    peak, work = answer.get()
    process.join()
    assert work["nodes"] > 8 * n_prompts * 9, "hardly a set diverged"
    assert work["halved"], "the first plan of the batches held: the budget was never met"
    assert peak < ALLOWED * budget, f"{peak / budget:.2f} times the budget"
