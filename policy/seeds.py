"""Which random numbers are for what. The ranges share none; the test range is read by `make bench-policy` only.

Those from 2,000,000, 6,000,000 and 7,000,000 on were test ranges until something was changed after a look at their
tables; nothing reads them.
"""

TRAINING = range(0, 1_000_000)
TUNING = range(1_000_000, 2_000_000)
"""For whatever is decided by looking at results: step sizes, features, which model ships."""
CHECKS = range(3_000_000, 4_000_000)
"""For tests of the code."""
USERS = range(4_000_000, 5_000_000)
"""For `rms simulate`."""
LEARNING = range(5_000_000, 6_000_000)
"""For `rms learn`: what it draws from a log, and the made-up jobs on which a challenger must not be worse."""
TEST = range(8_000_000, 9_000_000)
"""For the tables of docs/policy.md."""
