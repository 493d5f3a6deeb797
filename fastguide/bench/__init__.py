"""The benchmark suite behind ``fastguide bench``: workloads, contenders, measurements and their report."""
