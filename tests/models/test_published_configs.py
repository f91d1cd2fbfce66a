"""What config.json of published checkpoints says of blocks, masks and sizes; `auto_map` apart they are whole."""

import json
from pathlib import Path

import pytest

from t3d.errors import T3DError
from t3d.log import log
from t3d.models import FAMILIES, load_model, save_model
from t3d.models.load import NOT_HERE
from tests.conftest import make_model

ROWS = json.loads((Path(__file__).parent / "published" / "configs.json").read_text())
EXPECTED = {  # block size, the mask token if it is there, hidden size, layers, experts
    "training/model/SDAR-4B-Chat/config.json": (4, 151669, 2560, 36, None),
    "training/model/SDAR-8B-Chat/config copy.json": (4, None, 4096, 36, None),
    "models/sdar/config.json": (4, 151669, 4096, 36, None),
    "mbd_lm/configs/model_configs/sdar_8B/config.json": (4, None, 4096, 36, None),
    "models/SDAR-1dot7B-Chat/config.json": (4, 151669, 2048, 28, None),
    "models/SDAR-30B-A3B-Chat/config.json": (4, None, 2048, 48, 128),
    "models/LLaDA2.1-mini/config.json": (32, None, 2048, 20, 256),
    "FastDLLM_inferencing/Fast_dLLM_v2_7B/config.json": (32, None, 3584, 28, None),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["path"])
def test_published_keys_are_read_and_written(row):
    values = row["config"]
    config = FAMILIES[values["model_type"]].config_class.from_dict(values)
    config.check()
    experts = getattr(config, "num_local_experts", None)
    found = (config.block_size, config.mask_token_id, config.hidden_size, config.num_hidden_layers, experts)
    assert found == EXPECTED[row["path"]]
    assert config.rope_parameters["rope_theta"] == values["rope_theta"]
    again = json.loads(config.to_json_string())
    changed = {k for k, v in values.items() if again.get(k, v) != v}
    assert changed <= {"transformers_version"}


@pytest.mark.parametrize("size", [8, 16, 64])
def test_another_block_size_of_a_derivative(tmp_path, size, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    save_model(make_model(block_size=size), tmp_path / "m")
    assert load_model(tmp_path / "m")[0].config.block_size == size
    assert not caplog.records


@pytest.mark.parametrize("family", ["sdar", "sdar_moe"])
def test_a_block_size_that_is_nowhere_is_said(tmp_path, family, caplog, monkeypatch):
    """TDAR and MBD's checkpoints were trained with up to 64, and not all files say so."""
    monkeypatch.setattr(log, "propagate", True)
    save_model(make_model(family=family), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "block_size"}))
    assert load_model(tmp_path / "m")[0].config.block_size == 4
    assert "does not say the block size; if it is not 4" in caplog.text


@pytest.mark.parametrize("kind", NOT_HERE)
def test_what_is_not_here_says_why(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(T3DError, match=NOT_HERE[kind]) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_a_router_of_another_kind_is_refused(tmp_path):
    save_model(make_model(family="llada2_moe"), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"score_function": "softmax"}))
    with pytest.raises(T3DError, match="score_function is softmax; only sigmoid"):
        load_model(tmp_path / "m")
