"""What other engines need beside the checkpoint itself: a configuration file, and a folder that they can read.

The facts are from the engines' sources (docs/serving.md says which); nothing here was run with them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from t3d.errors import T3DError
from t3d.models.files import TOKENIZER_FILES, read_config
from t3d.models.recommended import recommended

DEFAULTS = {"steps": None, "strategy": "low_confidence_static", "threshold": 0.9}
BASES = {"sdar": "Qwen3Config", "sdar_moe": "Qwen3MoeConfig"}  # the families that both engines know
MASK_ID = 151669  # both engines have it in their source, whatever config.json says

NEEDED = ("rope_theta", "architectures", "block_size", "num_attention_heads", "num_key_value_heads", "head_dim")
NEEDED_MOE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")

# A configuration class for the engines' transformers, where the checkpoint brings none: without one they refuse the
# model type. The engines have the model itself.
CONFIGURATION = '''"""Configuration of an SDAR checkpoint, for libraries that do not know its model type."""

from transformers import {base}


class {name}({base}):
    model_type = "{family}"
'''


@dataclass(frozen=True)
class Serving:
    """One engine: the file it is configured with, and the command that starts it."""

    file: str
    content: Callable[[int, dict], str]  # of the block size and the decode settings
    command: Callable[[str, int, dict], str]  # of the folder, the block size and the decode settings
    strategies: tuple[str, ...]


def _sglang(block_size: int, decode: dict) -> str:
    """LowConfidence has a threshold alone: 1 commits one token at a step, 0 all of a block."""
    return yaml.safe_dump(
        {"threshold": sglang_threshold(block_size, decode), "block_size": block_size}, sort_keys=False
    )


def sglang_threshold(block_size: int, decode: dict) -> float:
    """The threshold that decodes as `decode` does; T3DError where there is none."""
    if decode["strategy"] == "low_confidence_dynamic":
        return float(decode["threshold"])
    steps = decode["steps"] or block_size
    if decode["strategy"] == "low_confidence_static" and steps in (1, block_size):
        return 0.0 if steps == 1 else 1.0
    raise T3DError(
        f"SGLang cannot decode with {decode['strategy']} in {steps} of {block_size} steps: it has a confidence "
        "threshold alone; choose low_confidence_dynamic, or one step, or as many as the block has tokens"
    )


def _lmdeploy(block_size: int, decode: dict) -> str:
    return json.dumps(lmdeploy_options(block_size, decode), indent=2) + "\n"


def lmdeploy_options(block_size: int, decode: dict) -> dict:
    """Arguments of LMDeploy's `PytorchEngineConfig` that decode as `decode` does; T3DError where there are none."""
    options = {"dllm_block_length": block_size, "dllm_unmasking_strategy": decode["strategy"]}
    if decode["strategy"] == "low_confidence_dynamic":
        return options | {"dllm_confidence_threshold": float(decode["threshold"])}
    if decode["strategy"] not in ("low_confidence_static", "sequential"):
        raise T3DError(f"LMDeploy cannot decode with {decode['strategy']}")
    steps = decode["steps"] or block_size
    if block_size % steps:
        raise T3DError(f"LMDeploy cannot decode {block_size} tokens in {steps} steps: it commits equally many at each")
    return options | {"dllm_denoising_steps": steps}


def _lmdeploy_command(folder: str, block_size: int, decode: dict) -> str:
    options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in lmdeploy_options(block_size, decode).items())
    return f"lmdeploy serve api_server {folder} --backend pytorch {options}"


ENGINES = {
    "sglang": Serving(
        "sglang.yaml",
        _sglang,
        lambda folder, block_size, decode: (
            f"python -m sglang.launch_server --model-path {folder} --trust-remote-code --dllm-algorithm LowConfidence "
            f"--dllm-algorithm-config {folder}/sglang.yaml"
        ),
        ("low_confidence_dynamic", "low_confidence_static"),
    ),
    "lmdeploy": Serving(
        "lmdeploy.json",
        _lmdeploy,
        _lmdeploy_command,
        ("low_confidence_dynamic", "low_confidence_static", "sequential"),
    ),
}


def prepare(folder: Path, engine: str) -> None:
    """Write the engine's configuration file into a checkpoint folder, and check what the engine reads of the rest.

    The decode settings are those that the folder recommends (see `recommended`).
    Raises T3DError when the engine could not serve it, or not as recommended.
    """
    config, serving = read_config(folder), ENGINES[engine]
    if config["model_type"] not in BASES:
        raise T3DError(f"{engine} cannot serve it: it knows {' and '.join(BASES)}, not {config['model_type']}")
    if config.get("mask_token_id") != MASK_ID:
        raise T3DError(
            f"{engine} cannot serve it: its mask token is {config.get('mask_token_id')}; {engine} knows {MASK_ID} only"
        )
    if not any((folder / name).exists() for name in TOKENIZER_FILES[:3]):
        raise T3DError(f"{engine} cannot serve it: there is no tokenizer")
    moe = config["model_type"] == "sdar_moe"
    for key in NEEDED + (NEEDED_MOE if moe else ()):
        if config.get(key) is None:
            raise T3DError(f"{engine} cannot serve it: config.json has no {key}")
    if engine == "sglang" and moe and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        raise T3DError("SGLang cannot serve it: some layers have no experts, and there all have")
    _describe_type(folder, config)
    decode = DEFAULTS | recommended(folder)
    (folder / serving.file).write_text(serving.content(config["block_size"], decode), encoding="utf-8")


def command(folder: Path, engine: str) -> str:
    """The command that starts the engine on a folder that `prepare` has prepared."""
    decode = DEFAULTS | recommended(folder)
    return ENGINES[engine].command(str(folder), read_config(folder)["block_size"], decode)


def _describe_type(folder: Path, config: dict) -> None:
    """Give the folder a configuration class, if it brings none."""
    if "AutoConfig" in config.get("auto_map", {}):
        return
    family, name = config["model_type"], config["architectures"][0].replace("ForCausalLM", "Config")
    module = f"configuration_{family}"
    code = CONFIGURATION.format(base=BASES[family], name=name, family=family)
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    config = config | {"auto_map": config.get("auto_map", {}) | {"AutoConfig": f"{module}.{name}"}}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
