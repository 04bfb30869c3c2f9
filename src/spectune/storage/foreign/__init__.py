"""Folders of other programs: what they say, in our words; one file for each format."""
