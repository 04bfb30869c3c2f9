"""What acts inside a forward pass, one file for each place that is exchanged. Hooks know the forward state, no delta."""
