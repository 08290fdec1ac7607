"""DiffusioNeRF as a nerfstudio method."""
