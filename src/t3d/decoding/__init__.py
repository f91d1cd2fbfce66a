from t3d.decoding.calibration import calibrate, load_decoding, save_decoding, tokens_per_forward
from t3d.decoding.config import DecodingConfig, parse_settings

__all__ = ["DecodingConfig", "calibrate", "load_decoding", "parse_settings", "save_decoding", "tokens_per_forward"]
