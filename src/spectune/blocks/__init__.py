"""Everything that exchanges a decoder block's call: compiling, recomputation, CUDA graphs, offload."""
