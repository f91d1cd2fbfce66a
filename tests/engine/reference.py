"""A plain sampler, written for clarity: one sequence, everything recomputed from scratch at every step."""

import torch

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
    """One token and its confidence from the logits of one position, by the definitions."""
    p = logits.softmax(-1)
    if config.temperature == 0:
        token = int(logits.argmax())
        return token, float(p[token])
    q = (logits / config.temperature).softmax(-1)
    ranked = q.argsort(descending=True, stable=True)
    if config.top_k or config.top_p < 1:
        kept = ranked[: config.top_k or None]
        q_kept = q[kept] / q[kept].sum()
        before = q_kept.cumsum(0) - q_kept
        kept = kept[before < config.top_p]
    else:
        kept = torch.arange(len(q))
    weights = q[kept] / q[kept].sum()
    index = int((weights.cumsum(0) <= u * weights.sum()).sum())
    token = int(kept[min(index, len(kept) - 1)])
    return token, float(weights[index] if config.confidence == "sampling" else p[token])


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
            drawn = {}
            for p in masked:
                u = float(uniform(torch.tensor([seed]), torch.tensor([p]), torch.tensor([step])))
                drawn[p] = reference_draw(logits[p], config, u)
            quota = block_size // steps + (1 if step < block_size % steps else 0)
            best = sorted(masked, key=lambda p: -drawn[p][1])
            if config.strategy == "low_confidence_static":
                chosen = best[:quota]
            else:
                floor = quota if config.floor == "schedule" else 1
                above = [p for p in masked if drawn[p][1] > config.threshold]
                chosen = set(above) | set(best[: max(floor, 1)])
            for p in chosen:
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
