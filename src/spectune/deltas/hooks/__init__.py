"""What acts inside a forward pass, a file for each place that is exchanged. Hooks know the forward state, no delta."""
