"""Loading a checkpoint: an ordinary Hugging Face folder, or a hub id. Which family it is, its `config.json` says."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

from t3d.errors import T3DError
from t3d.log import log
from t3d.models.families import FAMILIES
from t3d.models.files import TOKENIZER_FILES, check_weights, first_line, local_folder, read_config, read_json
from t3d.models.quantize import check_kind
from t3d.models.quantize import quantize as to_bits
from t3d.models.sdar import SDARConfig

OWN_TOKENIZERS = {"DreamTokenizer": Qwen2Tokenizer}  # a class that is code of the checkpoint: transformers' like it

# Model types that people may try, and why they are not here.
NOT_HERE = {
    "diffusion_gemma": "it has no mask token: its noise is random tokens",
    "lladamoe": "the layers of LLaDA-MoE are not here, only those of LLaDA2",
    "llada_moe": "the layers of LLaDA-MoE are not here, only those of LLaDA2",
    "sedd": "it predicts ratios of probabilities, not tokens",
    "mdlm": "its layers take the noise level, those of all families here do not",
}


def load_model(
    name: str | os.PathLike,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    attention: str = "sdpa",
    quantisation=None,
    quantize: str | None = None,
):
    """Load a checkpoint folder or hub id as `(model in eval mode, tokenizer or None)`; never runs remote code.

    Weights go from the mapped files to their device and dtype one by one, so that nothing is in memory twice.

    Args:
        name: a checkpoint folder or a hub id.
        dtype: "float32", "bfloat16", ...; None: the checkpoint's own.
        device: e.g. "cuda"; None: cuda if there is one.
        attention: transformers' implementation, "sdpa" or "flex_attention" (whose backward pass needs a GPU).
        quantisation: transformers' configuration of it, if any.
        quantize: "int8" or "int4", for decoding alone; `dtype` is then that of the computation, None: float32 on a CPU.

    Raises:
        T3DError: if it is not a checkpoint of a supported family, or weights are missing.
    """
    check_kind(quantize)
    folder = local_folder(name)
    values = read_config(folder)
    family = values.get("model_type")
    if family not in FAMILIES:
        raise T3DError(
            f"{name}: model type {family!r} is not supported (supported: {', '.join(FAMILIES)}){_hint(family)}"
        )
    check_weights(folder)
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json")  # transformers would go on without its stop ids
    loaded = {"device": device, "attention": attention, "quantisation": quantisation}
    model = load_weights(FAMILIES[family], folder, name, dtype=None if quantize else dtype, **loaded)
    if quantize:
        cpu = model.device.type == "cpu"
        to_bits(model, quantize, torch_dtype(dtype) or (torch.float32 if cpu else model.dtype))
    tokenizer = load_tokenizer(folder)
    if model.config.mask_token_id is None and tokenizer is not None:
        model.config.mask_token_id = mask_of(tokenizer, model.config.mask_tokens)
    check_mask(model.config, name)
    if model.config.several_sizes and "block_size" not in values:
        log.warning(
            "%s: config.json does not say the block size; if it is not %d, as most have, write another with "
            "`t3d convert --block-size`",
            name, model.config.block_size,
        )  # fmt: skip
    if (stops := _all_stops(stop_ids(model), tokenizer, model.config.stop_tokens)) != stop_ids(model):
        model.generation_config.eos_token_id = list(stops)
    return model, tokenizer


def mask_of(tokenizer, names: tuple[str, ...]) -> int | None:
    """The tokenizer's mask token, else the first of `names` that it has."""
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    known = tokenizer.get_added_vocab()
    return next((known[name] for name in names if name in known), None)


def _all_stops(ids: tuple[int, ...], tokenizer, names: tuple[str, ...]) -> tuple[int, ...]:
    """`ids`, what the files name; without any the tokenizer's; and those of `names` that the tokenizer has."""
    if tokenizer is None:
        return ids
    if not ids and tokenizer.eos_token_id is not None:
        ids = (tokenizer.eos_token_id,)
    known = tokenizer.get_added_vocab()
    return tuple(dict.fromkeys([*ids, *(known[name] for name in names if name in known)]))


def check_mask(config, name) -> None:
    """Raises T3DError if the configuration names no mask token, or one outside of the vocabulary."""
    if config.mask_token_id is None:
        raise T3DError(f"{name}: neither config.json nor the tokenizer says which token is the mask (mask_token_id)")
    mask, size = config.mask_token_id, config.vocab_size
    if not isinstance(mask, int) or not 0 <= mask < size:
        raise T3DError(f"{name}: mask_token_id is {mask!r}, outside of the vocabulary of {size} tokens")


