"""Saving a checkpoint: an ordinary Hugging Face folder that transformers, SGLang and LMDeploy read."""

import json
import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from t3d.errors import T3DError
from t3d.models.files import TOKENIZER_FILES, read_json, replacing
from t3d.models.load import load_tokenizer, mask_of
from t3d.trajectories.fingerprint import tokenizer_fingerprint

SHARD = "5GB"


def save_model(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    tokenizer=None,
    *,
    source: str | os.PathLike | None = None,
    max_shard_size: str = SHARD,
) -> None:
    """Save safetensors, config, generation config, tokenizer, and what other engines need, whole or not at all.

    Args:
        model: a model of a family.
        folder: is replaced as a whole.
        tokenizer: is saved beside the model, if given.
        source: the folder whose other files are carried over untouched: code that its `auto_map` names, licences, and
            the tokenizer's files where the tokenizer is still the same; default: where the model was loaded from.
        max_shard_size: largest size of one file of weights.

    Raises:
        T3DError: if it cannot be written; what was in `folder` is then still there.
    """
    with replacing(folder) as temporary:
        write_checkpoint(model, temporary, tokenizer, source=source, max_shard_size=max_shard_size)


def write_checkpoint(model, folder: Path, tokenizer=None, *, source=None, max_shard_size: str = SHARD) -> None:
    """The files of a checkpoint, into an empty folder."""
    if getattr(model, "quantized", None):
        raise T3DError("a quantised model is not saved: quantise the checkpoint when it is loaded")
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except ValueError as error:  # a size that cannot be read, a generation config that contradicts itself
        raise T3DError(f"cannot save the model: {' '.join(str(error).split())}") from error
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        _for_transformers_4(folder)
    source = source or model.name_or_path  # empty for a model that was not loaded
    if source and (Path(source) / "config.json").exists():
        _carry_over(Path(source), folder, tokenizer, model.config)
    _drop_dangling(folder)


def _carry_over(source: Path, folder: Path, tokenizer, config) -> None:
    for path in [*source.glob("*.py"), *source.glob("LICENSE*")]:
        shutil.copy(path, folder)
    if tokenizer is not None and _same(tokenizer, load_tokenizer(source)):
        # Its own files say so to any version of any library. What has been written stays beside.
        for name in TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copy(source / name, folder)
    ours, theirs = read_json(folder / "config.json"), read_json(source / "config.json")
    if theirs.get("model_type") == ours["model_type"]:
        found = {"block_size": type(config).block_size}
        found["mask_token_id"] = None if tokenizer is None else mask_of(tokenizer, config.mask_tokens)
        left_out = {k for k in config.implied if k not in theirs and ours.get(k) == found[k]}
        _write_json(folder / "config.json", theirs | {k: v for k, v in ours.items() if k not in left_out})


def _same(one, other) -> bool:
    if other is None or one.special_tokens_map != other.special_tokens_map:
        return False
    return tokenizer_fingerprint(one) == tokenizer_fingerprint(other)


def _for_transformers_4(folder: Path) -> None:
    """Write tokenizer_config.json as version 4 reads it, which engines still have; version 5 reads both."""
    path = folder / "tokenizer_config.json"
    values = read_json(path)
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(path, values)


def _drop_dangling(folder: Path) -> None:
    """Drop `auto_map` entries whose code is not in the folder: a loader that trusts them would fail."""
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).exists() or "auto_map" not in (values := read_json(folder / name)):
            continue
        kept = {key: value for key, value in values["auto_map"].items() if _is_there(value, folder)}
        if kept != values["auto_map"]:
            rest = {key: value for key, value in values.items() if key != "auto_map"}
            _write_json(folder / name, rest | ({"auto_map": kept} if kept else {}))


def _is_there(reference, folder: Path) -> bool:
    """Whether the code of `module.Class` is in the folder; `repository--module.Class` is elsewhere and stays."""
    names = [name for name in (reference if isinstance(reference, list) else [reference]) if name]
    return all("--" in name or (folder / f"{name.rpartition('.')[0].replace('.', '/')}.py").exists() for name in names)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
