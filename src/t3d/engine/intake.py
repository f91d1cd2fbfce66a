"""Prompts and settings in, checked requests out. Everything a caller can get wrong is said here, before any work."""

from dataclasses import replace

from t3d.blocks import geometry
from t3d.decoding.config import DecodingConfig
from t3d.decoding.logprobs import MOST
from t3d.decoding.policy import SHADOW
from t3d.decoding.sampling import derive_seed
from t3d.engine.request import Request
from t3d.errors import PromptError, T3DError, characters
from t3d.models import stop_ids


def make_requests(prompts, configs, seeds, names, model, tokenizer, logprobs: int | None = None) -> list[Request]:
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
    most = min(MOST, model.config.vocab_size - 1)
    if logprobs is not None and not 0 <= logprobs <= most:
        raise T3DError(f"logprobs must lie in 0..{most}, got {logprobs}")
    resolved: dict[DecodingConfig, DecodingConfig] = {}
    requests = []
    for index, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
        if config not in resolved:
            resolved[config] = resolve(config, model, tokenizer)
        settings = resolved[config]
        ids, negative = tuple(_encode(prompt, index, tokenizer)), None
        if settings.negative_prompt is not None:
            negative = tuple(_encode(settings.negative_prompt, index, tokenizer))
        for sample in range(settings.n):
            if seeds is None:
                seed = derive_seed(settings.seed, index, sample)
            else:
                seed = seeds[index] if sample == 0 else derive_seed(seeds[index], sample)
            name = None if names is None else names[index]
            about = (index, sample, ids, settings, seed, name, negative)
            requests.append(Request(*about, **geometry(model.config), logprobs=logprobs))
        _check(requests[-1], model.config)
    return requests


def faults(prompts, configs, names, model_config, tokenizer) -> dict[str, str]:
    """Why prompts (token ids) cannot be decoded at one of these settings, by their names; not those that can."""
    configs = [_at(config, model_config) for config in configs]
    others = [None if c.negative_prompt is None else tuple(_encode(c.negative_prompt, 0, tokenizer)) for c in configs]
    found = {}
    for index, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        try:
            for config, negative in zip(configs, others, strict=True):
                about = (index, 0, tuple(prompt), config, 0, name, negative)
                _check(Request(*about, **geometry(model_config)), model_config)
        except PromptError as error:
            found[name] = str(error)
    return found


def resolve(config: DecodingConfig, model, tokenizer) -> DecodingConfig:
    """The settings with everything that comes from the model filled in: block size, steps and stop ids."""
    config = _at(config, model.config)
    if geometry(model.config)["full"]:
        _check_attention(config)
    elif config.approximate_cache != "none":
        raise T3DError(
            "approximate_cache is for models in which every token sees every other; this one's cache is exact, so "
            "leave it out"
        )
    if getattr(model.config, "logits_shift", 0):
        asks = f"flight {config.flight!r}" if config.flying.verifies else f"strategy {config.strategy!r}"
        if config.flying.verifies or SHADOW in config.policy.needs:
            raise T3DError(
                f"{asks} asks masks beside the text about their own places, and this model's logits predict the next "
                "token (logits_shift); use another"
            )
    elif config.flying.shifted:
        raise T3DError(
            f"flight {config.flight!r} is for models whose logits predict the next token (logits_shift); this one's do "
            "not; use another"
        )
    if config.stop and tokenizer is None:
        raise T3DError("stop strings need a tokenizer; use stop_ids")
    if config.negative_prompt is not None and tokenizer is None:
        raise T3DError("negative_prompt needs a tokenizer; leave it out to mask the question")
    stops = config.stop_ids
    if stops is None:
        stops = () if config.ignore_eos else stop_ids(model)
    return replace(config, stop_ids=stops)


def _at(config: DecodingConfig, model_config) -> DecodingConfig:
    size = getattr(model_config, "window", getattr(model_config, "block_size", None))
    full = geometry(model_config)["full"]
    if size is None and config.block_size is None and not full:
        raise T3DError("the model's config has no block_size; set it in the decoding settings")
    return config.at(size)


def _check_attention(config: DecodingConfig) -> None:
    """Raises T3DError for what takes it that nobody sees the blocks behind those in flight."""
    for unable, what in (
        (not config.flying.full_attention, f"flight {config.flight!r}"),
        (config.recheck > 0, "recheck"),
        (SHADOW in config.policy.needs, f"strategy {config.strategy!r}"),
        (config.negative_prompt is not None, "negative_prompt"),
        (config.approximate_cache != "none" and config.blocks_in_flight > 1, "approximate_cache with several blocks"),
    ):
        if unable:
            raise T3DError(f"{what} does not work where every token sees every other, as in this model; leave it out")


def _encode(prompt, index: int, tokenizer) -> list[int]:
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if tokenizer is None:
        raise T3DError(f"prompt {index} is a string, but the engine has no tokenizer; give token ids")
    return tokenizer.encode(characters(prompt, f"prompt {index}"), add_special_tokens=False)


def _check(request: Request, config) -> None:
    name, limit = request.prompt, config.max_position_embeddings
    if fault := _fault(request.prompt_ids, config):
        raise PromptError(f"{name} {fault}")
    if request.negative_ids is not None and (fault := _fault(request.negative_ids, config)):
        raise T3DError(f"the negative prompt of {name} {fault}")
    if request.length > limit:
        raise PromptError(
            f"{name} has {len(request.prompt_ids)} tokens, with max_tokens = {request.config.max_tokens} "
            f"{request.length} positions, but the model's context is {limit}; shorten the prompt or lower "
            "max_tokens"
        )
    if request.guided and (most := request.companion_most) > limit:
        raise PromptError(
            f"{name} comes to {most} positions behind its negative prompt of {request.companion_length} tokens, but "
            f"the model's context is {limit}; shorten negative_prompt or lower max_tokens"
        )


def _fault(ids: tuple[int, ...], config) -> str | None:
    """What is wrong with the ids of a prompt, whatever its length."""
    mask_id, vocab = config.mask_token_id, config.vocab_size
    if not ids:
        return "is empty; give at least one token"
    if mask_id in ids:
        return (
            f"contains the mask token (id {mask_id}) at position {ids.index(mask_id)}; it marks what is to be "
            "generated and cannot be given"
        )
    if min(ids) < 0 or max(ids) >= vocab:
        return f"has a token id outside 0..{vocab - 1}; was it made with this model's tokenizer?"
    return None
