"""The published rules against their definitions in loops, on random numbers and end to end, with no cache."""

import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t3d.decoding import DecodingConfig
from t3d.decoding.laws import lawful
from t3d.decoding.policy import FILLED, NEEDS, POLICIES, SHADOW, Decision, Knobs, Memory, Policy, View
from t3d.decoding.sampling import uniform
from t3d.engine import Engine
from tests.conftest import make_model
from tests.engine.reference import reference_draw

MASK = 99


def step_quota(size, steps, step):
    """SDAR's even schedule."""
    return size // steps + (step < size % steps)


@dataclass
class Seen:
    """What a rule looks at in one block; lists have an entry per place of the block."""

    tokens: list
    masked: list  # inside the window
    proposal: list
    confidence: list
    entropy: list
    stop: list
    expected: list
    certainty: list  # None where not filled by the model
    shadow: list  # likewise
    quota: int
    step: int
    steps: int
    must: bool
    logits: list  # of masked places, before any adjustment
    memory: dict = field(default_factory=dict)

    @property
    def masks(self):
        return [i for i, masked in enumerate(self.masked) if masked]

    def best(self, count, score=None):
        return sorted(self.masks, key=lambda i: -(score or self.confidence)[i])[:count]

    def forced(self):
        return self.best(1) if self.must else []


def f32(x):
    """A setting as the policies see it."""
    return float(torch.tensor(x, dtype=torch.float32))


# Each rule: (Seen, settings) -> places to commit, {place: new token}, places to mask again


def bacd(b, s):
    done = b.memory.setdefault("committed", [])
    follows = sum(done) / len(done) if done else max((b.confidence[i] for i in b.masks), default=0)
    threshold = min(max(follows, f32(s.threshold_low)), f32(s.threshold_high))
    commit = [i for i in b.masks if b.confidence[i] >= threshold] or b.forced()
    done += [b.confidence[i] for i in commit]
    return commit, {}, []


def klass(b, s):
    ready = []
    for i in b.masks:
        now = b.logits[i].double().softmax(-1)
        last, count = b.memory.get(i, (None, 0))
        if last is not None:
            kl = sum(p * math.log(p / q) for p, q in zip(now.tolist(), last.tolist(), strict=True) if p > 0)
            count = count + 1 if kl < s.kl_bound else 0
        b.memory[i] = now, count
        if b.confidence[i] > f32(s.threshold) and count >= s.stable_steps:
            ready.append(i)
    return ready or b.best(b.quota if b.must else 0), {}, []


def above_threshold(b, s):
    return [i for i in b.masks if b.confidence[i] > f32(s.threshold)] or b.forced(), {}, []


def credit_adjusts(logits, place, memory, s):
    """The logits of one masked place with its credits."""
    credit = memory.setdefault(place, [0.0] * len(logits))
    p = logits.softmax(-1)
    top = int(p.argmax())
    for token in range(len(credit)):
        credit[token] *= s.credit_decay
    credit[top] += float(p[top]) ** s.credit_power
    return logits + s.credit_weight * torch.tensor([math.log(c + 1) for c in credit])


def hierarchy(b, s):
    runs, commit = [], []
    for i in b.masks:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    for run in runs:
        lead = max(run, key=lambda i: b.confidence[i])  # the first of equals
        for i in run:
            if b.confidence[i] > f32(s.threshold) or (i == lead and b.confidence[i] > f32(s.run_threshold)):
                commit.append(i)
    return commit or b.forced(), {}, []


def prefix(b, s):
    commit = []
    for i in b.masks:
        if b.confidence[i] <= f32(s.threshold):
            break
        commit.append(i)
    return commit or (b.masks[:1] if b.must else []), {}, []


def entropy_threshold(b, s):
    commit = [i for i in b.masks if b.entropy[i] < f32(s.entropy_threshold)]
    return commit or (sorted(b.masks, key=lambda i: b.entropy[i])[:1] if b.must else []), {}, []


