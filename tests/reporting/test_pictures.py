"""Pictures show what they should: curves in their colours, outlines where the labels are."""

import numpy as np

from panther_jax.reporting import pictures


def test_progress_picture_shows_the_curves(tmp_path):
    rows = [
        {
            "epoch": e,
            "train_loss": 1.0 - e / 10,
            "validation_loss": None,
            "mean_pseudo_dice": e / 10,
            "ema": e / 12,
            "pseudo_dice": {"tumor": None, "pancreas": 0.5},
            "seconds": 3.0,
            "lr": 0.01,
        }
        for e in range(4)
    ]
    pictures.plot_progress(rows, tmp_path / "progress.png")
    from matplotlib import pyplot as plt

    pixels = plt.imread(tmp_path / "progress.png")
    assert pixels.shape[0] > 500 and pixels.shape[1] > 500
    blue = (pixels[..., 2] > 0.9) & (pixels[..., 0] < 0.1) & (pixels[..., 1] < 0.1)
    green = (pixels[..., 1] > 0.4) & (pixels[..., 0] < 0.1) & (pixels[..., 2] < 0.1)
    assert np.count_nonzero(blue) > 100 and np.count_nonzero(green) > 100
    assert [p.name for p in tmp_path.iterdir()] == ["progress.png"]


def test_overlays_outline_reference_and_prediction(tmp_path):
    from matplotlib import pyplot as plt

    reference = np.zeros((3, 40, 40), np.int16)
    reference[1, 10:20, 10:20], reference[2, 5:8, 5:8] = 1, 1
    reference[:, 25:35, 25:35] = 2
    assert pictures.best_slice(reference, (1, 2)) == 1
    assert pictures.best_slice(reference * 0, (1, 2)) == 1
    assert pictures.best_slice(reference[[0, 0, 2]], (1, 2)) == 2

    def draw(prediction):
        overlay = pictures.Overlay(
            "case", np.random.default_rng(0).normal(size=(40, 40)), reference[1], prediction
        )
        path = tmp_path / "overlay.png"
        pictures.plot_overlays([overlay], {"tumor": 1, "pancreas": 2}, path)
        pixels = plt.imread(path)
        red = (pixels[..., 0] > 0.8) & (pixels[..., 1] < 0.4) & (pixels[..., 2] < 0.4)
        return np.count_nonzero(red)

    alone, with_prediction = draw(np.zeros((40, 40), int)), draw(np.roll(reference[1], 8, 0))
    assert alone > 100 and with_prediction > 1.3 * alone
    assert [p.name for p in tmp_path.iterdir()] == ["overlay.png"]
