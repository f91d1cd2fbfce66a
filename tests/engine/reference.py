"""A plain sampler, written for clarity: one sequence, everything recomputed from scratch at every step."""

import math

import torch
from hypothesis import reject

from t3d.blocks import block_causal_mask
from t3d.decoding.sampling import uniform


def reference_logits(model, ids, block_size):
    """Logits float32 (length, vocab) of a row of whole blocks, by the model's own forward; never the mask token."""
    mask = block_causal_mask(len(ids), block_size)[None, None]
    logits = model(torch.tensor([ids]), attention_mask=mask, position_ids=torch.arange(len(ids))[None]).logits[0]
    logits = logits.float()
    logits[:, model.config.mask_token_id] = -torch.inf
    return logits


def reference_draw(logits, config, u):
    """(token, confidence, entropy, margin) from the logits of one position, by the definitions.

    Two tokens that rounding alone tells apart are no test of an engine that adds up in another order.
    """
    p = logits.softmax(-1)
    entropy = -float(sum(x * math.log(x) for x in p.tolist() if x > 0))
    highest, next_ = sorted(p.tolist())[:-3:-1]
    margin = highest - next_
    if config.temperature == 0:
        first, second = logits.topk(2).values.tolist()
        if first - second < 1e-4:
            reject()
        token = int(logits.argmax())
        return token, float(p[token]), entropy, margin
    q = (logits / config.temperature).softmax(-1)
    if config.top_k or config.top_p < 1:
        kept = q.argsort(descending=True, stable=True)[: config.top_k or None]
        q_kept = q[kept] / q[kept].sum()
        kept = kept[q_kept.cumsum(0) - q_kept < config.top_p]
    else:
        kept = torch.arange(len(q))
    weights = q[kept] / q[kept].sum()
    index = min(int((weights.cumsum(0) <= u * weights.sum()).sum()), len(kept) - 1)
    token = int(kept[index])
    return token, float(weights[index] if config.confidence == "sampling" else p[token]), entropy, margin


def reference_choice(drawn, config, quota, random_numbers):
    """Positions to commit. drawn: {position: (token, confidence, entropy, margin)} of masks, from left to right."""
    masked = list(drawn)
    best = sorted(masked, key=lambda p: -drawn[p][1])
    surest = sorted(masked, key=lambda p: drawn[p][2])
    name = config.strategy
    if name == "low_confidence_static":
        return best[:quota]
    if name == "entropy":
        return surest[:quota]
    if name == "margin":
        return sorted(masked, key=lambda p: -drawn[p][3])[:quota]
    if name == "low_confidence_dynamic":
        floor = quota if config.floor == "schedule" else 1
        return [p for p in masked if drawn[p][1] > config.threshold or p in best[:floor]]
    if name == "sequential":
        return masked[:quota]
    if name == "random":
        return sorted(masked, key=lambda p: -random_numbers[p])[:quota]
    if name == "adaptive":
        doubt = sum(1 - drawn[p][1] for p in masked)
        steps = min(max(math.ceil(doubt / config.risk), 1), len(masked))
        return best[: math.ceil(len(masked) / steps)]
    count = 1
    for n in range(1, len(masked) + 1):
        entropies = [drawn[p][2] for p in surest[:n]]
        if (
            (name == "factor" and (n + 1) * (1 - drawn[best[n - 1]][1]) < config.factor)
            or (name == "entropy_bounded_sdar" and sum(entropies) < config.entropy_bound)
            or (name == "entropy_bounded_eb" and sum(entropies) - max(entropies) <= config.entropy_bound)
        ):
            count = n
    if count == 1 and name == "entropy_bounded_sdar" and drawn[surest[0]][2] >= config.entropy_bound:
        return best[:1]  # nothing is sure enough: the most confident
    return (best if name == "factor" else surest)[:count]


