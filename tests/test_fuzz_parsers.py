"""Some seconds of tests/fuzz_parsers.py; the seed is in the message of a failure."""
import os

import fuzz_parsers


def test_mutated_input_of_every_reader_is_refused_or_read_right():
    seed = os.urandom(4).hex()
    wrong, counts, outcomes = fuzz_parsers.run(20000, seed)
    assert not wrong, "seed %s: %s" % (seed, "\n".join(wrong))
    assert len(counts) == 8 and all(len(found) > 1 for target, found in outcomes.items() if target not in ("journal", "ini")), outcomes
