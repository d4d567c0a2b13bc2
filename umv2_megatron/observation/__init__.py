"""What can be seen of a run while it goes on and afterwards: its history, the page of it, and figures for monitors.

    events          events.jsonl: starts, restarts and why, checkpoints, faults, signals, the end
    run_files       what the directory of a run says about it
    series, charts, heat_maps, html, page   the page that tools/report.py writes
"""
