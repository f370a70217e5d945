"""What one sees of a run: lines while it goes on, a log, a report."""
