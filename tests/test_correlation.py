"""Correlation of windows: of edges, of their negatives, of another contrast, and of next to nothing."""

import torch

from diffusionerf_ns.correlation import normalised_cross_correlation, window_moments

TEXTURE = 3e-5


def test_windows_are_alike_only_where_their_contrast_is_too() -> None:
    edge = torch.zeros(1, 1, 9, 9)
    edge[..., 5:] = 0.8
    inside = (0, 0, 4, 4)
    alike = {
        k: normalised_cross_correlation(k * edge, window_moments(k * edge), edge, TEXTURE)[inside]
        for k in (1.0, 0.7, 0.01, 0.0)
    }
    assert alike[1.0] > 0.99
    assert 0.9 < alike[0.7] < 0.96, "another exposure"
    assert alike[0.01] < 0.03, "a shade of two grey levels is not that edge"
    assert alike[0.0] == 0.0
    assert normalised_cross_correlation(1.0 - edge, window_moments(1.0 - edge), edge, TEXTURE)[inside] < -0.99
    faint = 0.01 * edge
    assert normalised_cross_correlation(faint, window_moments(faint), faint, TEXTURE)[inside] < 0.5, "less than noise"
