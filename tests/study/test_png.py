"""PNGs that are packed here hold the pixels that they are made of."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from largebatch.common.figures import DPI
from largebatch.study.page.svg import png_of


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (40, 3), (33, 65)])
def test_a_png_holds_the_pixels_that_it_is_made_of(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    image = Image.open(BytesIO(png_of(pixels)))
    assert (image.format, image.mode) == ("PNG", "RGB")
    assert np.array_equal(np.asarray(image), pixels)
    assert image.info["dpi"] == pytest.approx((DPI, DPI), abs=0.01)
