"""The invariant that training rests on: a noisy block's logits are the decoder's at the same state."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d.blocks import block_causal_mask, geometry
from t3d.decoding import DecodingConfig
from t3d.distill import T3DConfig, T3DTrainer
from t3d.distill.batch import TrainingBatch, collate
from t3d.distill.data import StateDataset
from t3d.engine import Engine
from t3d.errors import T3DError
from t3d.trajectories import NFE, Trajectory
from tests.conftest import make_model

MASK, PAD = 63, 0


def random_trajectory(rng, block_size, prompt_length, blocks):
    length = -(-(prompt_length + 1) // block_size) * block_size + (blocks - 1) * block_size - prompt_length
    return Trajectory(
        prompt_ids=rng.integers(2, 60, prompt_length).tolist(),
        response_ids=rng.integers(2, 60, length).tolist(),
        step_map=rng.integers(0, block_size, length).tolist(),
        confidence=rng.random(length).tolist(),
        length=int(rng.integers(1, length + 1)),
        finish_reason="stop",
        nfe=NFE(),
        block_size=block_size,
        prompt_id=str(rng.integers(1 << 30)),
    )


def decoder_logits(model, trajectory, noisy_block, first):
    """Logits of one block, or of several in flight, as a decoder without cache computes them: clean context, then the
    state of what is in flight."""
    ids = torch.tensor([[*(trajectory.prompt_ids + trajectory.response_ids)[:first], *noisy_block]])
    length = ids.shape[1]
    mask = block_causal_mask(length, trajectory.block_size)[None, None]
    return model(ids, mask, torch.arange(length)[None]).logits[0, first:]


@given(
    seed=st.integers(0, 10**6),
    block_size=st.sampled_from([1, 2, 3, 4, 7, 8, 16, 32]),
    documents=st.integers(1, 4),
    copies=st.integers(1, 3),
    pack_length=st.sampled_from([0, 1, 400, 10**6]),
    objective=st.sampled_from(["t3d", "sft"]),
    attention=st.sampled_from(["sdpa", "eager", "block_sdpa", "flex_attention"]),
    size=st.integers(1, 3),
    shift=st.integers(0, 1),
)
@settings(max_examples=40, deadline=None)
def test_noisy_blocks_have_the_decoders_logits(
    seed, block_size, documents, copies, pack_length, objective, attention, size, shift
):
    rng = np.random.default_rng(seed)
    model = make_model(block_size=block_size, **({"family": "block_llama", "logits_shift": 1} if shift else {}))
    model.set_attn_implementation(attention)
    trajectories = [
        random_trajectory(rng, block_size, int(rng.integers(1, 20)), int(rng.integers(1, 4))) for _ in range(documents)
    ]
    settings = {"objective": objective, "states_per_sequence": copies, "group_size": size}
    config = T3DConfig(output_dir="unused", seed=seed, use_cpu=True, **settings)
    dataset = StateDataset(trajectories, config, block_size, MASK, vocabulary=60)
    batch = TrainingBatch(**collate([dataset[i] for i in range(documents)], PAD, block_size, pack_length))
    layout = batch.layout
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # FlexAttention, too: compiling takes a minute
        everywhere = layout.predictors(torch.arange(batch.input_ids.numel()), shift)
        logits = model(batch.input_ids, layout.attention_mask(attention), batch.position, select=everywhere).view(
            *batch.input_ids.shape, -1
        )
    model.set_attn_implementation("sdpa")
    checked = 0
    for d, trajectory in enumerate(trajectories):
        first_noisy = len(trajectory.prompt_ids) // block_size * block_size
        total = len(trajectory.prompt_ids) + len(trajectory.response_ids)
        for c in range(1, copies + 1):
            for first in range(first_noisy, total, block_size):
                here = (batch.document == d) & (batch.copy == c) & (layout.block == first // block_size)
                assert here.sum() == block_size
                (group,) = batch.group[here].unique().tolist()
                assert first_noisy // block_size <= group <= first // block_size < group + size
                flying = (batch.document == d) & (batch.copy == c) & (group <= layout.block)
                flying &= layout.block <= first // block_size
                with torch.no_grad():
                    expected = decoder_logits(model, trajectory, batch.input_ids[flying].tolist(), group * block_size)
                asked = batch.position[here] > 0  # nothing predicts the first token of a text
                torch.testing.assert_close(logits[here][asked], expected[-block_size:][asked], atol=2e-4, rtol=1e-4)
                checked += 1
    assert checked >= documents * copies


def test_a_group_is_what_the_engine_sees_with_several_blocks_in_flight(monkeypatch):
    """After the first, two wholly masked blocks at a time are committed at once: their confidences are the group's."""
    model = make_model(eos_token_id=None)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 60, n).tolist() for n in (4, 6, 11)]
    flying = {"blocks_in_flight": 2, "enter": 0.0, "force": 0.0}
    found = Engine(model).generate(prompts, DecodingConfig(steps=1, max_tokens=32, **flying))
    assert {t.nfe.denoise for t in found} == {5}, "of 8 blocks or 9"

    def pairs(block, size, rng):
        return np.maximum(block[0], block - (block - block[0] - 1) % size)

    monkeypatch.setattr("t3d.distill.data.draw_groups", pairs)
    settings = {"objective": "path", "state": "all_masked", "random_ratio": 0.0, "group_size": 2}
    config = T3DConfig(output_dir="unused", use_cpu=True, **settings)
    dataset = StateDataset(found, config, 4, MASK, vocabulary=60)
    batch = TrainingBatch(**collate([dataset[i] for i in range(3)], PAD, 4))
    with torch.no_grad():
        logits = model(batch.input_ids, batch.layout.boolean_mask(), batch.position, select=batch.select)
    logits[:, MASK] = -torch.inf
    confidence = logits.softmax(-1).gather(1, batch.target[:, None])[:, 0]
    document, position = batch.document.flatten()[batch.select], batch.position.flatten()[batch.select]
    for d, p, mine in zip(document.tolist(), position.tolist(), confidence.tolist(), strict=True):
        assert abs(found[d].confidence[p - len(prompts[d])] - mine) < 1e-4


