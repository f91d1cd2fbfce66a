"""Model families. A checkpoint is an ordinary Hugging Face folder; which family it is, its `config.json` says."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from t3d.errors import T3DError
from t3d.models.sdar import SDARConfig, SDARForCausalLM

FAMILIES = {"sdar": SDARForCausalLM}

__all__ = [
    "FAMILIES",
    "SDARConfig",
    "SDARForCausalLM",
    "load_model",
    "load_tokenizer",
    "save_model",
    "stop_ids",
]


def load_model(
    name: str | os.PathLike, dtype: str | torch.dtype | None = None, device: str | None = None, quantisation=None
):
    """Load a checkpoint folder or hub id as `(model in eval mode, tokenizer or None)`.

    dtype: "float32", "bfloat16", ... or None for the checkpoint's own. device: e.g. "cuda"; None: cuda if there.
    quantisation: transformers' configuration of it, if any.
    Raises T3DError when it is not a checkpoint of a supported family, or when weights are missing.
    """
    name = str(name)
    settings = _config_dict(name)
    family = settings.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise T3DError(f"{name}: model type {family!r} is not supported (supported: {known})")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise T3DError(f"unknown dtype {dtype!r}; use float32, bfloat16 or float16")
        dtype = getattr(torch, dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, info = FAMILIES[family].from_pretrained(
            name,
            dtype=dtype or "auto",
            device_map={"": device},
            quantization_config=quantisation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # every library underneath raises its own kind; all mean: this folder does not load
        raise T3DError(f"cannot load the weights of {name}: {_first_line(error)}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(info["missing_keys"]) or sorted(name for name, *_ in info["mismatched_keys"])
        raise T3DError(f"{name}: {len(missing)} weights are missing or of the wrong shape, the first is {missing[0]}")
    tokenizer = load_tokenizer(name)
    if model.config.mask_token_id is None:
        model.config.mask_token_id = tokenizer.mask_token_id if tokenizer is not None else None
    if model.config.mask_token_id is None:
        raise T3DError(f"{name}: neither config.json nor the tokenizer says which token is the mask (mask_token_id)")
    return model.eval(), tokenizer


def load_tokenizer(name: str | os.PathLike):
    """The folder's tokenizer, or None if it has no tokenizer files. Never runs remote code."""
    path = Path(name)
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    if path.is_dir() and not any((path / file).exists() for file in files):
        return None
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns that the tokenizer's class is not "sdar"'s own
    try:
        return AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    except Exception as error:
        raise T3DError(f"cannot load the tokenizer of {name}: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def save_model(model: PreTrainedModel, folder: str | os.PathLike, tokenizer=None) -> None:
    """Save an ordinary HF folder (safetensors, config, generation config, tokenizer), whole or not at all."""
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise T3DError(f"cannot write {folder}: {error.strerror}") from error
    try:
        temporary.chmod(0o755)
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors' own files are readable by their owner only
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as error:
        raise T3DError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def stop_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """All token ids that end a response: generation_config's list, else config's."""
    for source in (model.generation_config, model.config):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)
    return ()


def _config_dict(name: str) -> dict:
    path = Path(name)
    if path.exists() and not (path / "config.json").exists():
        raise T3DError(f"{name} is not a checkpoint folder: it has no config.json")
    if not path.exists() and (name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/")):
        raise T3DError(f"no such checkpoint folder: {name}")
    try:
        settings, _ = PretrainedConfig.get_config_dict(name)
    except Exception as error:
        raise T3DError(f"cannot read the configuration of {name}: {_first_line(error)}") from error
    if not settings:
        raise T3DError(f"no checkpoint {name}: not a folder here, and not found on the hub")
    return settings


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
