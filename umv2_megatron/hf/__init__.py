"""UltraMemV2 for transformers. Importing this registers the model with transformers' Auto classes, so that
``AutoModelForCausalLM.from_pretrained(export)`` needs no remote code; what ``save_pretrained`` then writes carries a
copy of the files ``*_umv2.py`` here and an ``auto_map``. Imports nothing else of the package.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from umv2_megatron.hf.configuration_umv2 import UMv2Config
from umv2_megatron.hf.modeling_umv2 import UMv2ForCausalLM, UMv2Model, UMv2PreTrainedModel

AutoConfig.register(UMv2Config.model_type, UMv2Config, exist_ok=True)
AutoModel.register(UMv2Config, UMv2Model, exist_ok=True)
AutoModelForCausalLM.register(UMv2Config, UMv2ForCausalLM, exist_ok=True)
UMv2Config.register_for_auto_class()
UMv2Model.register_for_auto_class("AutoModel")
UMv2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["UMv2Config", "UMv2ForCausalLM", "UMv2Model", "UMv2PreTrainedModel"]
