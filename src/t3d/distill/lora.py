"""Low-rank adapters through `peft` (LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314)."""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from t3d.distill.config import T3DConfig
from t3d.errors import T3DError

STUDENT, REFERENCE = "default", "reference"  # names of adapters; peft calls the first one so
_UNADAPTED = ("lm_head", "embed_tokens")  # objectives and the engine read these weights as they are


def add_adapter(model: nn.Module, config: T3DConfig) -> nn.Module:
    """`model` frozen, with a trainable adapter that as yet changes nothing: a `peft.PeftModel`.

    Raises:
        T3DError: if peft is missing, or the model has no modules of the names given.
    """
    peft = _peft()
    targets = config.lora_targets
    if named := [name for name in targets if name.rpartition(".")[2] in _UNADAPTED]:
        raise T3DError(f"train.lora_targets: {named[0]} cannot have an adapter; leave it out")
    if getattr(model, "is_loaded_in_4bit", False):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # in every process the same adapter
            return peft.get_peft_model(model, settings, adapter_name=STUDENT)
    except ValueError as error:
        raise T3DError(f"train.lora_targets: {str(error).splitlines()[0]}") from error


def add_reference(model: nn.Module) -> None:
    """A second, frozen adapter for the reference: the student's as it begins, which changes nothing."""
    model.add_adapter(REFERENCE, model.peft_config[STUDENT])
    weights = adapter_weights(model, STUDENT)
    for name, weight in adapter_weights(model, REFERENCE).items():
        weight.data.copy_(weights[name].data)
    model.set_adapter(STUDENT)


def adapter_weights(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The weights of one adapter, by a name that is the same for all adapters."""
    part = f".{adapter}."
    return {name.replace(part, "."): p for name, p in model.named_parameters() if "lora_" in name and part in name}


@contextmanager
def reference_active(model: nn.Module):
    """Inside, the model is the reference: with its own adapter if it has one, else with none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    own = REFERENCE in model.peft_config
    try:
        for layer in layers:
            layer.set_adapter(REFERENCE, inference_mode=True) if own else layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.set_adapter(STUDENT)
            layer.enable_adapters(True)


def plain(model: nn.Module) -> nn.Module:
    """The transformers model inside (its linear layers apply the active adapter), or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def merged(base: nn.Module, folder: Path) -> nn.Module:
    """`base` with the adapter saved in `folder` added to its weights."""
    return _peft().PeftModel.from_pretrained(base, folder).merge_and_unload()


def quantisation(config: T3DConfig):
    """What to load the base model with for `lora_4bit`: NF4 with bfloat16 arithmetic, as in the QLoRA paper."""
    _peft()
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise T3DError("train.lora_4bit needs bitsandbytes: pip install 't3d[qlora]'") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _peft():
    try:
        import peft
    except ImportError as error:
        raise T3DError("train.lora_rank needs peft: pip install 't3d[lora]'") from error
    return peft
