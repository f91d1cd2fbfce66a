"""New weights for a model that is being served: read beside it, installed between two answers."""

import asyncio

import torch

from t3d.embedded import checkpoint
from t3d.engine.kv_cache import dtype_of
from t3d.errors import T3DError
from t3d.log import log
from t3d.models import load_model
from t3d.serve.model import Served, recommended_decoding
from t3d.trajectories.fingerprint import tokenizer_fingerprint

_FREE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}  # keys that may differ


async def update(served: Served, path: str, settings: dict) -> int:
    """Serve the weights of another checkpoint of the same architecture, and what it recommends beside `settings`.

    Answers in flight end on the old weights; those that wait, and new ones, begin on the new. Returns how many waited.
    Raises T3DError, one line, if it does not fit; then nothing has changed.
    """
    async with served.updating:
        try:
            model, default = await asyncio.to_thread(_read, served, path, settings)

            @torch.no_grad()
            def install() -> None:  # in place, so that whatever holds the model has the new weights
                served.model.load_state_dict(model.state_dict())
                served.model.generation_config = model.generation_config

            waited = await served.worker.install(install)
        except T3DError as error:
            log.error("%s: the old weights go on being served: %s", served.name, error)
            raise
        served.path, served.default = path, default
        log.info("%s: the weights of %s are served now", served.name, path)
        return waited


def _read(served: Served, path: str, settings: dict):
    """(model on the CPU, default decoding settings). Raises T3DError."""
    ours = served.model
    model, tokenizer = load_model(checkpoint(path), dtype_of(ours), "cpu", quantize=getattr(ours, "quantized", None))
    now, then = ours.config.to_dict(), model.config.to_dict()
    for key in sorted((now.keys() | then.keys()) - _FREE):
        if now.get(key) != then.get(key):
            raise T3DError(f"{path} is another architecture: {key} is {then.get(key)!r}, not {now.get(key)!r}")
    shapes = [{name: (x.shape, x.dtype) for name, x in m.state_dict().items()} for m in (ours, model)]
    if shapes[0] != shapes[1]:
        name = min(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise T3DError(f"{path} has weights of another shape or type: {name}")
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(served.tokenizer):
        raise T3DError(f"{path} has another tokenizer or chat template, or none; start a server for it")
    return model, recommended_decoding(path, model, served.tokenizer, settings)
