"""Side files that other tools expect beside a shard: pure functions from figures to content, one module per tool.

None of them touches a disk; the write pass hands their results to `curate.storage`. Every function is deterministic, so
that two runs over the same inputs give the same bytes.
"""
