"""Where a student that writes each block in one step goes wrong: which places, which tokens, how far from its teacher.

    python benchmarks/one_step.py STUDENT TEACHER [--problems N] [--seed N] [--json FILE]

The student answers word problems of the dev split greedily, one step per block. Before each block the teacher gets the
same context and writes the block one token a step. What a student's block loses is how much less probable it is than
the teacher's, by the teacher's own chain from left to right. A block that loses over two nats is mistaken; a smaller
loss is a matter of wording.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from t3d.blocks import block_causal_mask, block_end, block_start
from t3d.decoding import DecodingConfig
from t3d.embedded import checkpoint
from t3d.engine import Engine
from t3d.errors import T3DError
from t3d.models import load_model
from t3d.models.load import stop_ids
from t3d.tasks import TaskConfig, get_task

BATCH = 64
MISTAKE = 2.0  # nats


@torch.inference_mode()
def chain(model, contexts: list[list[int]], blocks: list[list[int]]) -> list[float]:
    """Nats of each block after its context, token by token from left to right, the rest of the block masked."""
    mask, size = model.config.mask_token_id, model.config.block_size
    found = [0.0] * len(blocks)
    order = sorted(range(len(blocks)), key=lambda i: len(contexts[i]))
    for first in range(0, len(order), BATCH):
        some = order[first : first + BATCH]
        length = max(block_end(len(contexts[i]), size) for i in some)
        attention = block_causal_mask(length, size)[None, None]
        for place in range(max(len(blocks[i]) for i in some)):
            live = [i for i in some if place < len(blocks[i])]
            ids = torch.full((len(live), length), mask)
            for row, i in zip(ids, live, strict=True):
                row[: len(contexts[i]) + place] = torch.tensor(contexts[i] + blocks[i][:place])
            select = torch.tensor([row * length + len(contexts[i]) + place for row, i in enumerate(live)])
            logits = model(input_ids=ids, attention_mask=attention.expand(len(live), -1, -1, -1), select=select)
            logits[:, mask] = -torch.inf
            for i, row in zip(live, logits.log_softmax(-1), strict=True):
                found[i] += row[blocks[i][place]].item()
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=checkpoint)
    parser.add_argument("teacher", type=checkpoint, help="or 'embedded'")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)

    try:
        student, tokenizer = load_model(args.student)
        teacher, _ = load_model(args.teacher)
    except T3DError as error:
        parser.error(str(error))
    size = student.config.block_size
    task = get_task(TaskConfig(name="word_problems", data_seed=args.seed))
    problems = task.problems("dev", args.problems)
    prompts = [task.prompt(problem, tokenizer) for problem in problems]
    answers = Engine(student, tokenizer).generate(prompts, DecodingConfig(steps=1, max_tokens=128))

    contexts, own = [], []
    for answer in answers:
        whole, begin = [*answer.prompt_ids, *answer.response_ids], len(answer.prompt_ids)
        for start in range(block_start(begin, size), len(whole), size):
            contexts.append(whole[: max(start, begin)])
            own.append(whole[max(start, begin) : start + size])
    engine = Engine(teacher, tokenizer)
    rests = [block_end(len(context), size) - len(context) for context in contexts]
    better = [[] for _ in contexts]
    for rest in set(rests):
        mine = [i for i, r in enumerate(rests) if r == rest]
        written = engine.generate([contexts[i] for i in mine], DecodingConfig(max_tokens=rest))
        for i, trajectory in zip(mine, written, strict=True):
            better[i] = list(trajectory.response_ids)

    differ = [i for i, (mine, theirs) in enumerate(zip(own, better, strict=True)) if mine != theirs]
    where = [contexts[i] for i in differ]
    gaps = np.zeros(len(own))
    gaps[differ] = np.subtract(
        chain(teacher, where, [better[i] for i in differ]), chain(teacher, where, [own[i] for i in differ])
    )
    places, kinds = defaultdict(list), defaultdict(list)
    for context, mine, theirs, gap in zip(contexts, own, better, gaps, strict=True):
        for offset, token in enumerate(theirs):
            wrong = bool(gap > MISTAKE) and (offset >= len(mine) or mine[offset] != token)
            text = tokenizer.decode([token]).strip()
            kind = "stop" if token in stop_ids(teacher) else "number" if text.isdigit() else "other"
            places[len(context) % size + offset].append(wrong)
            kinds[kind].append(wrong)
    right = task.judge_all([tokenizer.decode(a.response_ids, skip_special_tokens=True) for a in answers], problems)
    result = {
        "block_size": size,
        "problems": len(problems),
        "accuracy": statistics.mean(bool(v.correct) for v in right),
        "blocks": len(own),
        "blocks_equal": 1 - len(differ) / len(own),
        "blocks_mistaken": float((gaps > MISTAKE).mean()),
        "nats_per_block": float(gaps.mean()),
        "places": {place: statistics.mean(v) for place, v in sorted(places.items())},
        "tokens": {kind: (statistics.mean(v), len(v)) for kind, v in kinds.items()},
    }
    print(
        f"{result['accuracy']:.1%} of {len(problems)} problems right\n"
        f"of {len(own)} blocks {result['blocks_equal']:.1%} as the teacher writes them, "
        f"{result['blocks_mistaken']:.1%} mistaken; {result['nats_per_block']:.2f} nats lost per block\n"
        f"wrong tokens of mistaken blocks, by place: {' '.join(f'{v:.2%}' for v in result['places'].values())}\n"
        f"by token: {', '.join(f'{kind} {share:.2%} of {n}' for kind, (share, n) in result['tokens'].items())}"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
