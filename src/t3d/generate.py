"""Answering one prompt from the command line."""

import sys
import time

from rich.console import Console

from t3d.decoding import DecodingConfig
from t3d.embedded import checkpoint
from t3d.engine import Engine
from t3d.errors import T3DError, characters
from t3d.models import load_model
from t3d.models.load import require_tokenizer
from t3d.models.recommended import recommended
from t3d.report.terminal import show
from t3d.tasks import Problem, TaskConfig, get_task


def generate(
    name: str,
    text: str,
    settings: dict,
    dtype: str | None,
    device: str | None,
    quantize: str | None,
    raw: bool,
    color: bool,
) -> None:
    """Print the answer to `text`, and to stderr what it took. `raw`: without chat template.

    settings: fields of `DecodingConfig`; the others are what the checkpoint recommends.
    """
    if not text.strip():
        raise T3DError("the prompt is empty")
    DecodingConfig(**settings)  # says what is wrong with them before anything is loaded
    characters(text, "the prompt")
    model, tokenizer = load_model(checkpoint(name), dtype, device, quantize=quantize)
    decoding = DecodingConfig(**recommended(model) | settings)
    require_tokenizer(tokenizer, name)
    if raw:
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        task = get_task(TaskConfig(name="prompts", template="{question}"))
        prompt, decoding = task.prompt(Problem("", text), tokenizer), task.guided(decoding, tokenizer)
    start = time.perf_counter()
    (answer,) = Engine(model, tokenizer).generate([prompt], decoding)
    seconds = time.perf_counter() - start
    if color:
        show(answer, tokenizer, Console(force_terminal=True))
    else:
        print(answer.text)
    nfe, cut = answer.nfe, ", cut at max_tokens" if answer.finish_reason == "length" else ""
    print(
        f"{answer.length} tokens in {nfe.predicting} forwards: {answer.length / nfe.predicting:.2f} tokens per forward "
        f"({answer.length / nfe.total:.2f} with prefill and commit), {seconds:.2f} s, "
        f"{answer.length / seconds:.0f} tokens/s{cut}",
        file=sys.stderr,
    )
