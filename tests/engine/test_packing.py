"""What a forward is planned with, made for all queries at once, equals what is made for one query after the other."""

import random

import numpy as np
import pytest

from t3d.blocks import block_end
from t3d.decoding import DecodingConfig
from t3d.engine import Engine
from t3d.engine import flex as flex_attention
from t3d.engine.flex import in_order, page_plan
from t3d.engine.intake import make_requests
from t3d.engine.packing import Packing
from tests.conftest import make_model

CASES = {
    "plain": ({"steps": 2}, {}, "sdar"),
    "several blocks": ({"strategy": "low_confidence_dynamic", "blocks_in_flight": 3, "recheck": 0.5}, {}, "sdar"),
    "shadows": ({"strategy": "wino"}, {}, "sdar"),
    "look-ahead": ({"flight": "look_ahead", "steps": 2}, {}, "sdar"),
    "verified by a causal model": ({"flight": "s2d2"}, {}, "sdar"),
    "guided": ({"steps": 2, "guidance_scale": 1.0}, {}, "sdar"),
    "shifted": ({"steps": 2}, {"logits_shift": 1}, "sdar"),
    "full attention": ({"steps": 2}, {"attention": "full"}, "sdar"),
}


def limits(query):
    places = range(query.start, query.end)
    origin, request = query.sequence.origin, query.sequence.request
    causal = request.final_block != request.span
    ends = (block_end(n + origin, request.span) - origin for n in places)
    return [min(n + 1 if causal and n < query.final else end, query.end) for n, end in zip(places, ends, strict=True)]


def tokens(cache, query, shift):
    """(id, position, row of the cache, whether its logits are wanted) of each token of the query."""
    size, pages = cache.page_size, query.sequence.pages
    ids = query.sequence.read(query.start, query.final).tolist()
    positions = list(range(query.start, query.final))
    wanted, last = [], len(ids) - 1
    for number, segment in enumerate(query.segments):
        for n, want in enumerate(segment.want):
            if want:
                wanted.append(last if shift and n == 0 and number else len(ids) + n - shift)
        ids += segment.ids.tolist()
        positions += range(segment.start - query.sequence.origin, segment.start - query.sequence.origin + len(segment))
    slots = [pages[n // size] * size + n % size for n in range(query.start, query.end)]
    return ids, positions, slots, wanted


@pytest.mark.parametrize("case", CASES)
def test_equals_one_query_after_the_other(case, monkeypatch):
    monkeypatch.setattr(flex_attention, "_TILE", 8)  # so that queries end inside tiles, and span some
    settings, changes, family = CASES[case]
    model, rng = make_model(family=family, **changes), random.Random(0)
    config = DecodingConfig(max_tokens=12, stop_ids=(), **settings)
    prompts = [[rng.randrange(2, 60) for _ in range(n)] for n in (3, 8, 13, 1, 22)]
    requests = make_requests(prompts, config, None, None, model, None)
    session = Engine(model, prefix_cache="full" not in case, page_size=8, max_batch_size=3).open(requests)
    for request in requests:
        session.add(request)
    plan, seen = session.scheduler.plan, 0

    def checked():
        nonlocal seen
        queries, companions = plan()
        shift, cache, asked = session.runner.shift, session.cache, queries + companions
        order = in_order(asked)
        packing = Packing(cache, order)
        ids, select = packing.fill(asked, shift)
        found = {id(query): tokens(cache, query, shift) for query in order}
        first, at = {}, 0
        for query in order:
            first[id(query)], at = at, at + query.length
        for mine, part in ((ids, 0), (packing.positions(), 1), (packing.slots(), 2)):
            assert mine.tolist() == [x for query in order for x in found[id(query)][part]]
        assert select.tolist() == [first[id(q)] + n for q in asked for n in found[id(q)][3]]
        row = 0
        for query in asked:
            for segment in query.segments:
                wanted = segment.want.nonzero()[0]
                assert (segment.rows[wanted] == np.arange(row, row + len(wanted))).all()
                assert (segment.rows[~segment.want] == -1).all()
                row += len(wanted)
        sight = np.concatenate(
            [[limits(q), *np.zeros((2, q.length)), -np.ones(q.length)] if q.plain else q.visible() for q in order], 1
        )
        assert (packing.sight == sight).all()
        held = [q.sequence.pages[: -(-q.end // cache.page_size)] for q in order]
        drawn = page_plan(packing, at + 3, cache.num_pages)
        for tile in range(-(-(at + 3) // 8)):
            inside = [
                h
                for q, h in zip(order, held, strict=True)
                if first[id(q)] < 8 * tile + 8 and first[id(q)] + q.length > 8 * tile
            ]
            pages = sorted({page for h in inside for page in h})
            assert drawn["indices"][tile, : drawn["counts"][tile]].tolist() == pages
        seen += len(order)
        return queries, companions

    monkeypatch.setattr(session.scheduler, "plan", checked)
    while not session.done:
        session.step()
    assert seen > 20
