"""Answering one prompt from the command line."""

import sys
import time

from rich.console import Console
from rich.text import Text

from t3d.decoding import DecodingConfig
from t3d.embedded import checkpoint
from t3d.engine import Engine
from t3d.errors import T3DError
from t3d.models import load_model
from t3d.tasks import Problem, TaskConfig, get_task
from t3d.trajectories import Trajectory
from t3d.trajectories.pieces import Pieces

# From the first step of a block to its last; dark and light terminals show them all.
COLORS = ("bright_blue", "cyan", "green", "yellow", "dark_orange", "red", "magenta")


def generate(
    name: str, text: str, decoding: DecodingConfig, dtype: str | None, device: str | None, raw: bool, color: bool
) -> None:
    """Print the answer to `text`, and to stderr what it took. `raw`: without chat template."""
    if not text.strip():
        raise T3DError("the prompt is empty")
    model, tokenizer = load_model(checkpoint(name), dtype=dtype, device=device)
    if tokenizer is None:
        raise T3DError(f"{name} has no tokenizer; put the model's tokenizer files into the folder")
    if raw:
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        prompt = get_task(TaskConfig(name="prompts", template="{question}")).prompt(Problem("", text), tokenizer)
    start = time.perf_counter()
    (answer,) = Engine(model, tokenizer).generate([prompt], decoding)
    seconds = time.perf_counter() - start
    if color:
        Console(force_terminal=True, soft_wrap=True, highlight=False).print(colored(answer, tokenizer))
    else:
        print(answer.text)
    nfe, cut = answer.nfe, ", cut at max_tokens" if answer.finish_reason == "length" else ""
    print(
        f"{answer.length} tokens in {nfe.denoise} forwards: {answer.length / nfe.denoise:.2f} tokens per forward "
        f"({answer.length / nfe.total:.2f} with prefill and commit), {seconds:.2f} s, "
        f"{answer.length / seconds:.0f} tokens/s{cut}",
        file=sys.stderr,
    )


def colored(answer: Trajectory, tokenizer) -> Text:
    """The response, each token in the colour of the step that committed it, and a legend."""
    hidden, text = set(tokenizer.all_special_ids), Text()
    ids = answer.response_ids[: answer.length]
    for token, piece, step in zip(ids, Pieces(tokenizer)(ids), answer.step_map, strict=False):
        if token not in hidden:
            text.append(piece, style=COLORS[step % len(COLORS)])
    text.append("\nstep:", style="dim")
    for step in range(max(answer.step_map) + 1):
        text.append(f" {step + 1}", style=COLORS[step % len(COLORS)])
    return text
