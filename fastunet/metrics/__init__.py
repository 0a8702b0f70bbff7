"""The figures the challenges report: ISBI 2012 (pixel, Rand, warping), 2015 (V^Rand, V^Info), SEG, Dice, IoU.

The first argument is always the truth, the second the prediction; both are (H, W), (N, H, W), or a list of
(H, W) arrays of differing sizes. Wherever a probability is taken, the truth is its foreground: every value
above 0. A plain function (`v_rand`) returns the figure as a float. Its curve (`overlaps(...).v_rand()`,
`pixel_curve`, `warping_curve`, `seg_objects`, `iou_per_class`) holds what stands behind it: thresholds,
slices, objects, classes.

Ignored pixels need no argument. Setting truth and prediction to 0 there takes them out of `pixel_error`,
`dice`, `iou` and `seg`, because none of these counts background agreed upon; setting only the truth to 0
takes them out of the Rand and information figures, because those look at the truth's foreground alone.
"""

from fastunet.metrics.curve import THRESHOLDS, Curve
from fastunet.metrics.pixel import dice, dice_per_class, iou, iou_per_class, pixel_curve, pixel_error
from fastunet.metrics.rand import Overlaps, label_overlaps, overlaps, rand_error, v_info, v_rand
from fastunet.metrics.segmentation import Objects, seg, seg_objects
from fastunet.metrics.warping import WARPING_THRESHOLDS, Warping, warping_curve, warping_error

__all__ = [
    "THRESHOLDS",
    "WARPING_THRESHOLDS",
    "Curve",
    "Objects",
    "Overlaps",
    "Warping",
    "dice",
    "dice_per_class",
    "iou",
    "iou_per_class",
    "label_overlaps",
    "overlaps",
    "pixel_curve",
    "pixel_error",
    "rand_error",
    "seg",
    "seg_objects",
    "v_info",
    "v_rand",
    "warping_curve",
    "warping_error",
]
