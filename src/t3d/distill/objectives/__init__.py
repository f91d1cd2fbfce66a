"""Training objectives, one file each; `t3d.distill.objective` says what one is."""
