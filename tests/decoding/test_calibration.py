"""Calibration finds the setting at the edge of the target, and what it chose can be saved and loaded."""

import pytest

from t3d.decoding import DecodingConfig, calibrate, load_decoding, save_decoding, tokens_per_forward
from t3d.engine import Engine
from t3d.errors import T3DError
from t3d.evaluation.metrics import Speed
from tests.conftest import make_model

PROMPTS = [[7 + i, 8, 9 + i, 10, 11][: 2 + i % 4] for i in range(12)]


@pytest.fixture(scope="module")
def engine():
    return Engine(make_model(block_size=8))


@pytest.mark.parametrize("strategy", ["adaptive", "low_confidence_dynamic", "factor", "entropy_bounded_eb"])
def test_target_tpf_is_met_and_not_wildly_passed(engine, strategy):
    config = DecodingConfig(strategy=strategy, max_tokens=32, stop_ids=())
    chosen, trials = calibrate(engine, PROMPTS, config, target_tpf=2.0)
    reached = tokens_per_forward(engine.generate(PROMPTS, chosen))
    assert reached >= 2.0
    assert reached == min(t["tpf"] for t in trials if t["tpf"] >= 2.0)
    assert reached < 4.0


def test_tokens_per_forward_are_those_of_the_tables():
    """The target of `--tpf`, the progress bar, and the column TPF."""
    engine, total = Engine(make_model(block_size=8), fused=False), Speed()  # with forwards that predict nothing
    trajectories = engine.generate(PROMPTS, DecodingConfig(steps=1, max_tokens=32, stop_ids=()))
    for trajectory in trajectories:
        total.add(trajectory)
    assert total.tpf == tokens_per_forward(trajectories) == engine.stats.tokens / engine.stats.sequence_forwards
    assert f"TPF {total.tpf:.2f}" in engine.stats.line(1.0)
    assert total.tpf > total.tpf_all


def test_target_quality_gives_the_fastest_that_keeps_it(engine):
    full = engine.generate(PROMPTS, DecodingConfig(max_tokens=32, stop_ids=()))

    def agreement(trajectories):
        same = [
            a == b
            for t, f in zip(trajectories, full, strict=True)
            for a, b in zip(t.response_ids[:8], f.response_ids[:8], strict=True)
        ]
        return sum(same) / len(same)

    config = DecodingConfig(strategy="adaptive", max_tokens=32, stop_ids=())
    chosen, trials = calibrate(engine, PROMPTS, config, target_quality=0.7, quality=agreement)
    assert agreement(engine.generate(PROMPTS, chosen)) >= 0.7
    assert chosen.risk == max(t["value"] for t in trials if t["quality"] >= 0.7)


def test_out_of_reach_and_unfit_are_said(engine):
    config = DecodingConfig(strategy="adaptive", max_tokens=8, stop_ids=())
    with pytest.raises(T3DError, match="at best tpf = "):
        calibrate(engine, PROMPTS, config, target_tpf=100)
    with pytest.raises(T3DError, match="has nothing to calibrate"):
        calibrate(engine, PROMPTS, DecodingConfig(), target_tpf=2)
    with pytest.raises(T3DError, match="either target_tpf"):
        calibrate(engine, PROMPTS, config)


def test_round_trip(tmp_path):
    config = DecodingConfig(strategy="adaptive", risk=0.25, stop_ids=(1, 2), stop=("\n",), steps=2)
    save_decoding(config, tmp_path / "fast.json", target_tpf=2.0)
    assert load_decoding(tmp_path / "fast.json") == config


def test_bad_files_are_said(tmp_path):
    with pytest.raises(T3DError, match="cannot read"):
        load_decoding(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(T3DError, match="does not hold decoding settings"):
        load_decoding(tmp_path / "bad.json")
    (tmp_path / "typo.json").write_text('{"decoding": {"rsik": 1}}')
    with pytest.raises(T3DError, match="did you mean 'risk'"):
        load_decoding(tmp_path / "typo.json")
    with pytest.raises(T3DError, match="cannot write"):
        save_decoding(DecodingConfig(), tmp_path / "nowhere" / "x.json")
