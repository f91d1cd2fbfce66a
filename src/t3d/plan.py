"""What a run needs in memory, per GPU, and how each part is computed: `t3d plan`.

Weights are counted on the model itself, built without memory (on the meta device); activations come from a formula that
the tests hold against the tensors that PyTorch keeps for the backward pass of a real layer.
"""

from dataclasses import dataclass, replace

import torch
from rich.table import Table
from torch import nn
from transformers import PretrainedConfig

from t3d.config import Recipe
from t3d.distill.logprobs import CHUNK
from t3d.distill.lora import add_adapter
from t3d.engine.kv_cache import cache_shape
from t3d.errors import T3DError, nearest
from t3d.models import FAMILIES
from t3d.models.files import first_line
from t3d.models.quantize import PER_WEIGHT
from t3d.pipeline.inputs import Inputs

SHARDINGS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
PROMPTS_READ = 512  # training prompts whose lengths are looked at
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Part:
    """`bytes` of GPU memory in one phase of a run, and how they come about."""

    phase: str  # "train" or "decode"
    name: str
    bytes: float
    how: str


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, and the shape of what flows through the model."""

    parameters: int
    trainable: int
    matrices: int  # of linear layers, which are multiplied in the dtype of the computation
    layer: int  # of the largest decoder layer
    embedding: int
    config: PretrainedConfig


def sizes(inputs: Inputs, arguments) -> Sizes:
    """Counted on the model of the recipe, built without memory."""
    model = meta_model(inputs)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    embedding = model.get_input_embeddings().weight.numel()
    total = sum(p.numel() for p in model.parameters())
    trainable = total
    if arguments.lora_rank:
        with torch.device("meta"):
            trainable = sum(p.numel() for p in add_adapter(model, arguments).parameters() if p.requires_grad)
    return Sizes(total, trainable, matrices, max(layers), embedding, model.config)


def meta_model(inputs: Inputs) -> nn.Module:
    """The model of the recipe, without its weights."""
    config = inputs.config
    try:
        with torch.device("meta"):
            return FAMILIES[config.model_type](config)
    except Exception as error:  # transformers checks some values only when layers are made of them
        wanted = inputs.recipe.model
        where = "model.architecture" if wanted.architecture is not None else f"{wanted.path}/config.json"
        raise T3DError(f"{where}: cannot make a model from it: {first_line(error)}") from error


def activation_bytes(config, tokens: int, autocast: bool) -> float:
    """What one decoder layer keeps for its backward pass, in bytes, without its attention mask and weights."""
    h, i = config.hidden_size, _intermediate(config)
    _, kv_heads, dim = cache_shape(config)
    q, kv, heads = config.num_attention_heads * dim, kv_heads * dim, config.num_attention_heads
    norms = 2 + 2 * heads + kv_heads  # reciprocal root mean squares, and the attention's denominators
    if not autocast:
        return 4 * tokens * (6 * h + 6 * q + 2 * kv + 4 * i + norms)
    return tokens * (4 * (4 * h + q + kv + norms) + 2 * (5 * h + 5 * q + kv + 4 * i))


def plan(recipe: Recipe, gpus: int = 1, sharding: str = "ddp") -> list[Part]:
    """The parts of a GPU's memory when `gpus` of them train with `sharding`.

    Raises:
        T3DError: an unknown sharding, a model that cannot be read, or settings that do not go together.
    """
    if sharding not in SHARDINGS:
        raise T3DError(f"unknown sharding {sharding!r}{nearest(sharding, SHARDINGS)}; known: {', '.join(SHARDINGS)}")
    if gpus < 1:
        raise T3DError(f"--gpus must be at least 1, got {gpus}")
    here = replace(recipe, model=replace(recipe.model, device="cpu"))  # a plan is made where there is no GPU, too
    arguments = here.training_arguments(recipe.run_dir)
    inputs = Inputs(recipe)
    found = sizes(inputs, arguments)
    half = arguments.bf16 or arguments.fp16
    prompt, dtype = longest_prompt(inputs), recipe.model.dtype or inputs.saved_dtype
    return [
        *_weights(found, arguments, gpus, sharding, half, dtype),
        *_activations(found, recipe, arguments, prompt, half),
        *_decoding(found, recipe, prompt, dtype),
    ]


def _weights(found: Sizes, arguments, gpus: int, sharding: str, half: bool, dtype: str):
    zero = int(sharding[4]) if sharding.startswith("zero") else 0
    in_shards = sharding in ("fsdp2", "zero3")
    parts = gpus if in_shards else 1
    total, trainable = found.parameters, found.trainable
    adapter = bool(arguments.lora_rank)
    size = 2 if zero and half else 4  # DeepSpeed holds 16-bit weights, and float32 ones beside the optimizer
    share = f" / {parts} GPUs" if parts > 1 else ""
    if adapter:
        base = 0.5 if arguments.lora_4bit else BYTES.get(dtype, 4) if half else 4
        yield Part("train", "weights", total * base / parts, f"{total:,} frozen x {base} bytes{share}")
        yield Part("train", "adapter", trainable * size / parts, f"{trainable:,} x {size} bytes{share}")
    else:
        yield Part("train", "weights", total * size / parts, f"{total:,} x {size} bytes{share}")
    if half and not zero and not in_shards and not adapter:
        yield Part(
            "train", "16-bit weights", 2 * found.matrices, f"{found.matrices:,} x 2 bytes, kept for the backward"
        )
    if in_shards and parts > 1:
        width = 2 if half else 4
        gathered = 2 * found.layer + found.embedding * (1 if found.config.tie_word_embeddings else 2)
        how = f"two layers, embedding and head: {gathered:,} x {width} bytes"
        yield Part("train", "gathered weights", gathered * width, how)
    parts = gpus if in_shards or zero == 2 else 1
    share = f" / {parts} GPUs" if parts > 1 else ""
    yield Part("train", "gradients", trainable * size / parts, f"{trainable:,} x {size} bytes{share}")
    if sharding == "ddp" and gpus > 1:
        yield Part("train", "gradients in flight", trainable * size, f"DDP's buckets: {trainable:,} x {size} bytes")
    parts = gpus if in_shards or zero else 1
    share = f" / {parts} GPUs" if parts > 1 else ""
    if zero:
        yield Part("train", "float32 weights", 4 * trainable / parts, f"{trainable:,} x 4 bytes{share}")
    each, why = _optimizer(arguments)
    yield Part("train", "optimizer", trainable * each / parts, f"{trainable:,} x {each} bytes{share} ({why})")
    yield from _reference(found, arguments, gpus if in_shards else 1, size)
    if arguments.method.needs_critic:
        how = f"{found.parameters:,} x (2 x {size} + 8) bytes: weights, gradients, two moments"
        yield Part("train", "critic", found.parameters * (2 * size + 8), how)


def _optimizer(arguments) -> tuple[float, str]:
    name = str(getattr(arguments.optim, "value", arguments.optim))
    if arguments.use_muon:
        return 8, "Muon: at most; matrices need 4"
    if "8bit" in name:
        return 2, f"{name}: two moments of 8 bits"
    if "sgd" in name or "adafactor" in name:
        return 0, f"{name}: little or none"
    if "lion" in name:
        return 4, f"{name}: one float32 moment"
    return 8, f"{name}: two float32 moments"


def _reference(found: Sizes, arguments, parts: int, size: int):
    share = f" / {parts} GPUs" if parts > 1 else ""
    if not arguments.method.needs_reference:
        yield Part("train", "reference", 0, f"{arguments.objective} has none")
    elif arguments.lora_rank:
        own = found.trainable if arguments.method.round_interval else 0
        how = f"a second adapter: {own:,} x 4 bytes{share}" if own else "the model without its adapter"
        yield Part("train", "reference", own * 4 / parts, how)
    elif arguments.reference_offload:
        yield Part("train", "reference", found.layer * size, f"on the CPU; one layer: {found.layer:,} x {size} bytes")
    else:
        yield Part("train", "reference", found.parameters * size / parts, f"{found.parameters:,} x {size} bytes{share}")


def _activations(found: Sizes, recipe: Recipe, arguments, prompt: int, half: bool):
    rows, tokens, noisy, how = _tokens(recipe, arguments, prompt)
    layers, h = found.config.num_hidden_layers, found.config.hidden_size
    one = activation_bytes(found.config, tokens, half)
    if arguments.gradient_checkpointing or getattr(arguments, "activation_checkpointing", False):
        kept = layers * tokens * h * 4
        yield Part("train", "activations", kept + one, f"{layers} layers' inputs and one layer of {how}")
    else:
        yield Part("train", "activations", layers * one, f"{layers} layers of {how}; gradient_checkpointing saves most")
    length = tokens // rows
    width = 2 if half else 4
    if arguments.attention in ("sdpa", "eager"):
        how = f"{rows} x {length:,}^2 x {1 + width} bytes; flex_attention needs none"
        yield Part("train", "attention mask", rows * length**2 * (1 + width), how)
    chunk, vocabulary = min(CHUNK, rows * noisy), found.config.vocab_size
    yield Part(
        "train", "logits", 3 * chunk * vocabulary * 4,
        f"logits, their softmax and gradient of {chunk:,} positions x {vocabulary:,} x 4 bytes",
    )  # fmt: skip


def _tokens(recipe: Recipe, arguments, prompt: int) -> tuple[int, int, int, str]:
    """Rows of a micro-batch, its tokens, noisy tokens of a row, and words for it: at most."""
    response = recipe.rollout.max_tokens
    if arguments.max_length:
        response = max(1, min(response, arguments.max_length - prompt))
    states = arguments.states_per_sequence
    one = prompt + (1 + states) * response
    batch = arguments.per_device_train_batch_size
    if arguments.pack_length and arguments.pack_length >= one:
        rows = -(-batch * one // arguments.pack_length)
        return rows, rows * arguments.pack_length, states * response, f"{rows} rows of {arguments.pack_length:,} tokens"
    how = f"{batch} x ({prompt:,} prompt + {1 + states} x {response:,} response tokens)"
    return batch, batch * one, states * response, how


def _decoding(found: Sizes, recipe: Recipe, prompt: int, dtype: str):
    size = BYTES.get(dtype, 4)
    if kind := recipe.model.quantize:
        others = found.parameters - found.matrices + (found.embedding if found.config.tie_word_embeddings else 0)
        each = PER_WEIGHT[kind]
        how = f"{found.matrices:,} x {each} bytes ({kind}), {others:,} x {size} bytes ({dtype})"
        yield Part("decode", "weights", found.matrices * each + others * size, how)
        size = BYTES[recipe.model.dtype or "float32"]
    else:
        yield Part("decode", "weights", found.parameters * size, f"{found.parameters:,} x {size} bytes ({dtype})")
    layers, heads, dim = cache_shape(found.config)
    each = 2 * layers * heads * dim * size
    longest = prompt + max(recipe.rollout.max_tokens, recipe.eval.max_tokens)
    tokens = recipe.engine.kv_cache_tokens or recipe.engine.max_batch_size * longest
    how = f"{tokens:,} tokens x {each:,} bytes"
    if recipe.engine.kv_cache_tokens is None:
        how += f" ({recipe.engine.max_batch_size} sequences of {longest:,}; where less is free, less is taken)"
    yield Part("decode", "KV cache", tokens * each, how)


def longest_prompt(inputs: Inputs) -> int:
    """Tokens of the longest of the first training prompts."""
    problems = inputs.task.problems("train", inputs.recipe.task.num_train)[:PROMPTS_READ]
    return max(len(inputs.task.prompt(problem, inputs.tokenizer)) for problem in problems)


def _intermediate(config) -> int:
    """Width of what a token passes through in the MLP: of a mixture's experts those that it is sent to."""
    experts = getattr(config, "num_experts_per_tok", None)
    shared = getattr(config, "n_shared_experts", 0)
    return config.intermediate_size if experts is None else (experts + shared) * config.moe_intermediate_size


def table(parts: list[Part], gpus: int, sharding: str) -> Table:
    """The parts by phase, and what a GPU must have at least."""
    made = Table(
        title=f"Memory per GPU: {gpus} x {sharding}" if gpus > 1 else "Memory on one GPU", title_justify="left"
    )
    for name in ("phase", "part", "GB", "how"):
        made.add_column(name, justify="right" if name == "GB" else "left", overflow="fold")
    totals = {}
    for phase in dict.fromkeys(part.phase for part in parts):
        for part in (part for part in parts if part.phase == phase):
            made.add_row(part.phase, part.name, f"{part.bytes / 1e9:,.3f}", part.how)
        totals[phase] = sum(part.bytes for part in parts if part.phase == phase)
        made.add_row(phase, "total", f"{totals[phase] / 1e9:,.3f}", "", style="bold", end_section=True)
    note = "the larger of the phases; the CUDA context, workspaces and fragments need some 1 to 3 GB more"
    made.add_row("", "needed", f"{max(totals.values()) / 1e9:,.3f}", note, style="bold")
    return made
