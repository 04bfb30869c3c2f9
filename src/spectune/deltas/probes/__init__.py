"""What is proved of a base by running it. Probes only look: none changes what it looks at."""
