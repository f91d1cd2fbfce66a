"""Prompts and settings in, checked requests out. Everything a caller can get wrong is said here, before any work."""

from dataclasses import replace

from t3d.decoding.config import DecodingConfig
from t3d.decoding.sampling import derive_seed
from t3d.engine.request import Request
from t3d.errors import T3DError
from t3d.models import stop_ids


def make_requests(prompts, configs, seeds, names, model, tokenizer) -> list[Request]:
    """One request per prompt and sample, in order. See `Engine.generate` for what the arguments may be."""
    if isinstance(prompts, str):
        raise T3DError("prompts is one string; give a list of prompts")
    if not isinstance(configs, (list, tuple)):
        configs = [configs or DecodingConfig()] * len(prompts)
    if len(configs) != len(prompts):
        raise T3DError(f"{len(prompts)} prompts but {len(configs)} decoding configs; give one, or one per prompt")
    if seeds is not None and len(seeds) != len(prompts):
        raise T3DError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one per prompt")
    if names is not None and len(names) != len(prompts):
        raise T3DError(f"{len(prompts)} prompts but {len(names)} names; give one per prompt")
    resolved: dict[DecodingConfig, DecodingConfig] = {}
    requests = []
    for index, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
        if config not in resolved:
            resolved[config] = resolve(config, model, tokenizer)
        settings = resolved[config]
        ids = tuple(_encode(prompt, index, tokenizer))
        for sample in range(settings.n):
            if seeds is None:
                seed = derive_seed(settings.seed, index, sample)
            else:
                seed = seeds[index] if sample == 0 else derive_seed(seeds[index], sample)
            requests.append(Request(index, sample, ids, settings, seed, None if names is None else names[index]))
        _check(requests[-1], model.config)
    return requests


def resolve(config: DecodingConfig, model, tokenizer) -> DecodingConfig:
    """The settings with everything that comes from the model filled in: block size, steps and stop ids."""
    config = config.at(getattr(model.config, "block_size", None))
    if config.stop and tokenizer is None:
        raise T3DError("stop strings need a tokenizer; use stop_ids")
    stops = config.stop_ids
    if stops is None:
        stops = () if config.ignore_eos else stop_ids(model)
    return replace(config, stop_ids=stops)


def _encode(prompt, index: int, tokenizer) -> list[int]:
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if tokenizer is None:
        raise T3DError(f"prompt {index} is a string, but the engine has no tokenizer; give token ids")
    return tokenizer.encode(prompt, add_special_tokens=False)


def _check(request: Request, config) -> None:
    ids, name = request.prompt_ids, request.prompt
    mask_id, vocab, limit = config.mask_token_id, config.vocab_size, config.max_position_embeddings
    if not ids:
        raise T3DError(f"{name} is empty; give at least one token")
    if mask_id in ids:
        raise T3DError(
            f"{name} contains the mask token (id {mask_id}) at position {ids.index(mask_id)}; it marks what is to be "
            "generated and cannot be given"
        )
    if min(ids) < 0 or max(ids) >= vocab:
        raise T3DError(f"{name} has a token id outside 0..{vocab - 1}; was it made with this model's tokenizer?")
    if request.most_tokens > limit:
        raise T3DError(
            f"{name} has {len(ids)} tokens, with max_tokens = {request.config.max_tokens} {request.most_tokens} "
            f"positions, but the model's context is {limit}; shorten the prompt or lower max_tokens"
        )
