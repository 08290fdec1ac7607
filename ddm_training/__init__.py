"""Training of a diffusion model of RGBD patches, from raw frames to a prior folder. Needs no nerfstudio."""
