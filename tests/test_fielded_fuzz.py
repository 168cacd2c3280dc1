"""Some seconds of tests/fuzz_fielded.py; the seed is in the message of a failure."""
import os

import fuzz_fielded


def test_random_fielded_calls_make_no_500_no_html_and_no_stuck_state(tmp_path):
    seed = os.urandom(4).hex()
    wrong, counts, good = fuzz_fielded.run(str(tmp_path), 5, seed)
    assert not wrong, "seed %s: %s" % (seed, "\n".join(wrong))
    assert sum(counts.values()) > 500 and counts["led out"] > 0 and set(fuzz_fielded.NAMES) <= set(good), (counts, good)
