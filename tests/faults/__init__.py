"""Faults by accident and by intent: kills, full disks, signals, second processes, damaged and hostile files."""
