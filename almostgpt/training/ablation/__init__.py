"""Which part is better: the same run with one part or another, over several seeds (docs/ablation.md).

variants.py   the combinations of what is varied, each as the settings of a run
matching.py   as many parameters for each of them
runs.py       the runs: done once, and gone on with where they were stopped
statistics.py means, intervals and paired differences over seeds
report.py     the table, results.json, results.md and ablation.png
"""
