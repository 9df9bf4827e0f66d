"""What a run shows and keeps: metrics, loggers, progress, log files."""
