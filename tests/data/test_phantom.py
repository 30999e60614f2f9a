"""The phantom corpus: the same each time, and image, labels, masks, boxes and words agree."""

import numpy as np

from medsyn_jax.data import phantom


def test_labels_do_not_depend_on_size():
    small, large = phantom.study(3, 5, 1, 64), phantom.study(3, 5, 1, 224)
    assert small.report == large.report
    assert small.labels == large.labels
    assert small.key == large.key
    assert large.image.shape == (224, 224)
    assert large.image.dtype == np.uint8