def wino(b, s):
    m = len(b.masks)
    cap = min(max(m * 7 // 10, 5), 20)
    commit = [i for i in b.best(cap) if b.confidence[i] > f32(s.accept_threshold)] or b.forced()
    before = b.memory.get("accepted", 30)
    suspects = [i for i, p in enumerate(b.shadow) if p is not None and p < f32(s.revoke_threshold)]
    most = max(min(len(commit), before) - 1, 0)
    remask = sorted(suspects, key=lambda i: b.shadow[i])[:most]
    b.memory["accepted"] = len(commit) or before
    return commit, {}, remask


def token_editing(b, s):
    commit = [i for i in b.masks if b.confidence[i] > f32(s.draft_threshold)] or b.forced()
    if not b.masks:
        b.memory["edits"] = b.memory.get("edits", 0) + 1
        if b.memory["edits"] > s.edit_steps:
            return [], {}, []
    edits = {
        i: b.expected[i]
        for i, p in enumerate(b.certainty)
        if p is not None and p > f32(s.edit_threshold) and b.expected[i] != b.tokens[i]
    }
    return commit, edits, []


def eos_rejection(b, s):
    g = 1.0
    if b.steps > 1:
        g = s.eos_floor + (1 - s.eos_floor) * min(b.step, b.steps - 1) / (b.steps - 1)
    score = [c * (g if stops else 1.0) for c, stops in zip(b.confidence, b.stop, strict=True)]
    return b.best(b.quota, score), {}, []


def ascending(b, s):
    return b.best(len(b.masks) if b.step >= b.steps - 1 else 2**b.step), {}, []


RULES = {
    "bacd": bacd,
    "klass": klass,
    "credit": above_threshold,
    "hierarchy": hierarchy,
    "prefix": prefix,
    "entropy_threshold": entropy_threshold,
    "wino": wino,
    "token_editing": token_editing,
    "eos_rejection": eos_rejection,
    "ascending": ascending,
}
FIRST_STEP_ALONE = [name for name in RULES if name not in ("klass", "credit")]  # the others look at whole distributions


def a_seen(draw, n, levels):
    """A block at some step. Numbers are few, so that there are ties."""
    number = st.sampled_from(levels)
    numbers = st.lists(number, min_size=n, max_size=n)
    kind = draw(st.lists(st.sampled_from(["mask", "filled", "prompt"]), min_size=n, max_size=n))
    masked = [k == "mask" for k in kind]
    filled = [k == "filled" for k in kind]
    tokens = [MASK if m else draw(st.integers(0, 3)) for m in masked]

    def only(where, values, other=None):
        return [v if w else other for w, v in zip(where, values, strict=True)]

    steps = draw(st.integers(1, n))
    step = draw(st.integers(0, n))
    seen = Seen(
        tokens=tokens,
        masked=masked,
        proposal=draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)),
        confidence=only(masked, draw(numbers), -math.inf),
        entropy=only(masked, draw(numbers), math.inf),
        stop=only(masked, draw(st.lists(st.booleans(), min_size=n, max_size=n)), False),
        expected=draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)),
        certainty=only(filled, draw(numbers)),
        shadow=only(filled, draw(numbers)),
        quota=min(step_quota(n, steps, step), sum(masked)),
        step=step,
        steps=steps,
        must=draw(st.booleans()),
        logits=[],
    )
    return seen, [k == "prompt" for k in kind]


def as_view(blocks):
    """Blocks of one size as the policies see them."""

    def grid(name, other=0.0):
        rows = [[other if x is None else x for x in getattr(b, name)] for b, _ in blocks]
        return torch.tensor(rows)

    def row(name):
        return torch.tensor([getattr(b, name) for b, _ in blocks])

    return View(
        tokens=grid("tokens"),
        fixed=torch.tensor([fixed for _, fixed in blocks]),
        masked=grid("masked"),
        proposal=grid("proposal"),
        confidence=grid("confidence"),
        quota=row("quota"),
        step=row("step"),
        steps=row("steps"),
        depth=torch.zeros(len(blocks), dtype=torch.int64),
        progress=torch.ones(len(blocks)),
        must=row("must"),
        entropy=grid("entropy"),
        expected=grid("expected"),
        certainty=grid("certainty", -math.inf),
        shadow=grid("shadow", math.inf),
        stop=grid("stop"),
    )


def new_memory(kind, rows, n, vocabulary=4):
    return {name: torch.stack([m.new(n, vocabulary) for _ in range(rows)]) for name, m in kind.memory.items()}


def some_settings(draw, name):
    """Settings of a policy at levels that the numbers take too."""
    level = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
    whole = st.integers(1, 3)
    about = {f.name: (whole if isinstance(f.default, int) else level) for f in fields(POLICIES[name])}
    return {setting: draw(values) for setting, values in about.items()}


