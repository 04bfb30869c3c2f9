"""A base and its deltas behind OpenAI's HTTP interface: `spectune serve`."""
