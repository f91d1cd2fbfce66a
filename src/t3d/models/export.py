"""A checkpoint as another one: adapter merged, weights cast and cut into shards anew, and proved to be the same."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from t3d.blocks import block_causal_mask
from t3d.errors import T3DError
from t3d.models import serving
from t3d.models.files import local_folder, read_json, replacing
from t3d.models.load import load_model, load_tokenizer, torch_dtype
from t3d.models.save import SHARD, write_checkpoint

ADAPTER = "adapter_config.json"
POSITIONS = 64  # tokens whose logits are compared


@dataclass(frozen=True)
class Exported:
    """What `export` found when it loaded what it had written."""

    parameters: int
    dtype: str
    max_difference: float  # of a logit, to the model before the cast
    same_choice: float  # share of positions with the same likeliest token


def export(
    name: str | os.PathLike,
    out: str | os.PathLike,
    dtype: str | None = None,
    max_shard_size: str = SHARD,
    merge_lora: bool = False,
    base: str | os.PathLike | None = None,
    engine: str | None = None,
    device: str | None = None,
) -> Exported:
    """Write the checkpoint `name` to `out`, load it from there and compare logits.

    merge_lora: `name` is the folder of a PEFT adapter; it is merged into `base`, by default the model that it names.
    engine: also write and check what this engine needs, see `t3d.models.serving`.
    Raises T3DError, and leaves `out` as it was, when what was written does not give the very logits of the model.
    """
    if engine is not None and engine not in serving.ENGINES:
        raise T3DError(f"cannot export for {engine!r}; known: {', '.join(serving.ENGINES)}")
    adapter = (Path(name) / ADAPTER).exists()
    if adapter and not merge_lora:
        raise T3DError(f"{name} is a LoRA adapter; add --merge-lora to merge it into its base model")
    if merge_lora and not adapter:
        raise T3DError(f"{name} is not a LoRA adapter: it has no {ADAPTER}")
    if Path(out).exists() and Path(out).resolve() == Path(name).resolve():
        raise T3DError(f"{out} is what is exported; choose another folder")
    model, tokenizer = merged(name, base, device) if adapter else load_model(name, device=device)
    source = model.name_or_path
    wanted = torch_dtype(dtype) or model.dtype
    before = probe(model)
    for weight in model.parameters():  # not model.to(): that would round the rotary frequencies, too
        weight.data = weight.data.to(wanted)
    after = probe(model)
    with replacing(out) as temporary:
        write_checkpoint(model, temporary, tokenizer, source=source, max_shard_size=max_shard_size)
        if (Path(source) / "README.md").exists():
            shutil.copy(Path(source) / "README.md", temporary)
        if engine is not None:
            serving.prepare(temporary, engine)
        count = sum(p.numel() for p in model.parameters())
        del model
        again, _ = load_model(temporary, device=device)
        found = probe(again)
        if not torch.equal(found, after):
            worst = (found - after).abs().max().item()
            raise T3DError(f"{out}: the checkpoint that was written gives other logits (by up to {worst:g}); not kept")
    same = (found.argmax(-1) == before.argmax(-1)).float().mean().item()
    return Exported(count, str(wanted).removeprefix("torch."), (found - before).abs().max().item(), same)


@torch.no_grad()
def probe(model) -> torch.Tensor:
    """Logits, float32 `(POSITIONS, vocab)`, at random tokens."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    length = min(POSITIONS, config.max_position_embeddings)
    ids = torch.randint(config.vocab_size, (1, length), generator=generator).to(model.device)
    block = length if config.attention == "full" else config.block_size
    mask = block_causal_mask(length, block, model.device)[None, None]
    return model(ids, mask, torch.arange(length, device=model.device)[None]).logits[0].float().cpu()


def merged(adapter: str | os.PathLike, base: str | os.PathLike | None = None, device: str | None = None):
    """The base model with a PEFT adapter merged into its weights, and the tokenizer; `(model, tokenizer)`.

    Raises T3DError without peft, without the base model, or for an adapter that does not fit it.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise T3DError("merging a LoRA adapter needs peft: pip install 't3d[lora]'") from error
    named = read_json(Path(adapter) / ADAPTER).get("base_model_name_or_path")
    base = base or named
    if not base:
        raise T3DError(f"{adapter} does not say which model it adapts; add --base MODEL")
    try:
        local_folder(base)
    except T3DError as error:
        raise T3DError(f"{adapter} adapts {base}, which is not there ({error}); add --base MODEL") from error
    model, tokenizer = load_model(base, device=device)
    try:
        whole = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    except Exception as error:  # of many kinds: another architecture, a cut-short file, NaN
        raise T3DError(f"cannot merge {adapter} into {base}: {' '.join(str(error).split())}") from error
    return whole, load_tokenizer(adapter) or tokenizer
