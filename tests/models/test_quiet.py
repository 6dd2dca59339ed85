"""What is silent while a library loads something, and that nothing is afterwards."""

import logging
import warnings

import pytest
from transformers.utils import logging as hf_logging

from ccm.models.quiet import quiet


@pytest.mark.parametrize("bars", [True, False])
def test_it_ends_with_what_it_is_for_also_where_that_fails(bars: bool) -> None:
    before, had_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    try:
        (hf_logging.enable_progress_bar if bars else hf_logging.disable_progress_bar)()
        hf_logging.set_verbosity_info()
        with quiet():
            assert not hf_logging.is_progress_bar_enabled()
        with pytest.raises(KeyError), quiet():
            raise KeyError
        assert hf_logging.is_progress_bar_enabled() is bars
        assert hf_logging.get_verbosity() == logging.INFO
    finally:
        hf_logging.set_verbosity(before)
        (hf_logging.enable_progress_bar if had_bars else hf_logging.disable_progress_bar)()


def test_errors_are_logged_and_warnings_are_not() -> None:
    logger = logging.getLogger("transformers.modeling_utils")
    with warnings.catch_warnings(record=True) as caught, quiet():
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
        warnings.warn("will change", FutureWarning, stacklevel=1)
    assert not caught
    with pytest.warns(FutureWarning):
        warnings.warn("will change", FutureWarning, stacklevel=1)
