"""What can be seen of a run while it goes on and afterwards: its history, the page of it, and figures for monitors.

    events          events.jsonl: starts, restarts and why, checkpoints, faults, signals, the end
    run_files       what the directory of a run says about it
    exporter        the newest figures for Prometheus
    device          the device's name and peak, for MFU
    memory_history  who holds what when a device runs out of memory
    series, charts, heat_maps, html, page   the page that tools/report.py writes
"""
