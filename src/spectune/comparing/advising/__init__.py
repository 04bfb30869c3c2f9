"""Which method to take: from measurements within a user's limits, or from the textbook without any."""
