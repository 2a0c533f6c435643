"""Benchmarks of asrfs beside everything else that could do its job. `tools/bench` starts them.

__main__      the command line                  results, figures, chart, page    PURE: what measurements say
workbench     scratch directory, processes      peers, foreign, own_peers        what is measured
measuring     fio, processor time, memory       blocks, database, replicate, …   one module a benchmark
"""
