"""Lines that grep and a split at blanks and `=` can read."""

import math

from neurostorm.train.records.log_lines import line, percent


def test_a_line_is_the_event_what_it_is_about_and_its_values():
    shown = line("step", "120/5000", loss=0.412345, clips_per_s=31.52, wait=percent(0.00213), left_s=321)
    assert shown == "step 120/5000 loss=0.4123 clips_per_s=31.52 wait=0.2% left_s=321"
    assert line("checkpoint", step=500) == "checkpoint step=500"


def test_small_large_and_broken_numbers_stay_one_word_that_float_reads():
    shown = line("x", a=1e-9, b=12345678.0, c=math.nan, d=math.inf)
    assert [float(word.partition("=")[2]) for word in shown.split()[1:3]] == [1e-9, 1.235e7]
    assert shown.endswith("c=nan d=inf")
