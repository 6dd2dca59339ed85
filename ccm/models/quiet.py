"""transformers without its logs and bars, and libraries without their warnings.

Its logs contradict us: of weights that have no place in a model, which are refused here, they say that
they can be ignored. What matters of them is checked where something is loaded.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries silent, but for errors, while they load something."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a user can do nothing about their deprecations
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
