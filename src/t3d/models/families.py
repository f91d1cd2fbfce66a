"""The supported families, by the `model_type` of their config.json."""

from t3d.models.sdar import SDARForCausalLM
from t3d.models.sdar_moe import SDARMoeForCausalLM

FAMILIES = {model.config_class.model_type: model for model in (SDARForCausalLM, SDARMoeForCausalLM)}