@given(seed=st.integers(0, 10**6), packed=st.booleans())
@settings(max_examples=30, deadline=None)
def test_supervised_positions_are_the_counted_masked_tokens(seed, packed):
    rng = np.random.default_rng(seed)
    trajectories = [random_trajectory(rng, 4, int(rng.integers(1, 12)), int(rng.integers(1, 4))) for _ in range(3)]
    config = T3DConfig(output_dir="unused", states_per_sequence=2, seed=seed, random_ratio=0.3, use_cpu=True)
    dataset = StateDataset(trajectories, config, 4, MASK, vocabulary=60)
    examples = [dataset[i] for i in range(3)]
    batch = TrainingBatch(**collate(examples, PAD, 4, 200 if packed else 1))
    document, position, copy = (x.flatten()[batch.select] for x in (batch.document, batch.position, batch.copy))
    for d, c, p, target in zip(document.tolist(), copy.tolist(), position.tolist(), batch.target.tolist(), strict=True):
        place = p - len(trajectories[d].prompt_ids)
        assert 0 <= place < trajectories[d].length, "only tokens through the stop are supervised"
        assert c >= 1
        assert target == trajectories[d].response_ids[place]
    masked = (batch.input_ids == MASK).flatten()
    uncounted = set(masked.nonzero()[:, 0].tolist()) - set(batch.select.tolist())
    for i in uncounted:
        d = batch.document.flatten()[i].item()
        assert batch.position.flatten()[i] - len(trajectories[d].prompt_ids) >= trajectories[d].length


def test_states_depend_on_seed_epoch_and_index_only():
    rng = np.random.default_rng(0)
    trajectories = [random_trajectory(rng, 4, 6, 5) for _ in range(4)]

    def draw(seed, epoch, index):
        config = T3DConfig(output_dir="unused", seed=seed, mask_exponent=0.0, mask_per_block=True, use_cpu=True)
        dataset = StateDataset(trajectories, config, 4, MASK, vocabulary=60)
        dataset.set_epoch(epoch)
        return dataset[index]["input_ids"]

    first = draw(0, 0, 2)
    assert (draw(0, 0, 2) == first).all()
    assert (draw(0, 1, 2) != first).any()
    assert (draw(1, 0, 2) != first).any()


@pytest.mark.parametrize("attention", ["sdpa", "eager", "block_sdpa", "flex_attention"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", ["anchored", "full"])
def test_states_of_other_families_are_what_their_decoder_saw(kind, shift, attention):
    """Blocks decoded in one step: where all of one is masked, the confidences are those of the engine."""
    model = make_model(family="block_llama", logits_shift=shift)
    model.config.anchor, model.config.attention = "prompt", "full" if kind == "full" else "block"
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 60, n).tolist() for n in (4, 6, 11)]
    found = Engine(model).generate(prompts, DecodingConfig(steps=1, max_tokens=14, stop_ids=(1, 2, 3)))
    assert {len(t.response_ids) for t in found} != {14}, "one ends before its canvas does"
    settings = {"objective": "path", "state": "all_masked", "random_ratio": 0.0, "states_per_sequence": 6}
    config = T3DConfig(output_dir="unused", use_cpu=True, **settings)
    dataset = StateDataset(found, config, 4, MASK, vocabulary=60, **geometry(model.config))
    batch = TrainingBatch(**collate([dataset[i] for i in range(3)], PAD, 4, 10**6, full=kind == "full"))
    model.set_attn_implementation(attention)
    layout = batch.layout
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        select = layout.predictors(batch.select, shift)
        logits = model(batch.input_ids, layout.attention_mask(attention), batch.position, select=select)
    logits[:, MASK] = -torch.inf
    confidence = logits.softmax(-1).gather(1, batch.target[:, None])[:, 0]
    document, position = batch.document.flatten()[batch.select], batch.position.flatten()[batch.select]
    seen = set()
    for d, p, mine in zip(document.tolist(), position.tolist(), confidence.tolist(), strict=True):
        place = p - found[d].origin - len(prompts[d])
        seen.add((d, place))
        assert abs(found[d].confidence[place] - mine) < 1e-4
    assert len(seen) > 12


def test_trajectories_of_another_geometry_are_refused():
    rng = np.random.default_rng(0)
    config = T3DConfig(output_dir="unused", use_cpu=True)
    for other in ({"anchored": True}, {"anchored": True, "full": True}):
        with pytest.raises(T3DError, match="another family"):
            StateDataset([random_trajectory(rng, 4, 5, 2)], config, 4, MASK, vocabulary=60, **other)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [("full", {"group_size": 2}, "group_size"), ("block", {"reference_sees": "answer"}, "reference_sees=answer")],
)
def test_what_other_families_cannot_learn_by_is_refused(kind, settings, words):
    model = make_model(family="block_llama")
    model.config.anchor, model.config.attention = "prompt", kind
    data = Engine(model).generate([[5, 6, 7]], DecodingConfig(max_tokens=8, ignore_eos=True))
    config = T3DConfig(output_dir="unused", use_cpu=True, report_to=[], objective="soft", **settings)
    with pytest.raises(T3DError, match=words):
        T3DTrainer(model, config, data, answer_prompts=lambda t: t.prompt_ids)
