"""Model families, and checkpoints as ordinary Hugging Face folders: loaded, saved, converted and exported."""

from t3d.models.families import FAMILIES
from t3d.models.load import load_model, load_tokenizer, stop_ids
from t3d.models.save import save_model
from t3d.models.sdar import SDARConfig, SDARForCausalLM
from t3d.models.sdar_moe import SDARMoeConfig, SDARMoeForCausalLM

__all__ = [
    "FAMILIES",
    "SDARConfig",
    "SDARForCausalLM",
    "SDARMoeConfig",
    "SDARMoeForCausalLM",
    "load_model",
    "load_tokenizer",
    "save_model",
    "stop_ids",
]
