"""Monitoring of a run: console lines, log, report, trackers."""
