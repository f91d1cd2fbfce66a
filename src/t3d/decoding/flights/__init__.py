"""One flight per file; every module here is imported by `t3d.decoding.config`."""