def load_weights(
    family: type[PreTrainedModel],
    folder,
    name,
    *,
    dtype=None,
    device=None,
    attention="sdpa",
    quantisation=None,
    config=None,
) -> PreTrainedModel:
    """A model of `family` from the weights in `folder`, in eval mode; `name` is what errors call it."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if config is None:
            config = family.config_class.from_pretrained(folder)
        config.check()
        model, info = family.from_pretrained(
            folder,
            config=config,
            dtype=torch_dtype(dtype) or "auto",
            device_map={"": device},
            attn_implementation=attention,
            quantization_config=quantisation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except T3DError as error:
        raise T3DError(f"{name}: {error}") from error
    except Exception as error:  # every library underneath raises its own kind; all mean: this folder does not load
        raise T3DError(f"cannot load the weights of {name}: {first_line(error)}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(info["missing_keys"]) or sorted(key for key, *_ in info["mismatched_keys"])
        raise T3DError(f"{name}: {len(missing)} weights are missing or of the wrong shape, the first is {missing[0]}")
    if unused := sorted(info["unexpected_keys"]):
        log.warning(
            "%s: %d weights in the files are not part of the model, the first is %s", name, len(unused), unused[0]
        )
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.config.tie_word_embeddings = tied  # files that have both, and different ones, overrule config.json
    if model.generation_config.temperature == 0 and not model.generation_config.do_sample:
        model.generation_config.temperature = None  # Dream's files say both, and transformers does not write both
    model.get_input_embeddings().padding_idx = None  # padding is told by length; a stop token that pads is trained, too
    return model.eval()


def load_tokenizer(name: str | os.PathLike):
    """The checkpoint's tokenizer, or None if it has no tokenizer files. Never runs remote code."""
    folder = local_folder(name, needs="")
    if not any((folder / file).exists() for file in TOKENIZER_FILES[:3]):
        return None
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns that the tokenizer's class is not "sdar"'s own
    said = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    try:
        kind = OWN_TOKENIZERS.get(said.get("tokenizer_class", ""), AutoTokenizer)
        return kind.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise T3DError(f"cannot load the tokenizer of {name}: {first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def require_tokenizer(tokenizer, name) -> None:
    """Raises T3DError if the checkpoint `name` came without a tokenizer."""
    if tokenizer is None:
        raise T3DError(f"{name} has no tokenizer; put the model's tokenizer files into the folder")


def stop_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """All token ids that end a response: generation_config's list, which loading completes, else config's."""
    for source in (model.generation_config, model.config):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)
    return ()


def generation_ids(name: str | os.PathLike):
    """`(tokenizer, stop ids, block size or window)` of a checkpoint whose weights are not needed, or not there."""
    folder = local_folder(name)
    tokenizer, found = load_tokenizer(folder), dict[str, Any]()
    require_tokenizer(tokenizer, name)
    for file in ("config.json", "generation_config.json"):
        if (folder / file).exists():
            found |= {k: v for k, v in read_json(folder / file).items() if v is not None}
    config = plain_config(folder)
    ids = found.get("eos_token_id", ())
    stops = tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)
    return tokenizer, _all_stops(stops, tokenizer, config.stop_tokens), config.window


def plain_config(folder: Path):
    """The configuration of a checkpoint's config.json, as its family reads it; of no family, SDAR's defaults."""
    values = read_config(folder)
    family = FAMILIES.get(values.get("model_type", ""))
    return family.config_class.from_dict(values) if family else SDARConfig()


def cast(model: torch.nn.Module, dtype: torch.dtype | None):
    """The model with its weights in `dtype`, in place. Buffers (rotary frequencies, what routers add) keep theirs, as
    in loading, and unlike in `model.to(dtype)`."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def torch_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    if name is None or isinstance(name, torch.dtype):
        return name
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise T3DError(f"unknown dtype {name!r}; use float32, bfloat16 or float16")
    return getattr(torch, name)


def _hint(family) -> str:
    if family is not None and family in {model.autoregressive for model in FAMILIES.values()}:
        return "; `t3d convert` makes a block-diffusion model of it"
    return f"; {NOT_HERE[family]}" if family in NOT_HERE else ""
