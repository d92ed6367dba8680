"""Sweeps: many runs of one config, what each came to, and which was best. It returns data and prints nothing.

space    what is tried: grids and draws, and the names of the runs
figures  what is compared: a curve of metrics.jsonl, or a pass's figure of artifact.json
rules    when a trial is stopped early: a pure function of the curves
engine   trials through the queue, and what is kept to go on after a crash
"""