@pytest.mark.parametrize("name", FIRST_STEP_ALONE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rule_is_its_definition_for_all_rows_at_once_and_over_steps(name, data):
    """Rows with settings of their own; memory goes on over three looks at unrelated blocks; ties everywhere."""
    kind, n, rows = POLICIES[name], data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3))
    policies = [kind(**some_settings(data.draw, name)) for _ in range(rows)]
    memory, remembered = new_memory(kind, rows, n), [{} for _ in range(rows)]
    for _ in range(3):
        blocks = [a_seen(data.draw, n, [0.0, 0.25, 0.5, 0.75, 1.0]) for _ in range(rows)]
        view = as_view(blocks)
        decision = kind.decide(policies[0], view, Knobs(policies), memory)
        done = lawful(decision, view, MASK, lambda view=view: torch.zeros_like(view.tokens), 8)
        for row, (seen, _) in enumerate(blocks):
            seen.memory = remembered[row]
            commit, rewrite, remask = RULES[name](seen, policies[row])
            assert done.commit[row].nonzero()[:, 0].tolist() == sorted(commit)
            if done.rewrite is not None:
                assert {i: int(done.new[row, i]) for i in done.rewrite[row].nonzero()[:, 0].tolist()} == rewrite
            if done.remask is not None:
                assert done.remask[row].nonzero()[:, 0].tolist() == sorted(remask)


def test_credit_by_hand():
    kind, logits = POLICIES["credit"], torch.tensor([[2.0, 1.0, -torch.inf], [0.0, 3.0, -torch.inf]])
    memory = {"credit": torch.zeros(2, 3)}
    knobs = Knobs([kind(), kind(credit_weight=0.0)])
    p = math.exp(2) / (math.exp(2) + math.exp(1))
    once = kind.adjust(logits, knobs, memory)
    assert once[0].tolist() == pytest.approx([2 + 0.7 * math.log(p**0.2 + 1), 1.0, -math.inf])
    assert once[1].tolist() == logits[1].tolist()
    flipped = kind.adjust(logits.flip(1).roll(-1, 1), knobs, memory)  # tokens 0 and 1 have changed places
    assert flipped[0, 0] == pytest.approx(1 + 0.7 * math.log(0.8 * p**0.2 + 1))
    assert flipped[0, 1] == pytest.approx(2 + 0.7 * math.log(p**0.2 + 1))


def test_klass_waits_until_a_place_is_stable_and_starts_over_when_it_moves():
    kind = POLICIES["klass"]
    memory = {"last": torch.full((1, 3), math.inf), "stable": torch.zeros(1, dtype=torch.int64)}
    counts = []
    for logits in (
        [5.0, 0, -math.inf],
        [5.0, 0, -math.inf],
        [5.01, 0, -math.inf],
        [0.0, 5, -math.inf],
        [0.0, 5, -math.inf],
    ):
        kind.adjust(torch.tensor([logits]), Knobs([kind()]), memory)
        counts.append(int(memory["stable"]))
    assert counts == [0, 1, 2, 0, 1]


def masks(confidence, **about):
    """A block of masks, as a view of one row."""
    n = len(confidence)
    about = {"quota": 1, "step": 0, "steps": n, "must": True, "entropy": [0.0] * n} | about
    nothing = {"stop": [False] * n, "expected": [0] * n, "certainty": [None] * n, "shadow": [None] * n, "logits": []}
    seen = Seen(tokens=[MASK] * n, masked=[True] * n, proposal=[0] * n, confidence=confidence, **nothing, **about)
    return as_view([(seen, [False] * n)])


def test_klass_needs_confidence_too_and_falls_back_on_the_schedule():
    kind = POLICIES["klass"]
    view = masks([0.95, 0.8, 0.99, 0.7], quota=2)

    def picked(stable):
        memory = {"last": torch.zeros(1, 4, 3), "stable": torch.tensor([stable])}
        return kind().decide(view, Knobs([kind()]), memory)[0].tolist()

    assert picked([2, 2, 1, 2]) == [True, False, False, False]
    assert picked([1, 1, 1, 1]) == [True, False, True, False]
    view.must = torch.tensor([False])
    assert picked([1, 1, 1, 1]) == [False] * 4


