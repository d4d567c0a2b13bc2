"""One thread for the tiny models of this folder: several would only wait for each other."""

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(autouse=True)
def one_quiet_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)