@torch.no_grad()
def reference_decode(model, prompt, config, seed, stop_ids=()):
    """Returns (response_ids, step_map, confidence, length, finish_reason, denoising forwards)."""
    mask_id, block_size = model.config.mask_token_id, config.block_size or model.config.block_size
    steps = config.steps or block_size
    ids, step_map, confidence, forwards = list(prompt), [], [], 0
    while True:
        first, base = len(ids), len(ids) // block_size * block_size
        ids += [mask_id] * (base + block_size - len(ids))
        committed = {}
        for step in range(block_size):
            masked = [p for p in range(first, len(ids)) if ids[p] == mask_id]
            if not masked:
                break
            logits = reference_logits(model, ids, block_size)
            forwards += 1

            def number(p, step=step, stream=0):
                return float(uniform(*(torch.tensor([x]) for x in (seed, p, step)), stream=stream))

            drawn = {p: reference_draw(logits[p], config, number(p)) for p in masked}
            quota = block_size // steps + (1 if step < block_size % steps else 0)
            for p in reference_choice(drawn, config, quota, {p: number(p, stream=1) for p in masked}):
                ids[p] = drawn[p][0]
                committed[p] = (step, drawn[p][1])
        step_map += [committed[p][0] for p in range(first, len(ids))]
        confidence += [committed[p][1] for p in range(first, len(ids))]
        response = ids[len(prompt) :]
        for place in range(first - len(prompt), min(len(response), config.max_tokens)):
            if response[place] in stop_ids:
                return response, step_map, confidence, place + 1, "stop", forwards
        if len(response) >= config.max_tokens:
            return response, step_map, confidence, config.max_tokens, "length", forwards


@torch.no_grad()
def reference_multi_block(model, prompt, config, seed, stop_ids=()):
    """As `reference_decode`, with several blocks in flight; blocks after the first may advance by nothing only under
    `low_confidence_dynamic` with the floor "one". Returns the revisions too."""
    mask_id, size = model.config.mask_token_id, config.block_size
    steps, width = config.steps or size, config.window or size
    ids, base, forwards = list(prompt), len(prompt) // size * size, 0
    end = -(-(len(prompt) + config.max_tokens) // size) * size
    committed, counts, revised = {}, {}, {}
    starts, provisional = [base], []

    def progress(start):
        return 1 - ids[start : start + size].count(mask_id) / size

    while True:
        while len(ids) < starts[-1] + size:
            ids.append(mask_id)
        logits = reference_logits(model, ids, size)
        forwards += 1
        if provisional:  # what was decided behind another block, seen again as masks where all before it is final
            again = ids[: starts[0] + size]
            for p in provisional:
                again[p] = mask_id
            checked = reference_logits(model, again, size)
            wrong = [p for p in provisional if float(checked[p].softmax(-1)[ids[p]]) < config.recheck]
            for p in wrong:
                ids[p], revised[p] = mask_id, revised.get(p, 0) + 1
            if wrong:
                logits[starts[0] : starts[0] + size] = checked[starts[0] :]
            provisional = []
        before = {start: progress(start) for start in starts}
        for depth, start in enumerate(starts):
            masked = [p for p in range(start, start + size) if ids[p] == mask_id]
            if not masked:
                continue
            first = start + (masked[0] - start) // width * width
            masked = [p for p in masked if p < first + width]
            step = counts.get(start, 0)

            def number(p, step=step, stream=0):
                return float(uniform(*(torch.tensor([x]) for x in (seed, p, step)), stream=stream))

            drawn = {p: reference_draw(logits[p], config, number(p)) for p in masked}
            quota = min(size // steps + (1 if step < size % steps else 0), len(masked))
            chosen = reference_choice(drawn, config, quota, {p: number(p, stream=1) for p in masked})
            if depth and before[starts[depth - 1]] < config.force:
                chosen = [p for p in chosen if drawn[p][1] > config.threshold]
            for p in chosen:
                ids[p] = drawn[p][0]
                committed[p] = (step, drawn[p][1])
            counts[start] = step + bool(chosen)
        while starts and progress(starts[0]) == 1 and not provisional:
            base = starts.pop(0) + size
            response = ids[len(prompt) : base]
            stops = [n for n, token in enumerate(response[: config.max_tokens]) if token in stop_ids]
            if stops or len(response) >= config.max_tokens:
                told = [committed[p] for p in range(len(prompt), base)]
                reason, length = ("stop", stops[0] + 1) if stops else ("length", config.max_tokens)
                revisions = [revised.get(p, 0) for p in range(len(prompt), base)]
                return response, [t[0] for t in told], [t[1] for t in told], length, reason, forwards, revisions
            if config.recheck and starts:
                provisional = [p for p in range(starts[0], starts[0] + size) if ids[p] != mask_id]
        while len(starts) < config.blocks_in_flight:
            if starts:
                flying = ids[max(starts[0], len(prompt)) : starts[-1] + size]
                if starts[-1] + size >= end or progress(starts[-1]) < config.enter or set(flying) & set(stop_ids):
                    break
            starts.append(starts[-1] + size if starts else base)
            ids += [mask_id] * (starts[-1] + size - len(ids))
