"""Writes fields.h5: random fields on 16×16×16 cells, and for each the amplitude and the smoothing length it was made with."""

import h5py
import numpy as np

SAMPLES, CELLS = 500, 16

random = np.random.default_rng(0)
parameters = random.uniform([0.5, 0.5], [2.0, 3.0], (SAMPLES, 2))
wave_numbers = np.fft.fftfreq(CELLS)
squares = wave_numbers[:, None, None] ** 2 + wave_numbers[:, None] ** 2 + wave_numbers**2
amplitude, length = parameters.T.reshape(2, SAMPLES, 1, 1, 1)
noise = np.fft.fftn(random.normal(size=(SAMPLES, CELLS, CELLS, CELLS)), axes=(1, 2, 3))
density = amplitude * np.fft.ifftn(noise * np.exp(-2 * (np.pi * length) ** 2 * squares), axes=(1, 2, 3)).real

with h5py.File("fields.h5", "w") as file:
    file.create_dataset(
        "fields/density", data=density[..., None].astype("f4"), chunks=(10, 16, 16, 16, 1), compression="gzip"
    )
    file["parameters"] = parameters.astype("f4")
