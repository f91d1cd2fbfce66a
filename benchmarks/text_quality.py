"""How good and how fast answers are at each number of steps, beside the autoregressive model that they come from.

    python benchmarks/text_quality.py CHECKPOINT... --original MODEL [--task gsm8k --path test.jsonl] [--problems N]
        [--max-tokens N] [--batch N] [--judge MODEL] [--device cuda] [--dtype bfloat16] [--json FILE]

MODEL is a causal model of transformers: a folder, a hub id, a GGUF file, or a name such as smollm2. It answers the
same test problems by transformers' own greedy `generate`. Perplexities are of answers behind their prompts, under the
judge, by default the original; BLEU and ROUGE-L are against the task's own solutions, whose row is the last. A loop has
a low perplexity: read it beside distinct-2. Needs t3d[text].
"""

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import torch

from t3d.decoding import DecodingConfig
from t3d.embedded import checkpoint
from t3d.engine import Engine
from t3d.errors import T3DError
from t3d.evaluation.runner import hardware
from t3d.evaluation.scoring import Scorer, load_scorer
from t3d.evaluation.text import bleu, check_libraries, distinct, rouge_l
from t3d.models import load_model
from t3d.models.gguf import PACKAGES, as_folder, packaged
from t3d.models.load import torch_dtype
from t3d.tasks import TaskConfig, get_task

COLUMNS = {
    "accuracy": ".1%",
    "perplexity": ".2f",
    "bleu": ".1f",
    "rouge_l": ".1f",
    "distinct_1": ".3f",
    "distinct_2": ".3f",
    "tokens": ".1f",  # per answer
    "tokens_per_second": ".1f",
    "tokens_per_cpu_second": ".1f",  # of all threads: a busy machine does not change it much
}


def load_causal(name: str, device: str) -> Scorer:
    name = packaged(name) if name in PACKAGES else name
    if not str(name).endswith(".gguf"):
        return load_scorer(str(checkpoint(name)), device)
    with TemporaryDirectory() as beside, as_folder(Path(name), Path(beside), ("llama", "qwen2", "qwen3")) as folder:
        return load_scorer(str(folder), device)


@torch.inference_mode()
def generate(scorer: Scorer, prompts: list[list[int]], most: int, batch: int) -> list[list[int]]:
    """Greedy answers by transformers, up to the stop token."""
    model, found = scorer.model, []
    stops = model.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops])
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in some], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some], device=model.device)
        written = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=most, pad_token_id=min(stops)
        )
        for row in written[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            found.append(row[:end])
    return found


def decode(engine: Engine, config: DecodingConfig, prompts: list[list[int]]) -> list[list[int]]:
    """The same by the engine."""
    return [answer.response_ids[: answer.length] for answer in engine.generate(prompts, config)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="block-diffusion; or 'embedded'")
    parser.add_argument("--original", required=True)
    parser.add_argument("--judge", help="any that --original may be, or a block-diffusion checkpoint")
    parser.add_argument("--task", default="word_problems")
    parser.add_argument("--path", help="file of the task's test problems; default: the hub, where it has some there")
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of the models that answer: bfloat16, float32; default: each one's own")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    try:
        check_libraries()
        result = measure(args)
    except T3DError as error:
        parser.error(str(error))
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(args: argparse.Namespace) -> dict:
    dtype = torch_dtype(args.dtype)
    task = get_task(TaskConfig(name=args.task, path=args.path))
    problems = task.problems("test", args.problems)
    solutions = [task.solution(problem, Random(problem.id)) for problem in problems]
    original = load_causal(args.original, args.device)
    if original.diffusion:
        raise T3DError(f"{args.original} is a block-diffusion model; --original needs the autoregressive one")
    shared = args.judge is None and dtype is None  # a judge keeps its own dtype
    judge = original if shared else load_causal(args.judge or args.original, args.device)
    original.model.to(dtype or original.model.dtype)
    rows = {}

    def add(name: str, tokenizer, answer) -> None:
        prompts = [task.prompt(problem, tokenizer) for problem in problems]
        begun, used = time.perf_counter(), time.process_time()
        answers = answer(prompts)
        wall, cpu = time.perf_counter() - begun, time.process_time() - used
        tokens = sum(map(len, answers))
        print(f"{name}: {tokens:,} tokens in {wall:.0f} s", file=sys.stderr)  # rows take minutes
        rows[name] = quality(tokenizer.batch_decode(answers, skip_special_tokens=True)) | {
            "tokens": tokens / len(answers),
            "tokens_per_second": tokens / wall,
            "tokens_per_cpu_second": tokens / cpu,
        }

    def quality(texts: list[str]) -> dict:
        verdicts = [verdict.correct for verdict in task.judge_all(texts, problems)]
        nats = []
        for problem, text in zip(problems, texts, strict=True):
            ids = judge.tokenizer(text, add_special_tokens=False)["input_ids"]
            nats += judge.log_likelihood(task.prompt(problem, judge.tokenizer), ids)
        return {
            "accuracy": None if None in verdicts else sum(verdicts) / len(verdicts),
            "perplexity": math.exp(-sum(nats) / len(nats)) if nats else None,
            "bleu": bleu(texts, solutions),
            "rouge_l": rouge_l(texts, solutions),
            "distinct_1": distinct(texts, 1),
            "distinct_2": distinct(texts, 2),
        }

    by_transformers = partial(generate, original, most=args.max_tokens, batch=args.batch)
    add(f"{args.original}, autoregressive", original.tokenizer, by_transformers)
    for name in args.checkpoints:
        model, tokenizer = load_model(checkpoint(name), dtype, args.device)
        engine = Engine(model, tokenizer, max_batch_size=args.batch)
        size = model.config.window or args.max_tokens
        settings = {f"{size >> i} steps": {"steps": size >> i} for i in range(size.bit_length())}
        settings["threshold .9"] = {"strategy": "low_confidence_dynamic", "threshold": 0.9}
        for how, chosen in settings.items():
            config = DecodingConfig(**chosen, max_tokens=args.max_tokens)
            add(f"{name}, {how}", tokenizer, partial(decode, engine, config))
    rows["the task's solutions"] = quality(solutions)
    return {
        "task": args.task,
        "problems": len(problems),
        "judge": args.judge or args.original,
        "batch": args.batch,
        "on": f"{hardware(original.model)}, {str(original.model.dtype).removeprefix('torch.')}",
        "rows": rows,
    }


def table(result: dict) -> str:
    def cell(row: dict, column: str) -> str:
        return "" if row.get(column) is None else format(row[column], COLUMNS[column])

    lines = [
        f"{result['problems']} problems of {result['task']}, {result['batch']} at once, on {result['on']}; "
        f"judge: {result['judge']}\n",
        "| | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name, row in result["rows"].items():
        lines.append(f"| {name} | " + " | ".join(cell(row, column) for column in COLUMNS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
