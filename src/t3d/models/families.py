"""The supported families, by the `model_type` of their config.json. A new one is its file and a line here."""

from transformers import AutoConfig, AutoModelForCausalLM

from t3d.models.a2d import A2DLlamaLMHeadModel, A2DQwen2LMHeadModel, A2DQwen3LMHeadModel
from t3d.models.block_gemma3 import BlockGemma3ForCausalLM
from t3d.models.block_llama import BlockLlamaForCausalLM
from t3d.models.block_qwen2 import BlockQwen2ForCausalLM
from t3d.models.block_qwen3 import BlockQwen3ForCausalLM
from t3d.models.dream import DreamModel
from t3d.models.fast_dllm_v2 import Fast_dLLM_QwenForCausalLM
from t3d.models.llada import LLaDAModelLM
from t3d.models.llada2_moe import LLaDA2MoeModelLM
from t3d.models.sdar import SDARForCausalLM
from t3d.models.sdar_moe import SDARMoeForCausalLM

# Of those that an autoregressive model can become, `t3d convert` takes the first with the shift that was asked for.
MODELS = (
    SDARForCausalLM,
    SDARMoeForCausalLM,
    BlockQwen3ForCausalLM,
    BlockQwen2ForCausalLM,
    BlockLlamaForCausalLM,
    BlockGemma3ForCausalLM,
    A2DQwen3LMHeadModel,
    A2DQwen2LMHeadModel,
    A2DLlamaLMHeadModel,
    DreamModel,
    LLaDAModelLM,
    LLaDA2MoeModelLM,
    Fast_dLLM_QwenForCausalLM,
)
FAMILIES = {model.config_class.model_type: model for model in MODELS}

for _name, _model in FAMILIES.items():
    AutoConfig.register(_name, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)