def test_a_setting_given_as_a_whole_number_is_no_whole_number_for_the_batch():
    kind = POLICIES["prefix"]
    view = masks([0.5, 0.6])
    both = View(
        **{f.name: torch.cat([getattr(view, f.name)] * 2) for f in fields(view) if getattr(view, f.name) is not None}
    )
    chosen = kind().decide(both, Knobs([kind(threshold=1), kind(threshold=0.55)]), {})
    assert chosen.tolist() == [[True, False], [True, False]]
    chosen = kind().decide(both, Knobs([kind(threshold=0), kind(threshold=0.4)]), {})
    assert chosen.all()


# End to end


def reference_logits(model, ids, block_size):
    """Logits float32 (2 x length, vocab) of a row of whole blocks and, behind it, of a mask at each place that sees
    everything but the token of that place."""
    n = len(ids)
    block = torch.arange(n) // block_size
    sees = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
    sees[:n, :n] = sees[n:, :n] = block[:, None] >= block[None, :]
    sees[n:, :n] &= ~torch.eye(n, dtype=torch.bool)
    sees[n:, n:] = torch.eye(n, dtype=torch.bool)
    mask_id = model.config.mask_token_id
    positions = torch.arange(n).repeat(2)[None]
    out = model(torch.tensor([ids + [mask_id] * n]), attention_mask=sees[None, None], position_ids=positions).logits[0]
    out = out.float()
    out[:, mask_id] = -math.inf
    return out[:n], out[n:]


