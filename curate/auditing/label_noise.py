"""What the true ratio may be where a group's labels are sometimes wrong.

Of those in a group a share `sensitivity` is labelled so, of the others a share 1 - `specificity` is as well, whether
selected or not (errors that depend on the selection are beyond this). Both the pool's and the selection's share of the
group are put right (Rogan and Gladen 1978), at the limits of the observed ratio. Mislabelled rows pull ratios to 1, so
the corrected range lies further out; of a rare group most labels may be wrong even at a specificity of 0.99.
"""

from __future__ import annotations

import math

from curate.auditing.columns import LabelError
from curate.auditing.strata import Ratio


def corrected(observed: Ratio, share: float, error: LabelError) -> Ratio | None:
    """The ratio and its limits after correction, for a group with that share of the pool.

    None where the labels' errors alone would make as many rows as are labelled: nothing is known of the group then.
    Example: 0.7 (0.6 to 0.8) of a group with a tenth of the pool, sensitivity 0.9 and specificity 0.98, is 0.619
    (0.491 to 0.745).
    """
    if not 0 < _true_share(share, error) < 1:
        return None
    value, low, high = (_ratio(one, share, error) for one in (observed.value, observed.low, observed.high))
    return Ratio(value, low, high)


def _true_share(labelled: float, error: LabelError) -> float:
    return (labelled + error.specificity - 1) / (error.sensitivity + error.specificity - 1)


def _ratio(observed: float, share: float, error: LabelError) -> float:
    if math.isnan(observed):
        return observed
    chosen = 1.0 if math.isinf(observed) else share * observed / (share * observed + 1 - share)
    pool, selected = _true_share(share, error), _true_share(chosen, error)
    selected = min(1.0, max(0.0, selected))
    return math.inf if selected == 1 else (selected / pool) / ((1 - selected) / (1 - pool))
