"""Imported once by harness.py's fork server: what every rank would spend seconds on."""

from umv2_megatron.parallel import cpu_platform

cpu_platform.install()

import pytest  # noqa: E402, F401 (every test file imports it)
import torch._dynamo  # noqa: E402, F401 (torch's optimizers import it when the first one is made)

import umv2_megatron.commands.pretrain  # noqa: E402, F401
import umv2_megatron.hf  # noqa: E402, F401 (conversions and exports; 2 s of transformers)
import umv2_megatron.training.dry_run  # noqa: E402, F401 (it and the next: what the program loads when it runs)
import umv2_megatron.training.resume  # noqa: E402, F401
from umv2_megatron.config.flags import option_table  # noqa: E402

option_table()  # reads mcore's sources once