@torch.no_grad()
def reference_sample(model, prompt, config, seed):
    """A plain sampler of one block after the other that follows a rule written in loops; (ids, step map, confidence,
    revisions, length, reason, forwards)."""
    name, policy, size = config.strategy, config.policy, config.block_size
    mask_id, stop_ids = model.config.mask_token_id, config.stop_ids
    ids, kept, forwards = list(prompt), [], 0
    while True:
        first, base = len(ids), len(ids) // size * size
        ids += [mask_id] * (base + size - len(ids))
        steps, confidence, revisions = ([0] * size for _ in range(3))
        memory, credits, step, changed = {}, {}, 0, True
        while mask_id in ids or (name == "token_editing" and changed):
            logits, shadow = (x[base:] for x in reference_logits(model, ids, size))
            forwards += 1
            tokens = ids[base:]
            masked = [t == mask_id for t in tokens]
            if config.window and any(masked):
                piece = masked.index(True) // config.window
                masked = [m and i // config.window == piece for i, m in enumerate(masked)]
            filled = [t != mask_id and base + i >= first for i, t in enumerate(tokens)]
            drawn = {}
            for i in range(size):
                if masked[i]:
                    own = credit_adjusts(logits[i], i, credits, policy) if name == "credit" else logits[i]
                    u = uniform(torch.tensor([seed]), torch.tensor([base + i]), torch.tensor([step]))
                    drawn[i] = reference_draw(own, config, float(u))
            p = logits.softmax(-1)
            seen = Seen(
                tokens=tokens,
                masked=masked,
                proposal=[drawn[i][0] if masked[i] else 0 for i in range(size)],
                confidence=[drawn[i][1] if masked[i] else -math.inf for i in range(size)],
                entropy=[drawn[i][2] if masked[i] else math.inf for i in range(size)],
                stop=[masked[i] and drawn[i][0] in stop_ids for i in range(size)],
                expected=p.argmax(-1).tolist(),
                certainty=[float(p[i].max()) if filled[i] else None for i in range(size)],
                shadow=[float(shadow[i].softmax(-1)[tokens[i]]) if filled[i] else None for i in range(size)],
                quota=min(step_quota(size, config.steps, step), sum(masked)),
                step=step,
                steps=config.steps,
                must=True,
                logits=list(logits[:, :mask_id]),
                memory=memory,
            )
            commit, rewrite, remask = RULES[name](seen, policy)
            rewrite = {i: t for i, t in rewrite.items() if revisions[i] < policy.most_revisions}
            remask = [i for i in remask if revisions[i] < policy.most_revisions]
            for i in commit:
                ids[base + i], confidence[i], steps[i] = drawn[i][0], drawn[i][1], step
            for i, token in rewrite.items():
                ids[base + i], confidence[i], steps[i] = token, seen.certainty[i], step
                revisions[i] += 1
            for i in remask:
                ids[base + i], confidence[i], steps[i] = mask_id, 0.0, step
                revisions[i] += 1
            changed = bool(commit or rewrite or remask)
            step += changed
        kept += list(zip(steps, confidence, revisions, strict=True))[first - base :]
        response = ids[len(prompt) :]
        step_map, sure, revised = ([x[n] for x in kept] for n in range(3))
        for place in range(first - len(prompt), min(len(response), config.max_tokens)):
            if response[place] in stop_ids:
                return response, step_map, sure, revised, place + 1, "stop", forwards
        if len(response) >= config.max_tokens:
            return response, step_map, sure, revised, config.max_tokens, "length", forwards


RULES["low_confidence_dynamic"] = above_threshold  # with a window it is Fast-dLLM v2's rule


@pytest.fixture(scope="module")
def model():
    return make_model()


@st.composite
def configs(draw, names):
    block_size = draw(st.integers(1, 8))
    level = st.sampled_from([0.15, 0.3, 0.6, 0.85])
    return DecodingConfig(
        block_size=block_size,
        steps=draw(st.integers(1, block_size)),
        window=draw(st.sampled_from([None, None, 1, 2, 3])),
        strategy=draw(st.sampled_from(names)),
        threshold=draw(level),
        threshold_high=draw(level),
        threshold_low=draw(level),
        run_threshold=draw(level),
        entropy_threshold=draw(st.sampled_from([0.2, 1.0, 2.0])),
        kl_bound=draw(st.sampled_from([0.01, 0.5, 5.0])),
        stable_steps=draw(st.integers(1, 2)),
        accept_threshold=draw(level),
        revoke_threshold=draw(level),
        draft_threshold=draw(level),
        edit_threshold=draw(st.sampled_from([0.0, 0.3, 0.6])),
        edit_steps=draw(st.sampled_from([0, 1, 16])),
        eos_floor=draw(st.sampled_from([0.0, 0.4])),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        max_tokens=draw(st.integers(1, 16)),
        stop_ids=tuple(range(draw(st.sampled_from([0, 2, 20])))),
        seed=draw(st.integers(0, 1000)),
    )


def prompts_for(data, count):
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    return [[rng.randrange(6, 60) for _ in range(rng.randint(1, 13))] for _ in range(count)]


@pytest.mark.parametrize("names", [[name] for name in RULES] + [sorted(RULES)], ids=[*RULES, "all in one batch"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_engine_equals_a_plain_sampler_that_follows_the_definition(model, names, data):
    """Blocks of different sizes and, in the last case, different rules in one batch; prompts end inside blocks."""
    prompts = prompts_for(data, data.draw(st.integers(1, 3)))
    some = [data.draw(configs(names)) for _ in prompts]
    longest = max(len(p) + c.max_tokens + 2 * c.block_size for p, c in zip(prompts, some, strict=True))
    room = data.draw(st.sampled_from([None, -(-longest // 4) * 4]))  # that of one: the others yield and start over
    engine = Engine(model, page_size=4, kv_cache_tokens=room)
    for t, prompt, config in zip(engine.generate(prompts, some), prompts, some, strict=True):
        ids, steps, confidence, revisions, length, reason, forwards = reference_sample(model, prompt, config, t.seed)
        assert (t.response_ids, t.step_map, t.revisions or [0] * len(ids)) == (ids, steps, revisions)
        assert t.confidence == pytest.approx(confidence, abs=1e-4)
        assert (t.length, t.finish_reason, t.nfe.denoise) == (length, reason, forwards)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_rule_ends_with_blocks_in_flight_too(model, data):
    """No mask is left, and no block takes more forwards than commits and revisions can."""
    prompts = prompts_for(data, 3)
    some = [data.draw(configs(sorted(RULES))) for _ in prompts]
    some = [replace(c, blocks_in_flight=data.draw(st.integers(2, 3))) for c in some]
    for t, config in zip(Engine(model).generate(prompts, some), some, strict=True):
        assert model.config.mask_token_id not in t.response_ids
        most = min(config.policy.most_revisions, config.block_size + config.edit_steps)
        assert max(t.revisions or [0]) <= most
        blocks = len(t.prompt_ids + t.response_ids) // config.block_size - len(t.prompt_ids) // config.block_size
        assert t.nfe.denoise <= blocks * (config.block_size * (1 + most) + 1)


@dataclass(frozen=True)
class Restless(Policy):
    """Wants everything at once: all masks committed, all that is filled masked again or replaced by the next token."""

    name = "restless"
    needs = frozenset({FILLED, SHADOW})

    def decide(self, view, knobs, memory):
        odd = torch.arange(view.tokens.shape[1]) % 2 == 1
        other = ((view.tokens + 1) % 60).where(odd, view.tokens)
        return Decision(torch.ones_like(view.masked), other, torch.ones_like(view.masked))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_revisions_end_whatever_a_policy_says(model, data):
    size = data.draw(st.integers(1, 8))
    [prompt] = prompts_for(data, 1)
    about = {"max_tokens": 9, "stop_ids": (), "blocks_in_flight": data.draw(st.integers(1, 3))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(POLICIES, "restless", Restless)
        [t] = Engine(model).generate([prompt], DecodingConfig(strategy="restless", block_size=size, **about))
    assert t.length == 9
    assert model.config.mask_token_id not in t.response_ids
    odd = [(len(prompt) + i) % size % 2 == 1 for i in range(len(t.response_ids))]
    assert all(
        n == Policy.most_revisions for n, edited in zip(t.revisions or [0] * len(odd), odd, strict=True) if edited
    )


class Watcher:
    """A policy that looks, with a memory of each shape, and commits the leftmost."""

    def __init__(self):
        self.views, self.memories = [], []
        watcher = self

        @dataclass(frozen=True)
        class Watching(Policy):
            name = "watching"
            needs = NEEDS
            memory: ClassVar = {
                "row": Memory(dtype=torch.int64),
                "place": Memory("place", torch.int64),
                "vocabulary": Memory("vocabulary", fill=1.0),
            }

            @classmethod
            def adjust(cls, logits, knobs, memory):
                memory["place"] += 1
                memory["vocabulary"] *= 2
                return logits

            def decide(self, view, knobs, memory):
                watcher.views.append(view)
                memory["row"] += 1
                watcher.memories.append({name: value.clone() for name, value in memory.items()})
                return view.masked & (view.masked.cumsum(-1) == 1)

        self.policy = Watching


def test_policies_see_what_is_promised_and_remember_by_the_block(model):
    """Two sequences with blocks of 3 and 5 and windows of 2, in one batch; every token ends one of them."""
    watcher, mask_id = Watcher(), model.config.mask_token_id
    prompts = [[7, 8], [9, 10, 11, 12, 13, 14]]
    sizes, ends = (3, 5), ((), tuple(range(mask_id)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(POLICIES, "watching", watcher.policy)
        about = {"strategy": "watching", "window": 2, "max_tokens": 4, "temperature": 1.0}
        some = [DecodingConfig(block_size=n, stop_ids=stops, **about) for n, stops in zip(sizes, ends, strict=True)]
        Engine(model).generate(prompts, some)
    assert len(watcher.views[0].tokens) == 2
    for v in watcher.views:
        filled = (v.tokens != mask_id) & ~v.fixed
        assert not (v.masked & (filled | v.fixed)).any()
        for grid, asked, other in (
            (v.confidence, v.masked, -math.inf),
            (v.entropy, v.masked, math.inf),
            (v.certainty, filled, -math.inf),
            (v.shadow, filled, math.inf),
        ):
            assert grid[asked].isfinite().all()
            assert (grid[~asked] == other).all()
        assert (v.masked.sum(-1) <= 2).all()
        assert not (v.stop & ~v.masked).any()
    first, shapes = watcher.views[0], [tuple(m.shape) for m in watcher.memories[0].values()]
    assert shapes == [(2, 1), (2, 5), (2, 5, model.config.vocab_size)]
    assert first.fixed.tolist() == [[True, True, False, True, True], [True, False, False, False, False]]
    assert first.stop.tolist() == [[False] * 5, first.masked[1].tolist()]
    # the second sequence: masks 1 (alone in its piece), then 2, 3 and 4, and a last look that changes nothing
    rows = [m["row"][1, 0].item() for m in watcher.memories[:5]]
    assert rows == [1, 2, 3, 4, 5]
    places = [m["place"][1].tolist() for m in watcher.memories[:5]]
    assert places == [[0, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 2, 0], [0, 1, 1, 2, 1], [0, 1, 1, 2, 1]]
    for m in watcher.memories:
        assert (m["vocabulary"] == 2.0 ** m["place"][:, :, None]).all()
    # the first one's block of 3 is full after its first look and done after its second; then the next block begins anew
    assert [m["row"][0, 0].item() for m in watcher.memories[:4]] == [1, 2, 1, 2]
    assert [m["place"][0].tolist()[:3] for m in watcher.memories[:3]] == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]


def test_a_window_commits_pieces_from_left_to_right(model):
    """Fast-dLLM v2's sub-blocks: within a piece all that are sure, or the surest, in any order."""
    config = DecodingConfig(
        strategy="low_confidence_dynamic", block_size=8, window=2, threshold=0.3, max_tokens=24, stop_ids=()
    )
    prompts = [[7] * n for n in (3, 8, 13)]
    whole = Engine(model).generate(prompts, replace(config, window=None))
    for t, free in zip(Engine(model).generate(prompts, config), whole, strict=True):
        start = len(t.prompt_ids)
        pieces = {}
        for place, step in enumerate(t.step_map, start):
            pieces.setdefault((place // 8, place % 8 // 2), []).append(step)
        for (block, piece), steps in pieces.items():
            before = pieces.get((block, piece - 1), [-1])
            assert min(steps) == max(before) + 1  # no step is empty, and none works on two pieces
        assert t.step_map != free.step_map


def test_rejection_of_stop_tokens_changes_nothing_where_every_token_is_one(model):
    about = {"block_size": 6, "steps": 3, "max_tokens": 12}
    prompts = [[7] * n for n in (1, 6, 9)]
    every = tuple(range(model.config.mask_token_id))
    static = Engine(model).generate(prompts, DecodingConfig(stop_ids=every, **about))
    rejected = Engine(model).generate(prompts, DecodingConfig(strategy="eos_rejection", stop_ids=every, **about))
    for a, b in zip(static, rejected, strict=True):
        assert (a.response_ids, a.step_map) == (b.response_ids, b.step_map)
        assert (b.length, b.finish_reason) == (1, "stop")


def test_rejection_puts_a_stop_token_off_and_keeps_it():
    """Two of three masks are to be committed in three steps; the surest would end the response."""
    kind = POLICIES["eos_rejection"]
    view = masks([0.8, 0.9, 0.5], quota=2, steps=3)
    view.stop = torch.tensor([[False, True, False]])
    early = kind().decide(view, Knobs([kind()]), {})
    assert early.tolist() == [[True, False, True]]  # .9 x .4 = .36
    view.step = torch.tensor([1])
    assert kind().decide(view, Knobs([kind()]), {}).tolist() == [[True, True, False]]  # .9 x .7 = .63


def test_wino_caps_what_a_step_commits():
    kind = POLICIES["wino"]
    for m, cap in ((4, 4), (6, 5), (8, 5), (10, 7), (29, 20), (40, 20)):
        decision = kind().decide(masks([0.7] * m), Knobs([kind()]), new_memory(kind, 1, m))
        assert decision.commit.sum() == cap


def test_an_edit_that_comes_and_goes_ends(model):
    """With a budget of steps, a full block is looked at once more than it is edited."""
    looks = {}
    for budget in (0, 1, 2, 16):
        config = DecodingConfig(
            strategy="token_editing", draft_threshold=0.0, edit_steps=budget, block_size=8, max_tokens=8, stop_ids=()
        )
        [t] = Engine(model).generate([[7, 8, 9, 10, 11, 12, 13, 14]], config)
        looks[budget] = t.nfe.denoise
        assert max(t.step_map) <= budget
    assert (looks[0], looks[1], looks[2]) == (2, 3, 4)  # one commits all, the last changes nothing
    assert looks[16] <= 18


def test_the_guide_s_example_is_found_by_its_entry_point(tmp_path):
    """As an installed package: its settings are settings of every decode."""
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    code = next(c for c in guide.split("```")[1::2] if c.startswith("python\n# my_package/patient.py"))
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "patient.py").write_text(code.removeprefix("python\n"))
    about = tmp_path / "my_package-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[t3d.policies]\npatient = my_package.patient\n")
    program = (
        "from t3d import DecodingConfig, Engine\n"
        "from tests.conftest import make_model\n"
        "for fast in (0.0, 1.0):\n"
        "    config = DecodingConfig(strategy='patient', first_threshold=fast, max_tokens=4, stop_ids=())\n"
        "    print(Engine(make_model()).generate([[7, 8, 9, 10]], config)[0].nfe.denoise)\n"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(tmp_path), str(root / "src"), str(root)])
    out = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert out.stdout.split()[0] == "1", out.stderr
    assert int(out.stdout.split()[1]) > 1
