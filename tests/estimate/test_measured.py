"""What a run on a GPU prints of its memory."""

from __future__ import annotations

from lowmem_npo.estimate.measured import Measurement, compare
from lowmem_npo.estimate.step import Estimate

GIB = 2**30


def test_measured_and_predicted_stand_side_by_side_and_a_difference_is_reported():
    predicted = Estimate(peak_bytes=4 * GIB, needed_bytes=5 * GIB, by_kind={}, host_bytes=0)
    (line,) = compare(predicted, Measurement(allocated=4 * GIB, reserved=6 * GIB, process=7 * GIB))
    assert line == (
        "GPU memory: peak 4.00 GiB, predicted 4.00 GiB (+0.0%); reserved 6.00 GiB, predicted to need 5.00 GiB; "
        "the whole process 7.00 GiB."
    )
    _, warning = compare(predicted, Measurement(allocated=5 * GIB, reserved=6 * GIB, process=None))
    assert "differ by more than 5%" in warning
