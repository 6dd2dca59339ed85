"""Peak memory of one decode for 506 runs beside one plain pass, each in a process of its own."""

import multiprocessing
from collections.abc import Sequence
from typing import Any

import psutil

from ccm.decoding import hooked
from ccm.decoding.shared import decode_sets
from ccm.experiment.rehearsal.profiler import Profiler
from ccm.method.ablation import Ablation
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.models.load import load
from ccm.models.specs import MODELS
from tests.benchmarks.subjects import organism

BATCH_SIZE = 256


def measure_peak(
    prompts: Sequence[Sequence[int]], ablations: Sequence[Ablation] | None, answer: Any
) -> None:
    """In a fresh process: memory once the model is loaded, peak of the work, bytes of its results."""
    model = load(MODELS["organism"])
    hooked.decode(model, prompts[:1])  # libraries take their own workspace once
    before, size = psutil.Process().memory_info().rss, 0
    profiler = Profiler(model.device)
    with profiler("work"):
        if ablations is None:
            hooked.decode(model, prompts, batch_size=BATCH_SIZE)
        else:
            kept = list(decode_sets(model, prompts, ablations, full=[False] * (1 + len(ablations))))
            for shard in kept:
                arrays = (shard.leaf, shard.entropy, shard.asked, shard.log_probs)
                size += sum(array.nbytes for array in arrays)
    answer.put((before, profiler.stages["work"].peak_bytes, size))


def test_peak_memory_of_506_runs(benchmark: Any) -> None:
    subject = organism()
    context = multiprocessing.get_context("spawn")

    def peaks(ablations: Sequence[Ablation] | None) -> tuple[int, int, int]:
        answer = context.SimpleQueue()
        process = context.Process(target=measure_peak, args=(subject.prompts, ablations, answer))
        process.start()
        found: tuple[int, int, int] = answer.get()
        process.join()
        return found

    _, plain, _ = peaks(None)
    before, shared, results = benchmark.pedantic(
        peaks, (subject.ablations(tuple(ABLATION_VALUES), 100),), rounds=1
    )
    assert before < min(plain, shared), "the peak of the work was not seen"
    benchmark.extra_info.update(
        ratio=round((shared - results) / plain, 3),
        of="one plain pass, whole process, results aside",
        target=1.5,
        mib={
            "loaded": before >> 20,
            "one plain pass": plain >> 20,
            "506 runs": shared >> 20,
            "results": results >> 20,
        },
    )
