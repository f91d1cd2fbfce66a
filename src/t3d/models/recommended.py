"""How a checkpoint is best decoded: `block_diffusion` in its generation_config.json, fields of `DecodingConfig`.

It is said there, and not in config.json, because it is about generation and because weights and architecture are the
same before and after. Other libraries leave the key alone. Where it is not said, it is how the family is published.
"""

import json
import os
from pathlib import Path

from transformers import PreTrainedModel

from t3d.disk import write_whole
from t3d.models.files import read_json
from t3d.models.load import plain_config

KEY = "block_diffusion"
SAMPLING = ("temperature", "top_k", "top_p")  # what transformers has a place for, too


def recommended(of: PreTrainedModel | str | os.PathLike) -> dict:
    """What a model or a checkpoint folder recommends, for `DecodingConfig(**recommended(model))`; empty if nothing."""
    if isinstance(of, PreTrainedModel):
        found, config = getattr(of.generation_config, KEY, None), of.config
    else:
        path = Path(of) / "generation_config.json"
        found, config = read_json(path).get(KEY) if path.exists() else None, plain_config(Path(of))
    return dict(found) if found and isinstance(found, dict) else dict(getattr(config, "decoding", {}))


def recommend(folder: str | os.PathLike, settings: dict) -> None:
    """Write `settings`, fields of `DecodingConfig`, into a checkpoint's generation_config.json, the rest as it is.

    The sampling of transformers' own keys becomes the same.
    """
    path = Path(folder) / "generation_config.json"
    values = read_json(path) if path.exists() else {}
    # Where `_from_model_config` is set, transformers makes the values anew from config.json and forgets others.
    values = {key: value for key, value in values.items() if key not in (*SAMPLING, "_from_model_config")}
    values["do_sample"] = bool(settings.get("temperature"))
    if values["do_sample"]:
        values |= {key: settings[key] for key in SAMPLING if key in settings}
    values[KEY] = settings
    write_whole(path, json.dumps(values, indent=2, sort_keys=True) + "\n")
