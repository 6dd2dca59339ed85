"""Tensors' shapes are checked while tests run, except in whole runs."""

import jaxtyping
import pytest
import torch

from ccm.decoding.low_rank import guessed_best_and_lead
from conftest import UNCHECKED

ROWS = torch.zeros(2, 3, 5)
# One for each set, where one for each node is wanted.
WRONG = torch.zeros(2, dtype=torch.long)


def test_a_wrong_shape_is_an_error(pytestconfig: pytest.Config) -> None:
    if pytestconfig.stash[UNCHECKED]:
        pytest.skip("JAXTYPING_DISABLE=1 is set: unset it to check shapes")
    with pytest.raises(jaxtyping.TypeCheckError, match="guess"):
        guessed_best_and_lead(ROWS, WRONG)


@pytest.mark.whole_runs
def test_whole_runs_go_unchecked() -> None:
    with pytest.raises(RuntimeError, match="expand"):  # torch's own
        guessed_best_and_lead(ROWS, WRONG)
