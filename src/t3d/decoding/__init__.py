from t3d.decoding.config import DecodingConfig

__all__ = ["DecodingConfig"]
