"""Pretrain an UltraMemV2 language model.

The program is `umv2_megatron/commands/pretrain.py`, which says how to start it; this file starts it from a checkout.
"""

from umv2_megatron.commands.pretrain import run

if __name__ == "__main__":
    run()
