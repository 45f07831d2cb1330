"""Fractional Gaussian noise of a known Hurst exponent, for the tests of fractal statistics."""

import numpy as np


def fractional_noise(rows, length, hurst, seed):
    """Exact samples by circulant embedding (Davies and Harte, 1987), [rows, length]."""
    rng = np.random.default_rng(seed)
    lag = np.arange(length + 1.0)
    covariance = 0.5 * (np.abs(lag - 1) ** (2 * hurst) - 2 * lag ** (2 * hurst) + (lag + 1) ** (2 * hurst))
    circle = np.concatenate([covariance[:length], [covariance[length]], covariance[1:length][::-1]])
    power = np.fft.fft(circle).real.clip(0) / len(circle)
    normal = rng.normal(size=(rows, len(circle))) + 1j * rng.normal(size=(rows, len(circle)))
    return np.fft.fft(np.sqrt(power) * normal, axis=1).real[:, :length]
