"""What a run costs, by exact counters: time varies with the machine, work does not."""

import pytest

from ccm.decoding.results import Work
from ccm.experiment.files import read_table
from ccm.models.specs import MAX_NEW_TOKENS
from conftest import REAL
from reproduction.runs import Run

pytestmark = pytest.mark.whole_runs

# Nodes that each ablation value may add, as a part of the plain run's. Most are the entropy set's own,
# whose texts are decoded to the end.
MORE_NODES = 0.3
WHOLE_ROWS = 0.3  # of the choices after the first token, at most: the others need a few multiplications
REFEREED = 1e-3  # of all choices, at most


@pytest.mark.only(model="organism", ablation_value="mean_ablation")
def test_work_on_the_organism(run: Run) -> None:
    check(run)


@pytest.mark.only(model=REAL, ablation_value="mean_ablation")
def test_work_on_a_real_model(run: Run) -> None:
    check(run)


def check(run: Run) -> None:
    """Hold the work of a run's grid to what one decode for all sets should cost."""
    work = Work(**run.manifest["work"])
    tokens = read_table(run.folder / "plain.parquet", ["tokens"])["tokens"]
    values, sets = run.manifest["identity"]["ablation_values"], run.manifest["sets"]
    n_prompts = len(tokens)
    # The prompt's last position, and all tokens but the tenth; EOS is a token, too.
    plain_nodes = int((tokens.map(len) + 1).clip(upper=MAX_NEW_TOKENS).sum())
    later = work.certified + work.shortlisted + work.low_rank
    assert work.prompts == n_prompts, "a prompt was decoded twice, or left out"
    assert work.halved == 0
    assert work.first_rows == (n_prompts + work.repeated) * (1 + len(values) * len(sets))
    assert work.full_rows == work.nodes + work.refereed
    assert plain_nodes <= work.nodes <= (1 + MORE_NODES * len(values)) * plain_nodes
    assert 0 < work.low_rank <= WHOLE_ROWS * later
    assert work.refereed <= REFEREED * (work.first_rows + later)
