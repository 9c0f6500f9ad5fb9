"""Pictures as bytes: what is kept of them, and what the model gets."""

from __future__ import annotations

import numpy as np
import torch

from autoprune.tasks._arrays import Batches, Normalised

READY = Normalised(torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))


def pictures(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 5, 4, 3), dtype=np.uint8)


def test_inputs_go_back_to_the_bytes_that_they_were_and_others_stay() -> None:
    raw, labels = torch.from_numpy(pictures(50)), torch.arange(50)
    inputs = READY((raw, labels))[0]
    assert torch.equal(READY.back((inputs, labels))[0], raw)
    odd = inputs + 1e-4
    assert READY.back((odd, labels))[0] is odd
    assert READY((odd, labels))[0] is odd


def test_batches_are_the_rows_asked_for_of_an_array_that_is_read_batch_by_batch(tmp_path: object) -> None:
    path = f"{tmp_path}/x.npy"
    np.save(path, pictures(30))
    images, rows = np.load(path, mmap_mode="r"), np.array([29, 3, 4, 17, 0])
    batches = Batches(images, rows, torch.tensor([1, 2, 3, 4, 5]), READY, size=3)
    assert (len(batches), batches.samples) == (2, 5)
    kept, given = list(batches.stored()), list(batches)
    assert [x.dtype for x, _ in kept] == [torch.uint8] * 2
    assert torch.equal(torch.cat([x for x, _ in kept]), torch.from_numpy(pictures(30)[rows]))
    for pair, (inputs, labels) in zip(kept, given, strict=True):
        assert torch.equal(batches.ready(pair)[0], inputs)
        assert torch.equal(pair[1], labels)
    expected = torch.from_numpy(pictures(30)[29]).permute(2, 0, 1) / 255 - READY.mean[:, None, None]
    torch.testing.assert_close(given[0][0][0], expected / READY.std[:, None, None])
