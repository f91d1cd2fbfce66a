"""From an autoregressive model to a block-diffusion one, or from one block size to another: the same weights.

The result answers like nothing yet: it has never seen a mask, or not so many at once. `objective: sft` adapts it
(docs/models.md).
"""

import os
from pathlib import Path

import torch

from t3d.chat_template import render
from t3d.errors import T3DError
from t3d.models.families import FAMILIES
from t3d.models.files import check_weights, local_folder, read_config
from t3d.models.gguf import PACKAGES, as_folder, packaged
from t3d.models.load import check_mask, load_tokenizer, load_weights, mask_of, require_tokenizer
from t3d.models.recommended import KEY
from t3d.models.save import SHARD, save_model

MASK_TOKEN = "<|MASK|>"  # what SDAR calls it


def convert(
    name: str | os.PathLike,
    out: str | os.PathLike,
    block_size: int = 4,
    mask_token: str = MASK_TOKEN,
    dtype: str | None = None,
    max_shard_size: str = SHARD,
    shift: bool | None = None,
):
    """Write `name` as a block-diffusion checkpoint with this block size; returns `(model, tokenizer)`.

    name: a folder or hub id of an autoregressive model that a family is made of, or of a family; a GGUF file of the
    former; or a name of `t3d.models.gguf.PACKAGES`. shift: keep an autoregressive model's logits as they are, which at
    a position predict the next token (Dream, Fast-dLLM v2), or let them learn to predict the token at the position
    (SDAR, LLaDA2); None: the latter, and what has been decided for a model of a family.

    The mask token is the checkpoint's or the tokenizer's own, else `mask_token`, added; it takes the first unused row
    of the embedding, which grows if there is none. Its row becomes the mean of the vocabulary's, but where it has been
    trained. Stop ids are all that the files name, and the token that ends a turn of the chat template, before them.
    Raises T3DError when it is another kind of checkpoint, or has no tokenizer.
    """
    if block_size < 1:
        raise T3DError(f"block_size must be at least 1, got {block_size}")
    if name in PACKAGES:
        name = packaged(name)
    if not str(name).endswith(".gguf"):
        return _convert(local_folder(name), name, out, block_size, mask_token, dtype, max_shard_size, shift)
    if not Path(name).is_file():
        raise T3DError(f"no such file: {name}")
    with as_folder(Path(name), Path(out).parent, tuple(_autoregressive()), dtype) as folder:
        return _convert(folder, name, out, block_size, mask_token, dtype, max_shard_size, shift)


def _autoregressive() -> dict[str, list]:
    """The families that an autoregressive model can become, by its model type."""
    found: dict[str, list] = {}
    for family in FAMILIES.values():
        if family.autoregressive is not None:
            found.setdefault(family.autoregressive, []).append(family)
    return found


def _family(kind: str | None, shift: bool | None, name):
    """The family that a model of type `kind` becomes."""
    ours = _autoregressive()
    if kind not in ours and kind not in FAMILIES:
        raise T3DError(f"{name}: model type {kind!r} cannot be converted (can: {', '.join([*ours, *FAMILIES])})")
    if kind in FAMILIES:
        return FAMILIES[kind]
    able = [family for family in ours[kind] if bool(shift) in family.config_class.shifts]
    if not able:
        raise T3DError(f"{name}: model type {kind!r} can only be converted {'without' if shift else 'with'} --shift")
    return able[0]


def _convert(folder: Path, name, out, block_size: int, mask_token: str, dtype, max_shard_size: str, shift):
    values = read_config(folder)
    family = _family(values.get("model_type"), shift, name)
    check_weights(folder)
    tokenizer = load_tokenizer(folder)
    require_tokenizer(tokenizer, name)
    left = ("model_type", "architectures", "auto_map")
    config = family.config_class.from_dict({key: value for key, value in values.items() if key not in left})
    config.block_size = block_size
    if values["model_type"] not in FAMILIES and len(family.config_class.shifts) > 1:
        config.logits_shift = int(bool(shift))
    elif shift is not None and int(shift) != config.logits_shift:
        raise T3DError(f"{name} was made {'without' if shift else 'with'} the shift, which stays so; leave --shift out")
    words, knows_masks = len(tokenizer), values["model_type"] in FAMILIES
    if tokenizer.mask_token_id is None and not knows_masks:
        tokenizer.add_special_tokens({"mask_token": mask_token})
    if not knows_masks or config.mask_token_id is None:
        config.mask_token_id = mask_of(tokenizer, config.mask_tokens)
    model = load_weights(family, folder, name, dtype=dtype, device="cpu", config=config)
    if not knows_masks:
        _add_mask(model, config.mask_token_id, words)
    check_mask(model.config, name)
    generation = model.generation_config
    if hasattr(generation, KEY):  # what was found best for the old blocks
        delattr(generation, KEY)
    generation.eos_token_id = _stop_ids(model, tokenizer)
    if generation.pad_token_id is None:
        generation.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    save_model(model, out, tokenizer, max_shard_size=max_shard_size)
    return model, tokenizer


def _add_mask(model, mask_id: int, words: int) -> None:
    if mask_id >= model.config.vocab_size:
        model.resize_token_embeddings(max(words, mask_id + 1), mean_resizing=False)
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:  # one if tied
            weight[mask_id] = weight[:words].mean(0, dtype=torch.float32).to(weight.dtype)


def _stop_ids(model, tokenizer) -> list[int]:
    found = [] if (end := _end_of_turn(tokenizer)) is None else [end]
    for ids in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        found += ids if isinstance(ids, list) else [ids]
    found = list(dict.fromkeys(token for token in found if token is not None))
    if not found:
        raise T3DError("no stop token: generation_config.json, config.json and the tokenizer name none (eos_token_id)")
    return found


def _end_of_turn(tokenizer) -> int | None:
    """The special token that the chat template puts behind an answer."""
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ids = tokenizer(render(tokenizer, chat), add_special_tokens=False)["input_ids"]
    special = [token for token in ids if token in tokenizer.all_special_ids]
    return special[-1] if special else None
